"""Gradients: truncation, supervision of passes, checkpointing, precision, and micro-batches."""

import pytest
import torch
from conftest import BOS, assert_close, build, each_cell, gradients, tiny, tokens, with_weights_of
from torch.nn import functional as F

from feedback_transformers import (
    PRESETS,
    FeedbackCache,
    FeedbackForCausalLM,
    FeedbackForConditionalGeneration,
    FeedbackForMaskedLM,
    FeedbackForTokenClassification,
)
from feedback_transformers.models.feedback_names import RECURRENT_TYPES

TIME = {"feedback_axis": "time"}


def assert_same_gradients(actual: dict, expected: dict, tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], atol=tolerance, rtol=1e-4, msg=lambda m, n=name: n + m
        )


def differ(actual: dict, expected: dict) -> bool:
    return any((actual[name] - expected[name]).abs().max() > 1e-4 for name in expected)


@each_cell
@pytest.mark.parametrize("solver", ["depth", "time", "jacobi"])
def test_gradient_steps(cell, solver):
    """Truncation changes the gradient and not the output, and truncation at the full length is no truncation."""
    fields = {"feedback_type": cell, "num_feedback_steps": 4, "encoder_type": "cnn", "decoder_type": "mlp"}
    if solver != "depth":
        fields.update(feedback_axis="time")
    if solver == "jacobi":
        fields.update(solver="jacobi", solver_steps=4)
    batch, full = tokens(2, 8), build(**fields)
    expected = gradients(full, batch)
    for steps, same in ((1, False), (2, False), (8, True)):
        model = with_weights_of(full, gradient_steps=steps, **fields)
        assert_close(model(batch).logits, full(batch).logits, 1e-6)
        actual = gradients(model, batch)
        assert differ(actual, expected) is not same
        if same:
            assert_same_gradients(actual, expected)


def test_gradient_of_the_last_pass_alone():
    """gradient_steps=1 on the depth axis against the same pass written out."""
    model, batch = build(gradient_steps=1, feedback_type="mlp"), tokens(2, 6)
    actual = gradients(model, batch)
    model.zero_grad()
    base = model.model
    context, _ = base.make_context(base.embeddings(batch).x, None, None, None)
    e = base.encode(base.embeddings(batch).x, context)
    signal = None
    for step in range(3):
        with torch.set_grad_enabled(step == 2):
            h, _ = base.loop.step(e, signal, None, context, step)
            signal = h
    logits = model.lm_head(base.decode(h, context))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
    assert_same_gradients(actual, {name: parameter.grad for name, parameter in model.named_parameters()})


@pytest.mark.parametrize("fields", [{}, {"feedback_axis": "time", "solver": "jacobi", "solver_steps": 3}])
def test_supervision_of_all_steps(fields):
    model, batch = build(supervision="all", **fields).train(), tokens()
    outputs = model(batch, labels=batch)
    losses = [
        F.cross_entropy(model.lm_head(y)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        for y in outputs.feedback_states
    ]
    assert len(losses) == 3
    assert_close(outputs.loss, torch.stack(losses).mean(), 1e-6)
    model.config.gradient_steps = 2
    assert_close(model(batch, labels=batch).loss, torch.stack(losses[1:]).mean(), 1e-6)
    evaluated = model.eval()(batch, labels=batch)
    assert evaluated.feedback_states is None
    assert_close(evaluated.loss, losses[-1], 1e-6)


def test_a_padding_token_that_is_real():
    """As where the token that ends a text pads too: an embedding of zero would make gradients infinite."""
    model, batch = build(num_feedback_layers=2, num_feedback_steps=12, pad_token_id=5).train(), tokens()
    batch[:, 0] = 5
    found, other = gradients(model, batch), gradients(model, torch.where(batch == 5, 6, batch))
    sizes = [torch.stack([g.norm() for g in each.values()]).norm().item() for each in (found, other)]
    assert sizes[0] < 3 * sizes[1]


@each_cell
@pytest.mark.parametrize("signal", ["state", "output"])
@pytest.mark.parametrize("axis", ["time", "depth", "jacobi"])
def test_gradient_checkpointing(cell, signal, axis):
    fields = {
        "feedback_axis": "depth" if axis == "depth" else "time",
        "solver": "jacobi" if axis == "jacobi" else "sequential",
    }
    plain = build(feedback_type=cell, feedback_signal=signal, **fields).train()
    checkpointed = with_weights_of(plain, feedback_type=cell, feedback_signal=signal, **fields).train()
    checkpointed.activation_checkpointing_enable()
    assert checkpointed.is_activation_checkpointing
    assert_same_gradients(gradients(checkpointed, tokens()), gradients(plain, tokens()))


@pytest.mark.parametrize("fields", [{}, {"feedback_type": "gru", "gradient_steps": 17}, {**TIME, "solver": "jacobi"}])
def test_gradient_checkpointing_of_many_passes(fields):
    """Segments of passes give the same gradients, through dropout too, and keep less than a state a pass."""
    fields = {"dropout": 0.1, "num_feedback_steps": 19, "solver_steps": 19, "num_decoder_layers": 0, **fields}
    plain, checkpointed, batch = build(**fields).train(), build(**fields).train(), tokens()
    checkpointed.activation_checkpointing_enable()
    saved, results = [], []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        results.append(gradients(model, batch))
        kept = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.add(t.data_ptr()), t)[1], lambda t: t
        ):
            loss = model(batch, labels=batch).loss
        saved.append(len(kept))
        del loss
    assert_same_gradients(*results)
    assert saved[1] < saved[0] / 2


