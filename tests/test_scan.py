"""The fast recurrences against scan_reference, with the compiled kernels and without, and Newton's method."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close
from minGRU_pytorch import minGRU
from test_layers import LENGTHS, SIZE, make_recurrence, make_state, run
from torch import nn
from transformers.dynamic_module_utils import get_imports

import feedback_transformers.models.feedback_kernels as kernels
from feedback_transformers.models import feedback_newton, feedback_scan
from feedback_transformers.models.feedback_newton import newton
from feedback_transformers.models.feedback_scan import (
    RECURRENCES,
    GRUState,
    RealFirst,
    can_compile,
    kernel,
    kernel_available,
    linear_scan,
    linear_scan_parallel,
    linear_scan_reference,
    scan,
    scan_reference,
)

TOLERANCE = 1e-5
DIAGONAL = ["diagonal_gru", "min_gru"]
each_recurrence = pytest.mark.parametrize("kind", list(RECURRENCES))
each_fused = pytest.mark.parametrize("kind", [kind for kind, cell in RECURRENCES.items() if cell.fused is not None])
each_diagonal = pytest.mark.parametrize("kind", DIAGONAL)


@pytest.fixture(params=["kernels", "plain"])
def way(request, monkeypatch) -> str:
    """With numba, and as if it were not installed."""
    if request.param == "plain":
        monkeypatch.setattr(feedback_scan, "_kernels", dict)
    assert kernel_available() == (request.param == "kernels")
    return request.param


def assert_equal(actual, expected) -> None:
    """Of results of `run`; gradients of weights are sums over all positions, so their size sets the scale."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, TOLERANCE * max(1.0, e.abs().max().item()))


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_single_step_by_the_cell_of_torch(kind, monkeypatch):
    """As decoding makes them, one after the other; with padding or adapters it is the step written out."""
    cell, x, calls = make_recurrence(kind), torch.randn(3, 5, SIZE), []
    start = make_state(cell)
    expected = scan_reference(cell, x, start)
    native = cell.native_step
    monkeypatch.setattr(cell, "native_step", lambda *given: calls.append(given) or native(*given))
    with torch.no_grad():
        state, h = start, []
        for t in range(5):
            y, state = scan(cell, x[:, t : t + 1], state)
            h.append(y)
        assert len(calls) == 5
        assert_close(torch.cat(h, dim=1), expected[0], 1e-6)
        for part, other in zip(state, expected[1], strict=True):
            assert_close(part, other, 1e-6)
        cell.state_proj.register_forward_hook(lambda *given: None)
        scan(cell, x[:, :1], start)
    scan(cell, x[:, :1], start)
    assert len(calls) == 5


def poisoned(lengths: list[int], length: int):
    """Inputs and a mask with the padding last, where the inputs are huge."""
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    x = torch.randn(len(lengths), length, SIZE)
    return torch.where(mask[..., None], x, torch.full_like(x, 1e4)), mask


@each_recurrence
@pytest.mark.parametrize("length", [*LENGTHS, 129])
@pytest.mark.parametrize("reverse", [False, True])
def test_all_gradients(kind, length, reverse, way):
    cell, x = make_recurrence(kind), torch.randn(3, length, SIZE)
    state = make_state(cell)
    expected = run(scan_reference, cell, x, state, reverse=reverse)
    assert_equal(run(scan, cell, x, state, reverse=reverse), expected)


@each_recurrence
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [[9, 4, 1], [9, 0, 7], [6, 5, 5]])
def test_padded_batches(kind, reverse, lengths, way):
    """All outputs, those at padding too, and all gradients; a row of padding alone keeps its state."""
    cell, (x, mask) = make_recurrence(kind), poisoned(lengths, 9)
    state = make_state(cell)
    expected = run(scan_reference, cell, x, state, mask=mask, reverse=reverse)
    assert_equal(run(scan, cell, x, state, mask=mask, reverse=reverse), expected)


@each_recurrence
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_anywhere(kind, reverse, way):
    cell, x, mask = make_recurrence(kind), torch.randn(3, 11, SIZE), torch.rand(3, 11) < 0.6
    state = make_state(cell)
    expected = run(scan_reference, cell, x, state, mask=mask, reverse=reverse)
    assert_equal(run(scan, cell, x, state, mask=mask, reverse=reverse), expected)


@each_fused
def test_nothing_walks_in_python(kind, way, monkeypatch):
    """Padded or not, a recurrence with a fast way takes it; without numba, all but one that torch has nothing for."""

    def refuse(*args):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(feedback_scan, "scan_reference", refuse)
    cell, (x, mask) = make_recurrence(kind), poisoned([9, 4, 1], 9)
    state = make_state(cell)
    if (kind, way) == ("diagonal_gru", "plain"):
        with pytest.raises(AssertionError, match="the reference ran"):
            scan(cell, x, state)
    else:
        scan(cell, x, state)
        scan(cell, x, state, mask, reverse=True)


