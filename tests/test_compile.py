"""torch.compile and torch.export: what they make computes what the model does."""

import pytest
import torch
from conftest import assert_close, build, each_cell, pad, tokens
from test_heads import HEADS
from test_modeling import HALTING

from feedback_transformers import (
    FeedbackForCausalLM,
    FeedbackForSequenceClassification,
    FeedbackForTimeSeriesPrediction,
    FeedbackForTokenClassification,
)


@each_cell
def test_compiled_pass_equals_eager(cell):
    """The step that the depth axis repeats, in one graph."""
    model = build(feedback_type=cell, decoder_type="mlp")
    base, batch = model.model, tokens(2, 6)
    with torch.no_grad():
        embedded = base.embeddings(batch).x
        context, _ = base.make_context(embedded, None, None, None)
        e = base.encode(embedded, context)
        torch._dynamo.reset()
        one_pass = torch.compile(base.loop.step, fullgraph=True, backend="aot_eager")
        expected, state = base.loop.step(e, e, None, context, 0)
        actual, _ = one_pass(e, e, None, context, 0)
        assert_close(actual, expected, 1e-5)
        expected, _ = base.loop.step(e, expected, state, context, 1)
        actual, _ = one_pass(e, actual, state, context, 1)
        assert_close(actual, expected, 1e-5)


def test_compiled_with_a_mask_equals_eager():
    """In one graph, which can't look at the mask."""
    model = build(decoder_type="mlp")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for side in ("left", "right"):
        batch, mask = pad(tokens(2, 8), [8, 5], side)
        with torch.no_grad():
            expected = model(batch, attention_mask=mask, use_cache=False).logits
            actual = compiled(batch, attention_mask=mask, use_cache=False).logits
        assert_close(actual[mask.bool()], expected[mask.bool()], 1e-5)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("converged", "converged-prediction")]


@pytest.mark.parametrize("halting", [*SLOW, "act"])
def test_compiled_with_halting_equals_eager(halting):
    model, batch = build(**HALTING[halting], num_feedback_steps=5), tokens(2, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(batch)
        actual = torch.compile(model, backend="aot_eager")(batch)
    assert_close(actual.logits, expected.logits, 1e-5)
    assert torch.equal(actual.num_feedback_steps, expected.num_feedback_steps)


@pytest.mark.parametrize(
    "fields", [{"feedback_type": "gru", "feedback_axis": "time"}, {"feedback_type": "transformer"}]
)
def test_compiled_decode_step_equals_eager(fields):
    model, batch = build(decoder_type="mlp", **fields), tokens(2, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        expected = model(batch).logits
        cache = model(batch[:, :7], use_cache=True).past_key_values
        actual = compiled(batch[:, 7:], past_key_values=cache, use_cache=True)
    assert_close(actual.logits, expected[:, 7:], 1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"feedback_axis": "depth"},
        {"feedback_axis": "time", "feedback_type": "gru"},
        {"feedback_axis": "time", "feedback_interval": 2},
        {"feedback_axis": "time", "solver": "gauss_seidel", "solver_block_size": 2},
    ],
    ids=str,
)
def test_exported_equals_eager(fields):
    model, batch, other = build(**fields), tokens(2, 8), tokens(2, 8, start=100)
    exported = torch.export.export(model, (), {"input_ids": batch, "use_cache": False}).module()
    assert_close(exported(input_ids=other, use_cache=False).logits, model(other, use_cache=False).logits, 1e-5)


@pytest.mark.parametrize(
    "head", [FeedbackForCausalLM, FeedbackForTokenClassification, FeedbackForSequenceClassification]
)
def test_exported_with_a_mask_takes_other_sizes(head):
    model = build(head, use_cache=False)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", min=2, max=64)}
    (ids, mask), (other, its_mask) = pad(tokens(3, 8), [8, 5, 6], "left"), pad(tokens(2, 6), [4, 6], "right")
    exported = torch.export.export(
        model,
        (),
        {"input_ids": ids, "attention_mask": mask},
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
    ).module()
    expected = model(other, attention_mask=its_mask).logits
    actual = exported(input_ids=other, attention_mask=its_mask).logits
    assert_close(actual, expected, 1e-5)


@pytest.mark.slow
def test_exported_forecast_takes_other_batches():
    model = build(FeedbackForTimeSeriesPrediction, **HEADS[FeedbackForTimeSeriesPrediction])
    sizes = {"past_values": {0: torch.export.Dim("batch", max=64)}}
    exported = torch.export.export(model, (), {"past_values": torch.randn(3, 10)}, dynamic_shapes=sizes).module()
    past = torch.randn(2, 10)
    assert_close(exported(past_values=past).prediction_outputs, model(past).prediction_outputs, 1e-5)