@pytest.mark.parametrize("name", ["shared-memory", "recurrent-depth", "supervised-loop"])
def test_gradient_checkpointing_of_presets(name):
    config = tiny(**{**PRESETS[name], "is_causal": True})
    plain, checkpointed = FeedbackForCausalLM(config).train(), FeedbackForCausalLM(config).train()
    checkpointed.load_state_dict(plain.state_dict())
    checkpointed.activation_checkpointing_enable()
    assert_same_gradients(gradients(checkpointed, tokens()), gradients(plain, tokens()))


def test_gradient_checkpointing_refuses_a_cache():
    model = build().train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="leave them out, or disable it"):
        model(tokens(), past_key_values=FeedbackCache())
    assert model(tokens(), use_cache=True).past_key_values is None


LOSSES = {
    FeedbackForCausalLM: {},
    FeedbackForMaskedLM: {"is_causal": False},
    FeedbackForTokenClassification: {"num_labels": 50},
    FeedbackForConditionalGeneration: {"is_encoder_decoder": True, "decoder_start_token_id": BOS},
}


@pytest.mark.parametrize("head", LOSSES, ids=lambda head: head.__name__)
@pytest.mark.parametrize("supervision", ["last", "all"])
def test_unequal_micro_batches_give_the_gradient_of_the_big_batch(head, supervision):
    model, batch = build(head, supervision=supervision, **LOSSES[head]), tokens(4, 12)
    labels = batch.clone()
    labels[0, 3:], labels[1, 9:] = -100, -100
    count = (labels[:, 1:] if head is FeedbackForCausalLM else labels).ne(-100).sum()
    model(batch, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        model(batch[rows], labels=labels[rows], num_items_in_batch=count).loss.backward()
    assert_same_gradients({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"feedback_type": "gru", "feedback_axis": "time", "feedback_interval": 100},
        {"feedback_type": "lstm", "feedback_axis": "time", "feedback_interval": 100},
        {"feedback_type": "diagonal_gru", "feedback_axis": "time", "feedback_interval": 100},
        {"feedback_type": "transformer", "feedback_axis": "time", "feedback_interval": 500},
        {"feedback_type": "transformer", "feedback_axis": "depth"},
        {"feedback_type": "lstm", "feedback_axis": "depth"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_bf16_autocast_over_2000_positions(fields):
    model = build(encoder_type="cnn", decoder_type="mlp", max_position_embeddings=2000, **fields).train()
    batch = tokens(1, 2000)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch, labels=batch, use_cache=True)
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    cell = fields["feedback_type"]
    if cell in RECURRENT_TYPES and fields["feedback_axis"] == "time":
        states = [state for slot, state in outputs.past_key_values.states.items() if "cell" in slot]
        assert states and all(part.dtype == torch.float32 for state in states for part in state)
    exact = model.eval()(batch, labels=batch).loss
    assert_close(outputs.loss, exact, 0.05)


@pytest.mark.parametrize("cell", RECURRENT_TYPES)
def test_state_stays_float32_in_a_bfloat16_model(cell):
    model = build(feedback_type=cell, feedback_axis="time").to(torch.bfloat16)
    outputs = model(tokens(), use_cache=True)
    states = [state for slot, state in outputs.past_key_values.states.items() if "cell" in slot]
    assert states and all(part.dtype == torch.float32 for state in states for part in state)
    assert outputs.logits.dtype == torch.bfloat16


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant=True"):
        build().activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
