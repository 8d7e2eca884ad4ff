"""Recurrences h_t = f(x_t, h_{t-1}): one step each, and the loop over positions.

Shapes: B batch, T positions, D hidden size, G gates of the recurrence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_feedback import FeedbackConfig
from .feedback_cache import Context


class GRUState(NamedTuple):
    h: Tensor  # [..., D] float32


class LSTMState(NamedTuple):
    h: Tensor  # [..., D] float32
    c: Tensor  # [..., D] float32


State = Any  # GRUState or LSTMState, whichever the recurrence has


class Diagonal(nn.Module):
    """`num_gates` diagonal maps of one vector: [..., D] -> [..., G·D]."""

    def __init__(self, size: int, num_gates: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_gates, size))

    def init_parameters(self) -> None:
        init.normal_(self.weight, std=0.5)

    def forward(self, h: Tensor) -> Tensor:
        return (h.unsqueeze(-2) * self.weight).flatten(-2)


class GRU(nn.Module):
    """Gated recurrent unit, Cho et al. 2014 (arXiv:1406.1078), in the form of torch.nn.GRUCell:

    r, z = σ(W x + U h)    n = tanh(W_n x + r ∘ U_n h)    h' = (1 - z) ∘ n + z ∘ h
    """

    num_gates = 3
    state_type: Any = GRUState

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input_proj = nn.Linear(size, self.num_gates * size)
        self.add_state_projection(size)

    def add_state_projection(self, size: int) -> None:
        self.state_proj = nn.Linear(size, self.num_gates * size)

    def project_state(self, h: Tensor) -> Tensor:
        """[..., D] -> [..., 3D]"""
        return self.state_proj(h)

    def initial_state(self, x: Tensor) -> GRUState:
        """Zeros for inputs [..., D]."""
        return GRUState(torch.zeros_like(x, dtype=torch.float32))

    def step(self, gates: Tensor, state: GRUState) -> GRUState:
        """One step from the projected input [..., 3D]."""
        r_x, z_x, n_x = gates.chunk(3, dim=-1)
        r_h, z_h, n_h = self.project_state(state.h.to(gates.dtype)).chunk(3, dim=-1)
        r, z = torch.sigmoid(r_x + r_h), torch.sigmoid(z_x + z_h)
        n = torch.tanh(n_x + r * n_h)
        return GRUState(torch.lerp(n.float(), state.h, z.float()))

    def fused(self, x: Tensor, state: GRUState) -> tuple[Tensor, GRUState]:
        """torch's own kernel over all positions [B, T, D]."""
        weights = _weights(self.input_proj, self.state_proj)
        h, last = torch.gru(x, state.h[None], weights, True, 1, 0.0, self.training, False, True)
        return h, GRUState(last[0])


class DiagonalGRU(GRU):
    """A GRU whose recurrent matrices are diagonal: no channel reads another's state."""

    def add_state_projection(self, size: int) -> None:
        self.diagonal = Diagonal(size, self.num_gates)  # another name, since PEFT's default targets are found by name

    def project_state(self, h: Tensor) -> Tensor:
        return self.diagonal(h)


