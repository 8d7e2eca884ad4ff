"""Recurrences h_t = f(x_t, h_{t-1}): one step of each, and the loop over positions.

`scan_reference` is the definition. `scan` computes the same in the fastest safe way: by a kernel of feedback_fused.py
where numba is installed (`kernel_available`), else by torch's own kernel or a formula in plain torch.

Shapes: B batch, T positions, D hidden size, G gates of the recurrence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_feedback import FeedbackConfig
from .feedback_cache import Context, wide
from .feedback_padding import fixed_length, real_first


class GRUState(NamedTuple):
    """State of a GRU."""

    h: Tensor  # [..., D] float32 at least


class LSTMState(NamedTuple):
    """State of an LSTM: its output and its cell."""

    h: Tensor  # [..., D] float32 at least
    c: Tensor  # [..., D] float32 at least


State = Any  # GRUState or LSTMState, as the recurrence has it


class Diagonal(nn.Module):
    """Apply G diagonal matrices to a vector: [..., D] -> [..., G·D]."""

    def __init__(self, size: int, num_gates: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_gates, size))

    def init_parameters(self) -> None:
        init.normal_(self.weight, std=0.5)

    def forward(self, h: Tensor) -> Tensor:
        return (h.unsqueeze(-2) * self.weight).flatten(-2)


class Recurrence(nn.Module):
    """Base of recurrences: a subclass defines `step`, and `num_gates` if it projects its input to more than [..., D].

    `fused` and `native_step` are for those that have a faster way than `step`, position by position; see GRU.
    """

    num_gates = 1
    state_type: Any = GRUState
    fused: Any = None
    native_step: Any = None

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input_proj = nn.Linear(size, self.num_gates * size)

    def initial_state(self, x: Tensor) -> State:
        """Return zeros for inputs [..., D]."""
        return self.state_type(*(wide(torch.zeros_like(x)) for _ in self.state_type._fields))

    def step(self, gates: Tensor, state: State) -> State:
        """Return the state after one step, from the projected input [..., G·D]; its first field is h [..., D]."""
        raise NotImplementedError


class GRU(Recurrence):
    """Gated recurrent unit, Cho et al. 2014 (arXiv:1406.1078), in the form of torch.nn.GRUCell:

    r, z = σ(W x + U h)    n = tanh(W_n x + r ∘ U_n h)    h' = (1 - z) ∘ n + z ∘ h
    """

    num_gates = 3

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.add_state_projection(size)

    def add_state_projection(self, size: int) -> None:
        self.state_proj = nn.Linear(size, self.num_gates * size)

    def project_state(self, h: Tensor) -> Tensor:
        """Return U h: [..., D] -> [..., 3D]."""
        return self.state_proj(h)

    def step(self, gates: Tensor, state: GRUState) -> GRUState:
        """Make one step from the projected input [..., 3D]."""
        r_x, z_x, n_x = gates.chunk(3, dim=-1)
        r_h, z_h, n_h = self.project_state(state.h.to(gates.dtype)).chunk(3, dim=-1)
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        n = torch.tanh(n_x + r * n_h)
        return GRUState(torch.lerp(wide(n), wide(state.h), wide(z)))

    def native_step(self, x: Tensor, state: GRUState) -> GRUState:
        """Make one step from the input [B, D], by torch's cell."""
        return GRUState(torch.gru_cell(x, state.h, *_weights(self)))

    def fused(self, x: Tensor, state: GRUState, mask: Tensor | None, reverse: bool) -> tuple[Tensor, GRUState]:
        """Return h at all positions [B, T, D] and the last state, by our kernel or torch's."""
        weight, bias = self.state_proj.weight, self.state_proj.bias
        if compiled := kernel("gru", x, weight, state.h):
            h = compiled(self.input_proj(x), weight, bias, state.h, mask, reverse)
        else:
            real = RealFirst(x, mask, reverse)
            h, _ = torch.gru(real.x, state.h[None], _weights(self), True, 1, 0.0, torch.is_grad_enabled(), False, True)
            h = real.restore(h, state.h)
        return h, GRUState(last(h, reverse))


