"""MuonAdamW: which weights each of the two trains, and that schedules and checkpoints reach both."""

import copy

import pytest
import torch
from torch import nn

from feedback_transformers import (
    FeedbackConfig,
    FeedbackForCausalLM,
    FeedbackForTimeSeriesPrediction,
    FeedbackForTokenClassification,
)
from feedback_transformers.training import MuonAdamW


def model(**fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_attention_heads": 2, "tie_word_embeddings": False}
    return FeedbackForCausalLM(FeedbackConfig(**sizes, **fields))


def steps(trained, optimizer, count, first=0):
    for seed in range(first, first + count):
        ids = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(seed))
        trained(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_weight_is_trained_once_and_by_the_right_one():
    trained = model()
    optimizer = MuonAdamW(trained, lr=1e-3, muon_lr=1e-2, weight_decay=0.1)
    names = {id(p): name for name, p in trained.named_parameters()}
    muon, outer, flat = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert outer == {"lm_head.weight", "model.embeddings.embed_tokens.weight"}
    assert all(name.endswith("weight") and "norm" not in name for name in muon)
    assert sorted([*muon, *outer, *flat]) == sorted(names.values())
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3, 1e-3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]


def test_the_ends_of_a_forecast_are_outside_of_muon():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "input_config": {"type": "values", "num_channels": 3}}
    trained = FeedbackForTimeSeriesPrediction(FeedbackConfig(**sizes, feedback_signal="output"))
    names = {id(p): name for name, p in trained.named_parameters()}
    outer = {names[id(p)] for p in MuonAdamW(trained).param_groups[1]["params"]}
    assert outer == {"model.embeddings.projection.weight", "readout.weight", "feedback.weight"}


def test_a_classifier_is_read_and_fed_back_outside_of_muon():
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_attention_heads": 2}
    config = FeedbackConfig(**sizes, feedback_axis="time", feedback_type="diagonal_gru", feedback_signal="output")
    trained = FeedbackForTokenClassification(config)
    names = {id(p): name for name, p in trained.named_parameters()}
    muon, outer, _ = ({names[id(p)] for p in group["params"]} for group in MuonAdamW(trained).param_groups)
    diagonal = {name for name in names.values() if name.endswith("diagonal.weight")}
    assert outer == {
        "classifier.weight",
        "feedback_classifier.weight",
        "model.embeddings.embed_tokens.weight",
        *diagonal,
    }
    assert diagonal and not muon & outer


def test_it_does_what_the_two_of_pytorch_do():
    ours, theirs = model(), model()
    optimizer = MuonAdamW(ours, lr=1e-3, muon_lr=1e-2, weight_decay=0.1)
    names = [
        [n for n, p in ours.named_parameters() if any(p is q for q in g["params"])] for g in optimizer.param_groups
    ]
    weights = dict(theirs.named_parameters())
    inner, outer, flat = ([weights[name] for name in group] for group in names)
    muon = torch.optim.Muon(inner, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": outer, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for seed in range(3):
        steps(ours, optimizer, 1, seed)
        ids = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(seed))
        theirs(ids, labels=ids).loss.backward()
        muon.step()
        adamw.step()
        theirs.zero_grad()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name, rtol=0, atol=0)


def test_a_schedule_scales_both():
    trained = model()
    optimizer = MuonAdamW(trained, lr=1e-3, muon_lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(trained.state_dict())
    steps(trained, optimizer, 1)
    schedule.step()
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())


def test_a_restored_state_goes_on_as_before():
    whole, part = model(), model()
    steps(whole, MuonAdamW(whole), 4)
    first = MuonAdamW(part)
    steps(part, first, 2)
    second = MuonAdamW(part)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(part, second, 2, first=2)
    for one, other in zip(whole.parameters(), part.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_model_without_matrices_is_refused():
    with pytest.raises(ValueError, match="use AdamW"):
        MuonAdamW(nn.LayerNorm(4))