class LSTM(nn.Module):
    """Long short-term memory, Hochreiter & Schmidhuber 1997, in the form of torch.nn.LSTMCell:

    i, f, o = σ(W x + U h)    c' = f ∘ c + i ∘ tanh(W_g x + U_g h)    h' = o ∘ tanh(c')
    """

    num_gates = 4
    state_type: Any = LSTMState

    def __init__(self, size: int) -> None:
        super().__init__()
        self.input_proj = nn.Linear(size, self.num_gates * size)
        self.state_proj = nn.Linear(size, self.num_gates * size)

    def initial_state(self, x: Tensor) -> LSTMState:
        """Zeros for inputs [..., D]."""
        zeros = torch.zeros_like(x, dtype=torch.float32)
        return LSTMState(zeros, zeros)

    def step(self, gates: Tensor, state: LSTMState) -> LSTMState:
        """One step from the projected input [..., 4D]."""
        i, f, g, o = (gates + self.state_proj(state.h.to(gates.dtype))).float().chunk(4, dim=-1)
        c = torch.sigmoid(f) * state.c + torch.sigmoid(i) * torch.tanh(g)
        return LSTMState(torch.sigmoid(o) * torch.tanh(c), c)

    def fused(self, x: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """torch's own kernel over all positions [B, T, D]."""
        weights = _weights(self.input_proj, self.state_proj)
        start = (state.h[None], state.c[None])
        h, last_h, last_c = torch.lstm(x, start, weights, True, 1, 0.0, self.training, False, True)
        return h, LSTMState(last_h[0], last_c[0])


RECURRENCES: dict[str, type[GRU] | type[LSTM]] = {"gru": GRU, "lstm": LSTM, "diagonal_gru": DiagonalGRU}


def scan(
    cell: GRU | LSTM, x: Tensor, state: State, mask: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, State]:
    """h_t [B, T, D] and the last state, over inputs [B, T, D]; where mask [B, T] is False nothing changes."""
    if mask is None and can_fuse(cell, x):
        h, state = cell.fused(x.flip(1) if reverse else x, state)
        return (h.flip(1) if reverse else h), state
    return scan_reference(cell, x, state, mask, reverse)


def scan_reference(
    cell: GRU | LSTM, x: Tensor, state: State, mask: Tensor | None = None, reverse: bool = False
) -> tuple[Tensor, State]:
    """`scan`, position by position."""
    gates = cell.input_proj(x)
    h: list[Tensor] = []
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        new = cell.step(gates[:, t], state)
        if mask is not None:
            new = type(new)(*(torch.where(mask[:, t, None], n, o) for n, o in zip(new, state, strict=True)))
        state = new
        h.append(state.h)
    return torch.stack(h[::-1] if reverse else h, dim=1).to(x.dtype), state


def can_fuse(cell: GRU | LSTM, x: Tensor) -> bool:
    """torch's kernel reads the weights itself: only plain float32 layers, which no adapter wraps, may go there."""
    projections = (cell.input_proj, getattr(cell, "state_proj", None))
    plain = all(
        type(m) is nn.Linear
        and type(m.weight) is nn.Parameter  # not of a quantizer
        and m.weight.device == x.device  # not offloaded
        and "forward" not in vars(m)  # not wrapped by accelerate
        and not (m._forward_hooks or m._forward_pre_hooks)
        for m in projections
    )
    autocast = torch.is_autocast_enabled(x.device.type)
    return plain and not autocast and x.dtype == cell.input_proj.weight.dtype == torch.float32


def _weights(input_proj: Any, state_proj: Any) -> list[Tensor]:
    return [input_proj.weight, state_proj.weight, input_proj.bias, state_proj.bias]


class RecurrentStack(nn.Module):
    """Layers of one recurrence over the positions; where not causal, each adds a second one that runs backwards."""

    def __init__(self, config: FeedbackConfig, num_layers: int, causal: bool = True, kind: str = "gru") -> None:
        super().__init__()
        directions = 1 if causal else 2
        self.layers = nn.ModuleList(
            nn.ModuleList(RECURRENCES[kind](config.hidden_size) for _ in range(directions)) for _ in range(num_layers)
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D], from the state that the context remembers and leaving the new one there."""
        for i, layer in enumerate(self.layers):
            directions: Any = layer
            here, cell = context.at(i), directions[0]
            kept = here.state()
            state = cell.initial_state(x[:, 0]) if kept is None else cell.state_type(*kept)
            h, state = scan(cell, x, state, context.mask)
            here.keep(state)
            if len(directions) == 2:
                h = h + scan(directions[1], x, directions[1].initial_state(x[:, 0]), context.mask, reverse=True)[0]
            x = h
        return x