def test_real_first():
    """The order of the walk, real positions first, and back."""
    x, mask = torch.arange(1.0, 5.0)[None, :, None], torch.tensor([[True, False, True, False]])
    real = RealFirst(x, mask, reverse=True)  # walks 4, 3, 2, 1, of which 3 and 1 are real
    assert real.x.flatten().tolist() == [3, 1, 0, 0]
    assert real.padding.flatten().tolist() == [False, False, True, True]
    assert real.restore(real.x, torch.tensor([[9.0]])).flatten().tolist() == [1, 3, 3, 9]


# The kernels


@pytest.mark.parametrize("mine", ["exp", "sigmoid", "tanh"])
def test_elementary_functions(mine):
    """Over all that float32 gates can be, infinite too; NaN is not hidden."""
    theirs = getattr(torch, mine)
    x = torch.cat([torch.linspace(-86, 86, 4001), torch.linspace(-2, 2, 4001), torch.tensor([0.0])])
    actual = torch.tensor([getattr(kernels, mine)(value) for value in x.numpy()])
    expected = theirs(x.double())
    if mine == "exp":
        actual, expected = actual / expected, torch.ones_like(expected)
    assert_close(actual.double(), expected, 3e-7)
    if mine != "exp":
        extreme = torch.tensor([float("inf"), float("-inf"), 1e30, -1e30])
        assert_close(torch.tensor([getattr(kernels, mine)(value) for value in extreme.numpy()]), theirs(extreme), 1e-7)
    assert torch.tensor(getattr(kernels, mine)(torch.tensor(float("nan")).numpy()[()])).isnan()


