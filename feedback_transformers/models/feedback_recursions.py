"""RECURSIONS: what one step of the loop makes of the state, and in which order its parts run.

    s_t = step( c(e, ·), φ, s_{t-1} )        h_t is read and fed back

Shapes: e, φ and h are [B, T, D].
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_feedback import FeedbackConfig
from .feedback_cache import Context
from .feedback_cells import State, make_cell
from .feedback_connections import CONNECTIONS
from .feedback_layers import make_norm
from .feedback_states import INITIAL_STATES, InitialState

Connect = Callable[[Tensor | None], Tensor]  # φ -> c(e, φ)


class LayerStates(NamedTuple):
    """What the layers of a step leave for the next one; the last layer's output is h itself."""

    above: tuple[Tensor, ...]  # [B, T, D] of each layer but the first, along time [B, D] of the last position
    own: tuple[Any, ...] = ()  # the recurrent state of each layer, in depth


class LowState(NamedTuple):
    """The fast latent of two levels; the slow one is h itself."""

    low: Tensor  # [B, T, D]


class Recursion:
    """One latent: the cell reads c(e, φ). Base of the others."""

    @staticmethod
    def cell(config: FeedbackConfig) -> nn.Module:
        """Return the modules that run within a step."""
        return make_cell(config)

    @staticmethod
    def first(cell: Any, e: Tensor, begin: InitialState | None, context: Context) -> State:
        """Return the state beside h before the first pass over e; None is for the cell to begin with zeros."""
        return None

    @staticmethod
    def step(
        cell: Any, config: FeedbackConfig, connect: Connect, signal: Tensor | None, state: State, context: Context
    ) -> tuple[Tensor, State]:
        """Return h after a step on the depth axis, and the state beside it."""
        return cell.step(connect(signal), state, context)

    @staticmethod
    def along(cell: Any, config: FeedbackConfig, connect: Connect, signal: Tensor | None, context: Context) -> Tensor:
        """Return h of a step on the time axis; what it leaves to the next one stays in the cache."""
        return cell(connect(signal), context)


class Ladder(nn.Module):
    """Cells of one layer each, and a connection before each but the first, whose connection is the loop's."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        one = copy.copy(config)
        object.__setattr__(one, "num_feedback_layers", 1)
        self.layers = nn.ModuleList(make_cell(one) for _ in range(config.num_feedback_layers))
        connection = CONNECTIONS[config.feedback_connection]
        self.connections = nn.ModuleList(connection(config) for _ in range(config.num_feedback_layers - 1))


class Layerwise(Recursion):
    """Every layer reads what the layer above it made one step ago, and the last one reads φ:

    x^l_t = f_l( c_l(x^{l-1}_t, x^{l+1}_{t-1}) )    x^0 = e    x^{L+1} = φ    h = x^L
    """

    @staticmethod
    def cell(config: FeedbackConfig) -> nn.Module:
        return Ladder(config)

    @staticmethod
    def step(
        cell: Any, config: FeedbackConfig, connect: Connect, signal: Tensor | None, state: State, context: Context
    ) -> tuple[Tensor, State]:
        known = None if state is None else LayerStates(*state)
        own: Any = [None] * len(cell.layers) if known is None or not known.own else known.own
        states: list[Any] = []

        def run(number: int, x: Tensor) -> Tensor:
            h, new = cell.layers[number].step(x, own[number], context.within("layer", number))
            states.append(new)
            return h

        made = Layerwise.climb(cell, config, connect, signal, None if known is None else known.above, run)
        return made[-1], LayerStates(tuple(made[1:]), tuple(states))

    @staticmethod
    def along(cell: Any, config: FeedbackConfig, connect: Connect, signal: Tensor | None, context: Context) -> Tensor:
        place = context.within("above")
        held = None if config.feedback_signal == "none" else place.state()

        def run(number: int, x: Tensor) -> Tensor:
            return cell.layers[number](x, context.within("layer", number))

        made = Layerwise.climb(cell, config, connect, signal, held and tuple(x[:, None] for x in held), run)
        if config.feedback_signal != "none" and len(made) > 1:
            above = tuple(x[:, -1] for x in made[1:])
            if context.mask is not None:  # padding leaves the state as it is
                old = held or tuple(torch.zeros_like(x) for x in above)
                above = tuple(torch.where(context.mask[:, -1:], *pair) for pair in zip(above, old, strict=True))
            place.keep(above)
        return made[-1]

    @staticmethod
    def climb(
        cell: Any,
        config: FeedbackConfig,
        connect: Connect,
        signal: Tensor | None,
        above: tuple[Tensor, ...] | None,
        run: Callable[[int, Tensor], Tensor],
    ) -> list[Tensor]:
        """Return the output of every layer; `above` are those of all but the first, one step ago."""
        last = len(cell.layers) - 1
        made: list[Tensor] = []
        for number in range(last + 1):
            read = signal if number == last else None if above is None else above[number]
            if read is not None and number > 0 and cell.training and config.feedback_noise:
                read = read + config.feedback_noise * torch.randn_like(read)
            if number == 0:
                x = connect(read)
            elif config.feedback_signal == "none":
                x = cell.connections[number - 1](made[-1], made[-1])
            else:
                x = cell.connections[number - 1](made[-1], torch.zeros_like(made[-1]) if read is None else read)
            made.append(run(number, x))
        return made


def relaxed(config: FeedbackConfig, before: Tensor, made: Tensor, training: bool) -> Tensor:
    """Return (1 - λ) z + λ f(z) of a latent z and what a stack made of it, with noise in training (EqR)."""
    if config.relaxation != 1:
        made = (1 - config.relaxation) * before + config.relaxation * made
    if training and config.state_noise:
        made = made + config.state_noise * torch.randn_like(made)
    return made


class Levels(nn.Module):
    """Stacks of a slow and a fast latent, or one stack for both, and the fast one's first state if it is learned."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.low = make_cell(config)
        self.high = None if config.share_levels else make_cell(config)
        end = make_norm if config.output_norm == "pass" else nn.Identity
        self.low_norm = end(config)
        self.high_norm = None if config.share_levels else end(config)
        begin = INITIAL_STATES[config.initial_state]
        draws = begin is not None and begin.draws
        self.low_state = None if draws else nn.Parameter(torch.empty(config.hidden_size))

    def init_parameters(self) -> None:
        if self.low_state is not None:
            init.zeros_(self.low_state)

    def first(self, e: Tensor) -> LowState:
        """Return the learned first state of the fast latent."""
        return LowState(cast(Tensor, self.low_state).to(e.dtype).expand_as(e))

    def think(self, x: Tensor, context: Context) -> Tensor:
        """Run the stack of the fast latent."""
        return self.low_norm(self.low(x, context))

    def answer(self, x: Tensor, context: Context) -> Tensor:
        """Run the stack of the slow latent."""
        if self.high is None or self.high_norm is None:
            return self.think(x, context)
        return self.high_norm(self.high(x, context))


