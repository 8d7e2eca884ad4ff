"""One body over every combination of encoder, cell, decoder and axis, then what only some models have."""

import pytest
import torch
from conftest import (
    BOS,
    EOS,
    PAD,
    assert_close,
    build,
    each_axis,
    each_cell,
    each_combination,
    tiny,
    tokens,
)
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel
from transformers.activations import ACT2FN

from feedback_transformers import (
    PRESETS,
    FeedbackCache,
    FeedbackConfig,
    FeedbackForCausalLM,
    FeedbackForConditionalGeneration,
    FeedbackForImageClassification,
    FeedbackForMaskedLM,
    FeedbackForQuestionAnswering,
    FeedbackForSequenceClassification,
    FeedbackForTimeSeriesPrediction,
    FeedbackForTokenClassification,
    FeedbackModel,
)
from feedback_transformers.models.configuration_feedback import BACKBONE_TYPES, MODELING, RECURRENT_TYPES

# What the combinations don't contain; the shared body runs over these too.
VARIANTS = {
    **{f"preset-{name}": {**fields, "num_feedback_layers": 2} for name, fields in PRESETS.items()},
    "memory-none": {**PRESETS["feedback-transformer"], "feedback_signal": "none"},
    "share-encoder-decoder": {"share_encoder_decoder": True, "feedback_signal": "output"},
    "share-encoder-decoder-time": {"share_encoder_decoder": True, "feedback_axis": "time", "feedback_type": "gru"},
    "grouped-query": {"num_key_value_heads": 2, "feedback_axis": "time", "feedback_interval": 3},
    "two-layers": {"num_encoder_layers": 2, "num_feedback_layers": 2, "num_decoder_layers": 2},
    "two-layers-lstm": {"feedback_type": "lstm", "num_feedback_layers": 2, "feedback_axis": "time"},
    "no-encoder-no-decoder": {"num_encoder_layers": 0, "num_decoder_layers": 0, "feedback_type": "diagonal_gru"},
    "kernel-1": {"feedback_type": "conv", "conv_kernel_size": 1, "encoder_type": "cnn", "feedback_axis": "time"},
    "kernel-6": {"feedback_type": "conv", "conv_kernel_size": 6, "encoder_type": "cnn", "feedback_axis": "time"},
    "untied": {"tie_word_embeddings": False, "feedback_signal": "output"},
    "supervision-all": {"supervision": "all", "feedback_signal": "output"},
    "truncated": {"gradient_steps": 2, "feedback_type": "gru", "feedback_axis": "time"},
}
for family in BACKBONE_TYPES:
    for axis in ("time", "depth"):
        VARIANTS[f"{family}-{axis}"] = {
            "backbone_config": {"model_type": family},
            "feedback_axis": axis,
            "feedback_interval": 3 if axis == "time" else 1,
        }
    if family != "gpt2":
        VARIANTS[f"{family}-memory"] = {
            **PRESETS["feedback-transformer"],
            "backbone_config": {"model_type": family},
            "num_key_value_heads": 2,
        }
VARIANTS["preset-tiny-recursive"]["is_causal"] = True
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


