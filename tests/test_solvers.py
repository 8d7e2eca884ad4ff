"""Solvers of the time axis against the sequential one, and the gradients of its loop."""

import pytest
import torch
from conftest import assert_close, build, each_cell, gradients, pad, tokens, with_weights_of
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from feedback_transformers import (
    PRESETS,
    FeedbackForMaskedLM,
)
from feedback_transformers.models.feedback_gradients import DeferredWeightGradients, Ledger
from feedback_transformers.models.feedback_names import DIAGONAL_TYPES

TIME = {"feedback_axis": "time"}
BLOCKS = {**TIME, "solver": "gauss_seidel"}


def assert_agree(actual, expected, batch) -> None:
    """Logits and all gradients to 1e-5."""
    assert_close(actual(batch).logits, expected(batch).logits, 1e-5)
    theirs = gradients(expected, batch)
    for name, gradient in gradients(actual, batch).items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@each_cell
@pytest.mark.parametrize("signal", ["state", "output"])
@pytest.mark.parametrize(("interval", "block"), [(1, 1), (1, 4), (2, 4), (3, 4), (4, 2), (3, 2), (5, 3), (1, 64)])
def test_gauss_seidel_equals_sequential(cell, signal, interval, block):
    """A block needs as many passes as it has chunks, and the blocks before it those as well: blocks of one
    position need a single pass, one block of all positions is Jacobi's iteration."""
    fields = {"feedback_type": cell, "feedback_signal": signal, "feedback_interval": interval}
    sequential, batch = build(**TIME, **fields), tokens(2, 9)
    passes = 1 if block == 1 else 9
    blocks = with_weights_of(sequential, **BLOCKS, solver_block_size=block, solver_steps=passes, **fields)
    assert_agree(blocks, sequential, batch)


@pytest.mark.parametrize("solver", ["jacobi", "sequential"])
def test_a_solver_may_be_changed_on_a_model(solver):
    """As it says itself where passes are asked for that it does not make."""
    model = build(**TIME, feedback_connection="memory", solver=solver, solver_steps=13)
    other = with_weights_of(model, **TIME, feedback_connection="memory", solver_steps=13)
    for name in ("jacobi", "sequential"):
        model.config.solver = name
        assert_close(model(tokens()).logits, other(tokens()).logits, 1e-5)


def test_shared_memory_within_a_window():
    """Jacobi's passes see as far back as position by position."""
    fields = {
        **TIME,
        "feedback_connection": "memory",
        "backbone_config": {"model_type": "mistral", "sliding_window": 3},
    }
    sequential, batch = build(**fields), tokens()
    passes = with_weights_of(sequential, **fields, solver="jacobi", solver_steps=13)
    whole = with_weights_of(sequential, **{**fields, "backbone_config": "mistral"})
    assert_close(passes(batch).logits, sequential(batch).logits, 1e-5)
    assert (whole(batch).logits - sequential(batch).logits).abs().max() > 1e-3
    first = passes(batch[:, :6], use_cache=True)
    rest = passes(batch[:, 6:], past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, rest.logits], dim=1), sequential(batch).logits, 1e-5)


def test_more_steps_of_gradient_than_passes():
    fields = {**TIME, "solver": "jacobi", "solver_steps": 6, "solver_tolerance": 1.0}
    made = [build(**fields, gradient_steps=steps)(tokens()).num_feedback_steps.max() for steps in (None, 6, 7)]
    assert made[0] == made[1] == made[2] < 6


@pytest.mark.parametrize("fields", [{}, {"solver": "jacobi", "solver_steps": 3}])
def test_every_weight_has_a_gradient_with_a_truncated_one(fields):
    """DDP waits for each."""
    model = build(**TIME, feedback_connection="memory", gradient_steps=1, **fields).train()
    model(tokens(), labels=tokens()).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@each_cell
