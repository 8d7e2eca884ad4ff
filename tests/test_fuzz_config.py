"""10,000 random FeedbackConfigs: each is refused with a sentence, or builds, runs, saves and loads."""

import copy
import json
import math
import re
from collections import Counter
from dataclasses import fields
from typing import Any

import fuzzing
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from safetensors.torch import load, save
from transformers import PreTrainedConfig
from transformers import initialization as init

from feedback_transformers import (
    FeedbackConfig,
    FeedbackForCausalLM,
    FeedbackForConditionalGeneration,
    FeedbackForImageToImage,
    FeedbackForObjectDetection,
    FeedbackForQuestionAnswering,
    FeedbackForSequenceClassification,
    FeedbackForTokenClassification,
    FeedbackModel,
)

LENGTH = 5
FIELDS = {field.name for field in fields(FeedbackConfig)} | {"num_labels", "problem_type"}


def check(head, fields: dict, trains: bool) -> str:
    """Whether it was `refused` or `ran`; fails on anything else. `trains`: backward too."""
    torch.manual_seed(0)
    try:
        config = FeedbackConfig(**fields)
        sane(config)
        model = head(config).eval()
    except (ValueError, TypeError, StrictDataclassError) as error:
        refused_well(error)
        return "refused"
    inputs, labels = inputs_of(model)
    try:
        with torch.no_grad():
            expected = model(**inputs)[0]
    except ValueError as error:  # of a base model that would need a head
        refused_well(error)
        return "refused"
    assert expected.isfinite().all()
    # With shared_step_cache a later call reads other keys than an earlier one did: that is what it is for.
    if head is FeedbackForCausalLM and not config.shared_step_cache:
        cached_equals_uncached(model, inputs["input_ids"])
    if trains:
        try:
            learns(model, inputs, labels)
        except ValueError as error:  # of a head that can't learn to halt
            assert "halting" in str(error), error
    again = saved_and_loaded(model)
    with torch.no_grad():
        assert torch.equal(again(**inputs)[0], expected)
    return "ran"


def sane(config: FeedbackConfig) -> None:
    """No number in it is one that nobody can mean, whatever its rules say."""
    for name, value in vars(config).items():
        if isinstance(value, float | int) and name in FIELDS:
            assert math.isfinite(value) and abs(value) < 1e10, (name, value)
            assert value >= 0 or name in ("bos_token_id", "eos_token_id"), (name, value)
    assert config.num_labels >= 1 and isinstance(config.backbone_config, PreTrainedConfig)


def refused_well(error: Exception) -> None:
    """One sentence that names a field or a head, and no crash of somebody else's code."""
    sentence = str(error)
    words = set(re.findall(r"\w+", sentence))
    if not isinstance(error, StrictDataclassError):  # which names the field, on a line of its own
        assert words & FIELDS or "backbone" in sentence, sentence
        assert len(sentence) < 700 and "\n" not in sentence, sentence


def inputs_of(model) -> tuple[dict, dict]:
    """Inputs of a size that the config allows, and labels for them."""
    config, head = model.config, type(model)
    if config.input_type in ("images", "videos"):
        frames = (3,) if config.input_type == "videos" else ()
        pixels = torch.randn(2, *frames, config.input_config.num_channels, 8, 6)
        labels: Any = labels_of(config, 2)
        if head is FeedbackForImageToImage:
            labels = torch.randn(2, pixels.shape[1], 8 * config.upscale, 6 * config.upscale)
        if head is FeedbackForObjectDetection:
            labels = [{"class_labels": torch.tensor([0]), "boxes": torch.full((1, 4), 0.4)}] * 2
        return {"pixel_values": pixels}, {"labels": labels}
    if config.input_type == "values":
        channels = config.input_config.num_channels
        series = torch.randn(2, LENGTH, channels)
        return {"past_values": series}, {"future_values": torch.randn(2, config.prediction_length, channels)}
    ids = torch.randint(config.vocab_size, (2, LENGTH))
    if head is FeedbackForConditionalGeneration and config.source_type == "images":
        pixels = torch.randn(2, config.source_config.num_channels, 8, 6)
        return {"pixel_values": pixels, "decoder_input_ids": ids}, {"labels": ids}
    if head is FeedbackForConditionalGeneration:
        return {"input_ids": ids, "decoder_input_ids": ids}, {"labels": ids}
    if head is FeedbackForSequenceClassification:
        return {"input_ids": ids}, {"labels": labels_of(config, 2)}
    if head is FeedbackForTokenClassification:
        return {"input_ids": ids}, {"labels": ids % config.num_labels}
    if head is FeedbackForQuestionAnswering:
        return {"input_ids": ids}, {name: torch.tensor([0, 1]) for name in ("start_positions", "end_positions")}
    return {"input_ids": ids}, {"labels": ids}


def labels_of(config: FeedbackConfig, batch: int) -> torch.Tensor:
    if config.problem_type == "multi_label_classification":
        return torch.ones(batch, config.num_labels)
    if config.problem_type == "regression" or config.num_labels == 1:
        return torch.ones(batch) if config.num_labels == 1 else torch.ones(batch, config.num_labels)
    return torch.zeros(batch, dtype=torch.long)


def cached_equals_uncached(model, ids: torch.Tensor) -> None:
    """In double precision, so that no weights are so large that rounding could hide a wrong cache."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = model(ids).logits
        first = model(ids[:, :3], use_cache=True)
        second = model(ids[:, 3:], past_key_values=first.past_key_values, use_cache=True)
    logits = torch.cat([first.logits, second.logits], dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-9, rtol=1e-7)


def learns(model, inputs: dict, labels: dict) -> None:
    model.train()
    outputs = model(**inputs, **({} if isinstance(model, FeedbackModel) else labels))
    (outputs[0].square().sum() if isinstance(model, FeedbackModel) else outputs.loss).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
    model.zero_grad()
    model.eval()


def saved_and_loaded(model):
    """Through the JSON of the config and the bytes of safetensors: what save_pretrained writes, without its files."""
    config = FeedbackConfig.from_dict(json.loads(model.config.to_json_string(use_diff=True)))
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    weights = {name: value for name, value in model.state_dict().items() if name not in tied}
    with init.no_init_weights():  # what is not loaded is what memory held
        again = type(model)(config).eval()
    again.tie_weights()
    missing, unexpected = again.load_state_dict(load(save(weights)), strict=False)
    assert set(missing) <= tied and not unexpected
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    return again


def run(number: int, examples: int) -> None:
    outcomes: Counter[str] = Counter()

    def each(case: tuple) -> None:
        outcomes[check(*case)] += 1

    fuzzing.run(given(fuzzing.cases())(each), number, examples)
    assert outcomes["ran"] > examples / 4 and outcomes["refused"] > examples / 4, outcomes


@pytest.mark.parametrize("number", range(3))
def test_300_configs(number):
    run(number, 100)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10, 20))
def test_10000_configs(number):
    run(number, 1000)