class DiagonalGRU(GRU):
    """GRU with diagonal recurrent matrices, so that no channel reads another channel's state."""

    native_step = None  # type: ignore[assignment]

    def add_state_projection(self, size: int) -> None:
        self.diagonal = Diagonal(size, self.num_gates)  # its own name, as PEFT finds its default targets by name

    def project_state(self, h: Tensor) -> Tensor:
        return self.diagonal(h)

    def fused(self, x: Tensor, state: GRUState, mask: Tensor | None, reverse: bool) -> tuple[Tensor, GRUState]:
        """Return h at all positions [B, T, D] and the last state; only where `can_compile` is True."""
        compiled: Any = kernel("diagonal_gru", x)
        h = compiled(self.input_proj(x), self.diagonal.weight, state.h, mask, reverse)
        return h, GRUState(last(h, reverse))


class MinGRU(GRU):
    """minGRU, Feng et al. 2024 (arXiv:2410.01201), with the candidate of its appendix B.3:

    z = σ(W_z x)    n = g(W_n x)    h' = (1 - z) ∘ h + z ∘ n    g(x) = x + 1/2 for x >= 0, else σ(x)

    No gate reads the state, so the step is linear in h, and all positions can be solved at once.
    """

    num_gates = 2
    native_step = None  # type: ignore[assignment]

    def add_state_projection(self, size: int) -> None:
        """Add nothing: no gate reads the state."""

    def coefficients(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and b of h' = a ∘ h + b, in float32 at least: [..., 2D] -> twice [..., D]."""
        n_x, z_x = gates.chunk(2, dim=-1)
        n = wide(torch.where(n_x >= 0, n_x + 0.5, torch.sigmoid(n_x)))
        z = wide(torch.sigmoid(z_x))
        return 1 - z, z * n

    def step(self, gates: Tensor, state: GRUState) -> GRUState:
        """Make one step from the projected input [..., 2D]."""
        a, b = self.coefficients(gates)
        return GRUState(a * state.h + b)

    def fused(self, x: Tensor, state: GRUState, mask: Tensor | None, reverse: bool) -> tuple[Tensor, GRUState]:
        """Return h at all positions [B, T, D] and the last state, by a linear scan."""
        gates = self.input_proj(x)
        if compiled := kernel("min_gru", gates, state.h):
            h = compiled(gates, state.h, mask, reverse)
        else:
            a, b = self.coefficients(gates)
            if mask is not None:
                a, b = a.masked_fill(~mask[..., None], 1.0), b.masked_fill(~mask[..., None], 0.0)
            h = linear_scan(a, b, state.h, reverse)
        return h.to(x.dtype), GRUState(last(h, reverse))


class LSTM(Recurrence):
    """Long short-term memory, Hochreiter & Schmidhuber 1997, in the form of torch.nn.LSTMCell:

    i, f, o = σ(W x + U h)    c' = f ∘ c + i ∘ tanh(W_g x + U_g h)    h' = o ∘ tanh(c')
    """

    num_gates = 4
    state_type: Any = LSTMState

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.state_proj = nn.Linear(size, self.num_gates * size)

    def step(self, gates: Tensor, state: LSTMState) -> LSTMState:
        """Make one step from the projected input [..., 4D]."""
        i, f, g, o = wide(gates + self.state_proj(state.h.to(gates.dtype))).chunk(4, dim=-1)
        c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
        return LSTMState(torch.sigmoid(o) * torch.tanh(c), c)

    def native_step(self, x: Tensor, state: LSTMState) -> LSTMState:
        """Make one step from the input [B, D], by torch's cell."""
        return LSTMState(*torch.lstm_cell(x, state, *_weights(self)))

    def fused(self, x: Tensor, state: LSTMState, mask: Tensor | None, reverse: bool) -> tuple[Tensor, LSTMState]:
        """Return h at all positions [B, T, D] and the last state, by torch's kernel."""
        real, weights = RealFirst(x, mask, reverse), _weights(self)
        if mask is not None:
            # The kernel returns c after padding too. One more input, 1 at padding, keeps c from there on: it moves the
            # forget gate to σ(1e4), exactly 1, and the input gate to σ(-1e4), exactly 0.
            real.x = torch.cat([real.x, real.padding.to(x.dtype)], dim=-1)
            i, f, g, o = x.new_zeros(4, x.shape[-1], 1).add(x.new_tensor([-1e4, 1e4, 0, 0])[:, None, None])
            weights[0] = torch.cat([weights[0], torch.cat([i, f, g, o])], dim=1)
        start = (state.h[None], state.c[None])
        h, _, last_c = torch.lstm(real.x, start, weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
        h = real.restore(h, state.h)
        return h, LSTMState(last(h, reverse), last_c[0])


RECURRENCES: dict[str, type[Recurrence]] = {
    "gru": GRU,
    "lstm": LSTM,
    "diagonal_gru": DiagonalGRU,
    "min_gru": MinGRU,
}


def scan(
    cell: Recurrence, x: Tensor, state: State, mask: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, State]:
    """Return h [B, T, D] and the last state for inputs [B, T, D]; where mask [B, T] is False nothing changes."""
    length = fixed_length(x.shape[1])
    fusable = cell.fused is not None and (can_fuse(cell, x) or can_compile(cell, x))
    if length > 1 and fusable:  # a single step needs no scan
        return cell.fused(x, state, mask, reverse)
    decodes = length == 1 and mask is None and not torch.is_grad_enabled()
    if decodes and cell.native_step is not None and can_fuse(cell, x):
        state = cell.native_step(x[:, 0], state)
        return state.h[:, None], state
    return scan_reference(cell, x, state, mask, reverse)


def scan_reference(
    cell: Recurrence, x: Tensor, state: State, mask: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, State]:
    """Compute `scan` position by position."""
    gates = cell.input_proj(x)
    h: list[Tensor] = []
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        new = cell.step(gates[:, t], state)
        if mask is not None:
            new = type(new)(*(torch.where(mask[:, t, None], n, o) for n, o in zip(new, state, strict=True)))
        state = new
        h.append(state.h)
    return torch.stack(h[::-1] if reverse else h, dim=1).to(x.dtype), state


def linear_scan(a: Tensor, b: Tensor, start: Tensor, reverse: bool = False) -> Tensor:
    """Solve h_t = a_t ∘ h_{t-1} + b_t from h_{-1} = start: a and b [B, T, D], start [B, D] -> [B, T, D].

    Reversed, h_t = a_t ∘ h_{t+1} + b_t from h_T = start.
    """
    if compiled := kernel("linear_scan", a, b, start):
        return compiled(a, b, start, reverse)
    return linear_scan_parallel(a, b, start, reverse)


def linear_scan_reference(a: Tensor, b: Tensor, start: Tensor, reverse: bool = False) -> Tensor:
    """Compute `linear_scan` position by position."""
    h = [start]
    for t in reversed(range(a.shape[1])) if reverse else range(a.shape[1]):
        h.append(a[:, t] * h[-1] + b[:, t])
    return torch.stack(h[:0:-1] if reverse else h[1:], dim=1)


def linear_scan_parallel(a: Tensor, b: Tensor, start: Tensor, reverse: bool = False) -> Tensor:
    """Compute `linear_scan` in 2·log T steps and O(T) work, without divisions or logarithms."""
    if reverse:
        return linear_scan_parallel(a.flip(1), b.flip(1), start).flip(1)
    return _from_zero(a, torch.cat([a[:, :1] * start[:, None] + b[:, :1], b[:, 1:]], dim=1))


def _from_zero(a: Tensor, b: Tensor) -> Tensor:
    """Join neighbours to a scan of half the length, which gives h_1, h_3, …, and compute h_2, h_4, … from these."""
    length = a.shape[1]
    if length == 1:
        return b
    first, second = slice(0, length - 1, 2), slice(1, None, 2)
    odd = _from_zero(a[:, first] * a[:, second], a[:, second] * b[:, first] + b[:, second])
    even = torch.cat([b[:, :1], a[:, 2::2] * odd[:, : (length - 1) // 2] + b[:, 2::2]], dim=1)
    pairs = torch.stack([even[:, : length // 2], odd], dim=2).flatten(1, 2)
    return torch.cat([pairs, even[:, length // 2 :]], dim=1)


class RealFirst:
    """Inputs [B, T, D] in the order of the walk, real positions first, for kernels without a mask."""

    def __init__(self, x: Tensor, mask: Tensor | None, reverse: bool) -> None:
        self.x, self.reverse, self.seen = x.flip(1) if reverse else x, reverse, None
        if mask is not None:
            mask = mask.flip(1) if reverse else mask
            order = real_first(mask)[..., None]
            self.x = torch.where(mask[..., None], self.x, 0.0).gather(1, order.expand_as(x))
            self.seen = mask.cumsum(1)[..., None]  # [B, T, 1] number of real positions so far
            self.padding = ~mask[..., None].gather(1, order)  # [B, T, 1] in the new order of x

    def restore(self, h: Tensor, start: Tensor) -> Tensor:
        """Return h [B, T, D] in the order of the call; padding gets the h before it, or `start` [B, D]."""
        if self.seen is not None:
            h = torch.cat([start[:, None], h], dim=1).gather(1, self.seen.expand_as(h))
        return h.flip(1) if self.reverse else h


def last(h: Tensor, reverse: bool) -> Tensor:
    """Return the state after the walk: [B, T, D] -> [B, D]."""
    return h[:, 0 if reverse else -1]


def can_fuse(cell: Recurrence, x: Tensor) -> bool:
    """Return whether torch's kernel may run: it reads the weights itself, which must be plain float32 layers without
    adapters. The linear scan of a MinGRU reads no weights."""
    if isinstance(cell, MinGRU):
        return True
    return all(is_plain(m, nn.Linear, x) for m in (cell.input_proj, getattr(cell, "state_proj", None)))


def can_compile(cell: Recurrence, x: Tensor) -> bool:
    """Return whether our kernel may run a diagonal GRU, for which torch has none; it reads the diagonal itself."""
    return isinstance(cell, DiagonalGRU) and is_plain(cell.diagonal, Diagonal, x) and kernel("gru", x) is not None


def is_plain(module: Any, kind: type[nn.Module], x: Tensor) -> bool:
    """Return whether reading the module's float32 weight gives the same as calling it on x."""
    return (
        type(module) is kind
        and type(module.weight) is nn.Parameter  # not of a quantizer
        and module.weight.device == x.device  # not offloaded
        and "forward" not in vars(module)  # not wrapped by accelerate
        and not (module._forward_hooks or module._forward_pre_hooks)
        and x.dtype == module.weight.dtype == torch.float32
        and not torch.is_autocast_enabled(x.device.type)
    )


def kernel_available() -> bool:
    """Return whether numba is installed, which compiles the kernels for the CPU."""
    return bool(_kernels())


def kernel(name: str, *tensors: Tensor) -> Callable[..., Tensor] | None:
    """Return the compiled function `name`, or None where it can't read the memory of such tensors."""
    followed = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    if followed or not all(
        type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors
    ):
        return None
    return _kernels().get(name)


@cache
def _kernels() -> dict[str, Callable[..., Tensor]]:
    """Import the kernels when one is first asked for: numba is optional and slow to load."""
    if find_spec("numba") is None:
        return {}
    try:
        from .feedback_fused import KERNELS
    except ImportError:  # numba does not support the installed numpy
        return {}
    return KERNELS


def _weights(cell: Any) -> list[Tensor]:
    layers = cell.input_proj, cell.state_proj
    return [*(layer.weight for layer in layers), *(layer.bias for layer in layers)]


class RecurrentStack(nn.Module):
    """Layers of one recurrence along the positions; without causality, each adds a second one that runs backwards."""

    def __init__(self, config: FeedbackConfig, num_layers: int, causal: bool = True, kind: str = "gru") -> None:
        super().__init__()
        directions = 1 if causal else 2
        self.layers = nn.ModuleList(
            nn.ModuleList(RECURRENCES[kind](config.hidden_size) for _ in range(directions)) for _ in range(num_layers)
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Run all layers [B, T, D] -> [B, T, D] from the states in the context, and keep the new ones there."""
        for i, layer in enumerate(self.layers):
            directions: Any = layer
            here, cell = context.within(i), directions[0]
            kept = here.state()
            state = cell.initial_state(x[:, 0]) if kept is None else cell.state_type(*kept)
            h, state = self.run(cell, x, state, context)
            here.keep(state)
            if len(directions) == 2:
                h = h + scan(directions[1], x, directions[1].initial_state(x[:, 0]), context.mask, reverse=True)[0]
            x = h
        return x

    def run(self, cell: Recurrence, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        """Run one layer forwards; return h [B, T, D] and its last state."""
        return scan(cell, x, state, context.mask)