def learns(fields: dict) -> None:
    model = build(**fields).train()
    batch = tokens(1, 7).repeat(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(batch, labels=batch).loss
        loss.backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing, "distributed training needs a gradient for each parameter"
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


def saves_and_loads(fields: dict, folder) -> None:
    model = build(**fields)
    model.save_pretrained(folder)
    assert {file.suffix for file in folder.iterdir()} == {".py", ".json", ".safetensors"}
    loaded, info = FeedbackForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.to_dict() == FeedbackForCausalLM.from_pretrained(folder).config.to_dict()
    tied = loaded.lm_head.weight is loaded.model.embeddings.tokens.weight
    assert tied == model.config.tie_word_embeddings
    batch = tokens()
    assert torch.equal(loaded(batch).logits, model(batch).logits)


def cached_equals_uncached(fields: dict) -> None:
    model, batch = build(**fields), tokens(2, 13)
    with torch.no_grad():
        full = model(batch, use_cache=False)
        assert full.past_key_values is None
        for bounds in (range(14), (0, 5, 13), (0, 4, 5, 11, 13)):
            cache, logits = None, []
            for start, stop in zip(bounds, bounds[1:], strict=False):
                outputs = model(batch[:, start:stop], past_key_values=cache, use_cache=True)
                cache = outputs.past_key_values
                logits.append(outputs.logits)
            assert cache.get_seq_length() == 13
            assert_close(torch.cat(logits, dim=1), full.logits)


def pad(batch: torch.Tensor, lengths: list[int], where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] -> each row cut to its length and padded to T + 3, with tokens that would be seen if they were read."""
    rows, masks = [], []
    for row, length in zip(batch, lengths, strict=True):
        mask = torch.zeros(batch.shape[1] + 3, dtype=torch.long)
        if where == "left":
            mask[-length:] = 1
        elif where == "right":
            mask[:length] = 1
        else:
            mask[[1, 2, *range(5, 3 + length)]] = 1
        padded = torch.full_like(mask, EOS)
        padded[mask.bool()] = row[:length]
        rows.append(padded)
        masks.append(mask)
    return torch.stack(rows), torch.stack(masks)


def padding_changes_nothing(fields: dict) -> None:
    """Rows of 11, 8 and 4 tokens, padded, then continued by 5 tokens and by one, against each row alone."""
    model = build(**fields)
    batch, later, lengths = tokens(3, 11), tokens(3, 6, start=200), [11, 8, 4]
    with torch.no_grad():
        alone = [
            model(torch.cat([row[:n], more])[None], use_cache=False).logits[0]
            for row, n, more in zip(batch, lengths, later, strict=True)
        ]
        for where in ("left", "right", "inside"):
            padded, mask = pad(batch, lengths, where)
            first = model(padded, attention_mask=mask, use_cache=True)
            mask = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
            second = model(later[:, :5], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
            third = model(later[:, 5:], past_key_values=second.past_key_values, use_cache=True)
            for i, n in enumerate(lengths):
                real = first.logits[i][mask[i, : padded.shape[1]].bool()]
                assert_close(torch.cat([real, second.logits[i], third.logits[i]]), alone[i])


def causal(fields: dict) -> None:
    model, batch = build(**fields), tokens(2, 12)
    changed = batch.clone()
    changed[:, 7] = (changed[:, 7] + 1 - 5) % 45 + 5
    with torch.no_grad():
        before, after = model(batch).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def generates(fields: dict) -> None:
    model, prompt = build(**fields), tokens(2, 6)
    padded = torch.cat([prompt.new_full((2, 3), PAD), prompt], dim=1)
    mask = (padded != PAD).long()
    arguments = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    cached = model.generate(prompt, **arguments)
    for other in (
        model.generate(prompt, **arguments, use_cache=False),
        model.generate(padded, attention_mask=mask, **arguments),
    ):
        assert torch.equal(other.sequences[:, -6:], cached.sequences[:, -6:])
        assert_close(torch.stack(other.scores), torch.stack(cached.scores))
    single = model.generate(prompt[:1], **arguments)
    assert torch.equal(single.sequences, cached.sequences[:1])


@each_combination
def test_learns(fields):
    learns(fields)


@each_combination
def test_saves_and_loads(fields, tmp_path):
    saves_and_loads(fields, tmp_path)


@each_combination
def test_cached_equals_uncached(fields):
    cached_equals_uncached(fields)


@each_combination
def test_padding_changes_nothing(fields):
    padding_changes_nothing(fields)


@each_combination
def test_causal(fields):
    causal(fields)


@each_combination
def test_generates(fields):
    generates(fields)


@each_variant
def test_variant(fields, tmp_path):
    learns(fields)
    saves_and_loads(fields, tmp_path)
    cached_equals_uncached(fields)
    padding_changes_nothing(fields)
    causal(fields)
    generates(fields)