@pytest.mark.parametrize("kind", ["gru", "diagonal_gru", "min_gru"])
def test_what_the_kernels_are_given(kind, way):
    """Views of any strides; gradients that are expanded; a second backward through the same graph."""
    cell = make_recurrence(kind)
    x = torch.randn(7, 3, SIZE).transpose(0, 1).requires_grad_()
    state = GRUState(torch.randn(SIZE, 3).t())
    mask = torch.tensor([[True] * 3, [True] * 2 + [False], [True] * 3] * 3)[:7].t()

    def gradients(function):
        x.grad = None
        total = function(cell, x, state, mask)[0].sum()
        total.backward(retain_graph=True)
        total.backward()
        return x.grad

    assert_close(gradients(scan), gradients(scan_reference), TOLERANCE)


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"
)  # a trace is of one length
def test_what_does_not_go_to_a_kernel():
    """Other types, tensors without memory, and whatever follows the operations of torch."""
    x = torch.randn(2, 5, SIZE)
    assert kernel("linear_scan", x) is not None
    for other in (x.double(), x.to("meta"), x.bfloat16()):
        assert kernel("linear_scan", x, other) is None
    cell = make_recurrence("diagonal_gru")
    state = cell.initial_state(x[:, 0])
    assert can_compile(cell, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_compile(cell, x)
    hooked = make_recurrence("diagonal_gru")
    hooked.diagonal.register_forward_hook(lambda module, args, output: output + 1)
    assert not can_compile(hooked, x)
    changed = make_recurrence("diagonal_gru")
    nn.utils.parametrizations.weight_norm(changed.diagonal)
    assert not can_compile(changed, x)
    assert_close(scan(changed, x, state)[0], scan_reference(changed, x, state)[0])
    expected = scan(cell, x, state)[0]
    each_row = torch.func.vmap(lambda row: scan(cell, row[None], cell.initial_state(row[None, 0]))[0][0])
    assert_close(each_row(x), expected, TOLERANCE)
    cell.requires_grad_(False)
    traced = torch.jit.trace(lambda x: scan(cell, x, state)[0], x)
    assert_close(traced(x + 1), scan(cell, x + 1, state)[0], TOLERANCE)


def test_what_the_projections_are_does_not_matter():
    """The kernels of the diagonal GRU and the linear scan start from the gates: an adapter there is heard."""
    for kind in DIAGONAL:
        cell, x = make_recurrence(kind), torch.randn(2, 5, SIZE)
        state = make_state(cell, 2)
        before = scan(cell, x, state)[0]
        cell.input_proj.register_forward_hook(lambda module, args, output: output + 1)
        assert_close(scan(cell, x, state)[0], scan_reference(cell, x, state)[0], TOLERANCE)
        assert (scan(cell, x, state)[0] - before).abs().max() > 0.01


def test_import_leaves_numba_alone():
    """Who does not compute does not wait for it, and the code in a checkpoint asks nobody to install it."""
    code = "import sys, feedback_transformers; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert not {"numba", "llvmlite", "numpy"} & set(get_imports(Path(kernels.__file__)))


# The linear scan


@pytest.mark.parametrize("length", [1, 2, 3, 7, 33, 64])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("function", [linear_scan, linear_scan_parallel])
def test_linear_scan(length, reverse, function):
    def results(function):
        torch.manual_seed(1)
        a, b, start = (torch.randn(shape).requires_grad_() for shape in [(2, length, 5)] * 2 + [(2, 5)])
        with torch.no_grad():
            a.mul_(0.7)
        h = function(a, b, start, reverse)
        (h * torch.randn(h.shape)).sum().backward()
        return [h, a.grad, b.grad, start.grad]

    assert_equal(results(function), results(linear_scan_reference))


def test_linear_scan_runs_in_double_precision():
    a, b, start = (torch.rand(shape, dtype=torch.float64).requires_grad_() for shape in [(1, 5, 2)] * 2 + [(1, 2)])
    assert torch.autograd.gradcheck(linear_scan, (a, b, start))
    assert torch.autograd.gradgradcheck(linear_scan, (a, b, start))


@pytest.mark.parametrize("length", [1, 33])
def test_min_gru_is_that_of_the_paper(length, way):
    """The log-space form of minGRU-pytorch, which starts from zero."""
    cell, theirs, x = make_recurrence("min_gru"), minGRU(SIZE), torch.randn(3, length, SIZE)
    with torch.no_grad():
        cell.input_proj.bias.zero_()
        theirs.to_hidden_and_gate.weight.copy_(cell.input_proj.weight)
    expected, expected_last = theirs(x, return_next_prev_hidden=True)
    h, last = scan(cell, x, cell.initial_state(x[:, 0]))
    assert_close(h, expected, TOLERANCE)
    assert_close(last.h, expected_last[:, 0], TOLERANCE)


# Newton's method


@each_diagonal
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("masked", [False, True])
def test_newton_is_sequential(kind, length, masked, way):
    cell, x = make_recurrence(kind), torch.randn(3, length, SIZE)
    mask = torch.rand(3, length) < 0.7 if masked else None
    state, iterations = make_state(cell), []

    def solved(*args, **arguments):
        h, last, count = newton(*args, **arguments)
        iterations.append(count)
        return h, last

    assert_equal(run(solved, cell, x, state, mask=mask), run(scan_reference, cell, x, state, mask=mask))
    assert iterations[0] <= (1 if kind == "min_gru" else min(length, 8))


def test_newton_is_damped(monkeypatch):
    """Where slopes beyond 1 throw plain Newton off, the damped one arrives in a third of the steps or fewer."""
    cell = RECURRENCES["diagonal_gru"](SIZE)
    nn.init.normal_(cell.input_proj.weight, std=0.4)
    nn.init.normal_(cell.diagonal.weight, std=2.0)
    x, state, warnings = torch.randn(2, 512, SIZE), make_state(cell, 2), []
    monkeypatch.setattr(feedback_newton.logger, "warning_once", warnings.append)
    h, last, iterations = newton(cell, x, state)
    assert not warnings
    expected, expected_last = scan_reference(cell, x, state)
    assert_close(h, expected, 1e-4)  # slopes multiply to more than 1, and with them the rounding
    assert_close(last.h, expected_last.h, 1e-4)

    gates, start = cell.input_proj(x).detach(), state.h.detach()
    plain, undamped = start[:, None].expand(-1, 512, -1), 0
    while not (plain - expected).abs().max() < 1e-4 and undamped < 3 * iterations:
        previous = feedback_newton.before(plain, start)
        made, jacobian = feedback_newton.linearize(cell, gates, previous, None)
        plain, undamped = linear_scan(jacobian, made - jacobian * previous, start), undamped + 1
    assert undamped == 3 * iterations


def test_newton_falls_back_and_says_so(monkeypatch):
    cell, x = make_recurrence("diagonal_gru"), torch.randn(2, 33, SIZE)
    state, warnings = make_state(cell, 2), []
    monkeypatch.setattr(feedback_newton.logger, "warning_once", warnings.append)
    h, last, iterations = newton(cell, x, state, max_iterations=2)
    assert iterations == 2 and len(warnings) == 1 and "did not converge in 2 iterations" in warnings[0]
    expected, expected_last = scan_reference(cell, x, state)
    assert_close(h, expected, TOLERANCE)
    assert_close(last.h, expected_last.h, TOLERANCE)
    newton(cell, x, state)
    assert len(warnings) == 1


def test_newton_wants_single_channels():
    cell, x = make_recurrence("gru"), torch.randn(2, 5, SIZE)
    with pytest.raises(ValueError, match="diagonal_gru or min_gru"):
        newton(cell, x, cell.initial_state(x[:, 0]))