def test_gauss_seidel_of_a_bidirectional_model(cell):
    """Only its loop goes along time, so blocks remember the blocks before them without a cache of the caller."""
    fields = {"is_causal": False, "feedback_type": cell}
    sequential, batch = build(FeedbackForMaskedLM, **TIME, **fields), tokens(2, 9)
    blocks = with_weights_of(sequential, **BLOCKS, solver_block_size=4, solver_steps=9, **fields)
    assert_agree(blocks, sequential, batch)


@pytest.mark.parametrize("layers", [1, 3])
def test_jacobi_of_the_shared_memory(layers):
    """As many passes as positions are exact; one pass reads no memory."""
    fields = {**PRESETS["shared-memory"], "num_feedback_layers": layers}
    sequential, batch = build(**fields), tokens(2, 9)
    passes = with_weights_of(sequential, **fields, solver="jacobi", solver_steps=9)
    assert_agree(passes, sequential, batch)
    assert (passes(batch, num_feedback_steps=1).logits - sequential(batch).logits).abs().max() > 1e-2
    early = with_weights_of(sequential, **fields, solver="jacobi", solver_steps=30, solver_tolerance=1e-7)
    assert_agree(early, sequential, batch)


@each_cell
def test_gauss_seidel_needs_fewer_passes(cell):
    """Blocks of 4 positions are exact after 4 passes, where one block of 12 still is not."""
    sequential, batch = build(**TIME, feedback_type=cell), tokens(2, 12)
    expected = sequential(batch).logits
    blocks = with_weights_of(sequential, **BLOCKS, solver_block_size=4, solver_steps=4, feedback_type=cell)
    jacobi = with_weights_of(sequential, **TIME, solver="jacobi", solver_steps=4, feedback_type=cell)
    first = slice(0, 4)
    assert_close(blocks(batch).logits[:, first], expected[:, first], 1e-5)
    error = (blocks(batch).logits - expected).abs().max()
    assert error < (jacobi(batch).logits - expected).abs().max()


@each_cell
@pytest.mark.parametrize("solver", ["jacobi", "gauss_seidel"])
def test_tolerance_stops_the_passes(cell, solver):
    """At a tolerance the result is the sequential one, after fewer passes than allowed, and their number is told."""
    fields = {**TIME, "feedback_type": cell, "initializer_range": 0.05}
    sequential, batch = build(**fields), tokens(2, 24)
    fields |= {"solver": solver, "solver_block_size": 6, "solver_steps": 60}
    solved = with_weights_of(sequential, solver_tolerance=1e-7, **fields)
    assert_agree(solved, sequential, batch)
    exact = solved(batch).num_feedback_steps
    rough = with_weights_of(sequential, solver_tolerance=1e-2, **fields)(batch).num_feedback_steps
    assert exact.shape == rough.shape == batch.shape
    assert exact.unique().numel() == rough.unique().numel() == 1
    assert 1 < rough[0, 0] < exact[0, 0] < 60


@pytest.mark.parametrize("cell", DIAGONAL_TYPES)
def test_newton_equals_sequential(cell):
    """Also behind padding and in two chunks; the number of its iterations is told, fewer than there are positions."""
    fields = {**TIME, "feedback_type": cell, "feedback_signal": "none", "num_feedback_layers": 2}
    sequential, batch = build(**fields), tokens(2, 29)
    newton = with_weights_of(sequential, solver="newton", solver_tolerance=1e-7, **fields)
    assert_agree(newton, sequential, batch)
    assert 1 <= newton(batch).num_feedback_steps.max() < 29
    padded, mask = pad(batch, [29, 20], "left")
    assert_close(
        newton(padded, attention_mask=mask).logits[:, 3:], sequential(padded, attention_mask=mask).logits[:, 3:]
    )
    first = newton(batch[:, :17], use_cache=True)
    second = newton(batch[:, 17:], past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, second.logits], dim=1), sequential(batch).logits, 1e-5)


