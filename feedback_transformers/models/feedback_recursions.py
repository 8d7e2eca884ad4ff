"""RECURSIONS: what one step of the loop makes of the state, and in which order its parts run.

    s_t = step( c(e, ·), φ, s_{t-1} )        h_t is read and fed back

Shapes: e, φ and h are [B, T, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_feedback import FeedbackConfig
from .feedback_cache import Context
from .feedback_cells import State, make_cell
from .feedback_layers import make_norm
from .feedback_states import INITIAL_STATES, InitialState

Connect = Callable[[Tensor | None], Tensor]  # φ -> c(e, φ)


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
    "hierarchical": Hierarchical,
    "refinement": Refinement,
}
