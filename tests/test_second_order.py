"""Gradients of gradients: right through every fast path, or refused."""

import pytest
import torch
from conftest import BOS, build, tokens
from test_layers import SIZE, make_recurrence, make_state
from test_scan import each_diagonal, each_recurrence, way  # noqa: F401  (the fixture)
from torch.autograd import gradgradcheck

from feedback_transformers import FeedbackForConditionalGeneration
from feedback_transformers.models import feedback_scan
from feedback_transformers.models.feedback_gradients import DeferredWeightGradients
from feedback_transformers.models.feedback_newton import newton
from feedback_transformers.models.feedback_scan import RECURRENCES, linear_scan, linear_scan_reference, scan_reference
from feedback_transformers.models.feedback_scan import scan as fast_scan


def second_order(function, cell, x, mask=None, reverse=False):
    """The gradients of |gradients|² with respect to everything, of two calls in turn: the second begins where the
    first ends, so that its state depends on the weights too."""
    x = x.clone().requires_grad_()
    state = make_state(cell)
    leaves = [x, *state, *cell.parameters()]
    h, middle = function(cell, x, state, mask, reverse)
    # not contiguous, as a slice of a batch may be
    again, end = function(cell, x.mul(0.5).transpose(0, 1).contiguous().transpose(0, 1), middle, mask, reverse)
    loss = h.square().sum() + (again**3).sum() + sum(part.sum() for part in end)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@each_recurrence
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_penalty_of_the_gradient(kind, reverse, padded, way):  # noqa: F811
    """Against the walk written out, whose derivatives are torch's own."""
    cell, x = make_recurrence(kind), torch.randn(3, 7, SIZE)
    mask = torch.rand(3, 7) < 0.6 if padded else None
    results = []
    for function in (fast_scan, scan_reference):
        torch.manual_seed(1)
        results.append(second_order(function, cell, x, mask, reverse))
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("reverse", [False, True])
def test_linear_scan(reverse, way):  # noqa: F811
    results = []
    for function in (linear_scan, linear_scan_reference):
        torch.manual_seed(1)
        a, b, start = (torch.rand(shape).requires_grad_() for shape in ((2, 5, 3), (2, 5, 3), (2, 3)))
        first = torch.autograd.grad((function(a, b, start, reverse) ** 3).sum(), (a, b, start), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (a, b, start), create_graph=True)
        results.append([*second, *torch.autograd.grad(sum(g.sum() for g in second), (a, b, start))])  # and third ones
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(RECURRENCES))
def test_in_float64(kind):
    """A float64 model keeps float64 states, so that finite differences of the gradients agree."""
    cell = make_recurrence(kind).double()
    x = torch.randn(1, 3, SIZE, dtype=torch.float64, requires_grad=True)
    state = cell.initial_state(x[:, 0])
    assert {part.dtype for part in state} == {torch.float64}
    assert gradgradcheck(lambda x: fast_scan(cell, x, state)[0], x)


@each_diagonal
def test_newton_refuses(kind, way):  # noqa: F811
    cell, x = make_recurrence(kind), torch.randn(2, 6, SIZE, requires_grad=True)
    h, _, _ = newton(cell, x, cell.initial_state(x[:, 0]))
    with pytest.raises(RuntimeError, match="set config.solver='sequential', which computes the same"):
        torch.autograd.grad(h.square().sum(), x, create_graph=True)
    double = make_recurrence(kind).double()
    x = x.detach().double()
    exact = scan_reference(double, x, double.initial_state(x[:, 0]))[0]
    assert (newton(double, x, double.initial_state(x[:, 0]), tolerance=1e-12)[0] - exact).abs().max() < 1e-11


TIME = {"feedback_axis": "time", "encoder_type": "cnn", "decoder_type": "mlp"}
MODELS = [
    *({**TIME, "feedback_type": kind, "feedback_signal": "none"} for kind in RECURRENCES),
    *({**TIME, "feedback_type": kind, "feedback_signal": "state"} for kind in RECURRENCES),  # deferred gradients
    {**TIME, "feedback_type": "mlp", "feedback_signal": "output", "encoder_type": "rnn", "decoder_type": "rnn"},
    {**TIME, "feedback_type": "transformer", "solver": "jacobi", "encoder_type": "rnn"},
    {"feedback_type": "min_gru", "encoder_type": "rnn", "decoder_type": "rnn", "num_feedback_steps": 2},
    {"encoder_type": "rnn", "is_encoder_decoder": True, "decoder_start_token_id": BOS},
]


@pytest.mark.parametrize("fields", MODELS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_penalty_of_a_model(fields, monkeypatch):
    """With kernels and deferred weight gradients, against plain torch."""
    head = {"head": FeedbackForConditionalGeneration} if fields.get("is_encoder_decoder") else {}
    model, batch = build(**head, **fields).train(), tokens(2, 9)
    model.set_attn_implementation("eager")  # torch's fused attention has no second derivative

    def penalty():
        weights = list(model.parameters())
        first = torch.autograd.grad(model(batch, labels=batch).loss, weights, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), weights, allow_unused=True)

    fast = penalty()
    monkeypatch.setattr(feedback_scan, "_kernels", dict)
    monkeypatch.setattr(feedback_scan, "can_fuse", lambda cell, x: False)
    monkeypatch.setattr(DeferredWeightGradients, "takes", staticmethod(lambda *given: False))
    for (name, _), a, b in zip(model.named_parameters(), fast, penalty(), strict=True):
        assert (a is None) == (b is None), name
        assert a is None or (a - b).abs().max() <= 1e-3 * max(b.abs().max(), 1e-3), name