def test_truncated_gradient_after_convergence():
    """The passes with a gradient are made although the passes without had converged."""
    fields = {**TIME, "solver": "jacobi", "solver_steps": 40, "gradient_steps": 3}
    plain, batch = build(**fields), tokens(2, 12)
    early = with_weights_of(plain, solver_tolerance=1e-6, **fields)
    assert early(batch, use_cache=False).num_feedback_steps.max() < 40
    expected = gradients(plain, batch)
    for name, gradient in gradients(early, batch).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2


# Weight gradients of all positions at once


@each_cell
@pytest.mark.parametrize("signal", ["state", "output"])
@pytest.mark.parametrize("peft", [False, True])
def test_deferred_weight_gradients(cell, signal, peft):
    """The same gradients, adapters included, from a single product for each weight."""
    model, batch = build(**TIME, feedback_type=cell, feedback_signal=signal), tokens()
    if peft:
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")).train()
    products = []
    with pytest.MonkeyPatch.context() as patch:
        sum_gradients = Ledger.sum_gradients
        patch.setattr(
            Ledger,
            "sum_gradients",
            lambda ledger: (products.append(len(ledger.inputs)), sum_gradients(ledger))[1],
        )
        if peft:
            model(batch, labels=batch).loss.backward()
            actual = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        else:
            actual = gradients(model, batch)
    assert products and max(products) == batch.shape[1]
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeferredWeightGradients, "takes", staticmethod(lambda *args: False))
        model(batch, labels=batch).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(actual[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_deferred_twice():
    """Two backward passes through one graph add up to twice the gradient."""
    model, batch = build(**TIME), tokens()
    expected = gradients(model, batch)
    model.zero_grad()
    loss = model(batch, labels=batch).loss
    loss.backward(retain_graph=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_deferred_after_other_gradients():
    """What a backward for the inputs alone has left is not added to the next one's, nor kept alive by itself."""
    model, batch = build(**TIME), tokens()
    embedded = model.get_input_embeddings()(batch).detach().requires_grad_()

    def loss():
        return model(inputs_embeds=embedded, labels=batch).loss

    parameters = dict(model.model.loop.named_parameters())
    expected = torch.autograd.grad(loss(), list(parameters.values()))
    again = loss()
    torch.autograd.grad(again, embedded, retain_graph=True)
    torch.autograd.grad(again, model.model.loop.connection.gate_proj.bias, retain_graph=True)
    for name, *pair in zip(parameters, torch.autograd.grad(again, list(parameters.values())), expected, strict=True):
        torch.testing.assert_close(*pair, msg=name)


@pytest.mark.parametrize("transform", ["twice", "func"])
def test_deferred_gradients_of_gradients(transform):
    """As without deferring: the gradient of a penalty on the gradient, and torch.func."""
    model, batch = build(**TIME, feedback_type="mlp", decoder_type="mlp", encoder_type="cnn"), tokens()
    parameters = dict(model.named_parameters())

    def loss(weights):
        arguments = {"labels": batch, "use_cache": False}
        return torch.func.functional_call(model, weights, (batch,), arguments).loss

    def run():
        if transform == "func":
            return torch.func.grad(loss)(parameters)
        first = torch.autograd.grad(loss(parameters), list(parameters.values()), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        return dict(zip(parameters, torch.autograd.grad(penalty, list(parameters.values())), strict=True))

    actual = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeferredWeightGradients, "takes", staticmethod(lambda *args: False))
        expected = run()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_deferred_weight_with_two_biases():
    weight, *biases = (torch.randn(*shape, requires_grad=True) for shape in ((3, 4), (3,), (3,)))
    x = torch.randn(2, 4)
    with DeferredWeightGradients():
        actual = [F.linear(x, weight, bias) for bias in biases]
    for y, bias in zip(actual, biases, strict=True):
        assert_close(y, F.linear(x, weight, bias), 1e-6)
    sum(y.square().sum() for y in actual).backward()
    assert_close(weight.grad, sum(2 * y.detach().t() @ x for y in actual), 1e-5)