class Hierarchical(Recursion):
    """Two latents, a slow z_H = h and a fast z_L (HRM, Wang et al. 2025, arXiv:2506.21734; TRM, arXiv:2510.04871):

    L times z_L = f_L( z_L + c(e, z_H) ), then z_H = f_H( z_H + z_L )

    With a relaxation λ, each z becomes (1 - λ) z + λ f (EqR, Huang et al. 2026, arXiv:2605.21488).
    """

    @staticmethod
    def cell(config: FeedbackConfig) -> nn.Module:
        return Levels(config)

    @staticmethod
    def first(cell: Any, e: Tensor, begin: InitialState | None, context: Context) -> State:
        if begin is None or not begin.draws:
            return cell.first(e)
        return LowState(begin(e, context, latent=1))

    @staticmethod
    def step(
        cell: Any, config: FeedbackConfig, connect: Connect, signal: Tensor | None, state: State, context: Context
    ) -> tuple[Tensor, State]:
        x = connect(signal)
        high = torch.zeros_like(x) if signal is None else signal
        (low,) = cell.first(x) if state is None else state
        for number in range(config.num_low_steps):
            low = relaxed(config, low, cell.think(low + x, context.within("low", number)), cell.training)
        high = relaxed(config, high, cell.answer(high + low, context.within("high")), cell.training)
        return high, LowState(low)


class Refinement(Recursion):
    """One latent that is thought over with the input, and then without it (TRM with a single z, arXiv:2510.04871):

    L times z = f( c(e, z) ), then z = f( z )

    With a relaxation λ, each z becomes (1 - λ) z + λ f.
    """

    @staticmethod
    def step(
        cell: Any, config: FeedbackConfig, connect: Connect, signal: Tensor | None, state: State, context: Context
    ) -> tuple[Tensor, State]:
        z = cast(Tensor, signal)
        for number in range(config.num_low_steps):
            z = relaxed(config, z, cell(connect(z), context.within("low", number)), cell.training)
        return relaxed(config, z, cell(z, context.within("high")), cell.training), None


RECURSIONS: dict[str, type[Recursion]] = {
    "single": Recursion,
    "layerwise": Layerwise,
    "hierarchical": Hierarchical,
    "refinement": Refinement,
}
