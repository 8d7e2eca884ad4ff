"""INITIAL_STATES: where a recursion in depth begins, and the state that goes into a call and comes out of it.

Shapes: B batch, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_feedback import FeedbackConfig
from .feedback_cache import Context

BLOCK = 64  # positions whose random state is drawn at once


class FeedbackState(NamedTuple):
    """State of a recursion after a pass, which a later call can go on from with more passes.

    Of a model that goes position by position, it is the state behind the last one, and a later call goes on with more
    positions. Detach it to carry it from one training step to the next. `torch.save(state.plain())` saves it.
    """

    h: Tensor  # [B, T, D] what is read, and fed back with feedback_signal="state"
    y: Tensor | None = None  # [B, T, D] g(h), whose prediction is fed back with feedback_signal="output"
    cell: Any = None  # what is kept beside h: a state of each recurrent layer, the fast latent, or a PositionState

    def map(self, change: Callable[[Tensor], Tensor]) -> FeedbackState:
        """Return the state with `change` applied to each tensor."""

        def walk(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if not isinstance(value, tuple):
                return value
            made = [walk(each) for each in value]
            return type(value)(*made) if hasattr(value, "_fields") else tuple(made)

        return walk(self)

    def plain(self) -> tuple[Any, ...]:
        """Return the state as tuples of tensors, which torch.load reads without a class of this package."""

        def walk(value: Any) -> Any:
            return tuple(walk(each) for each in value) if isinstance(value, tuple) else value

        return walk(tuple(self))

    def detach(self) -> FeedbackState:
        """Return the state without its gradient."""
        return self.map(torch.Tensor.detach)


class InitialState(nn.Module):
    """Base of initial states: forward maps e [B, T, D] to h before the first pass."""

    draws = False  # whether it also draws the other latents of a recursion, which the recursion begins otherwise

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, e: Tensor, context: Context, latent: int = 0) -> Tensor:
        """Return a latent [B, T, D] at the positions of a context: h, or the next ones of those that it draws."""
        raise NotImplementedError


class FromInput(InitialState):
    """Begin at e itself."""

    def forward(self, e: Tensor, context: Context, latent: int = 0) -> Tensor:
        return e


class Learned(InitialState):
    """Begin at a learned vector, the same at each position."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        self.vector = nn.Parameter(torch.empty(config.hidden_size))

    def init_parameters(self) -> None:
        init.trunc_normal_(self.vector, std=1.0, a=-2.0, b=2.0)

    def forward(self, e: Tensor, context: Context, latent: int = 0) -> Tensor:
        return self.vector.to(e.dtype).expand_as(e)


class Random(InitialState):
    """Begin at a normal draw of standard deviation `initial_state_scale`, cut at `initial_state_cut` of them.

    In evaluation a position's draw depends on `initial_state_seed` and its place in the text alone, so that a text
    gives the same with and without cache, padding or other rows. In training each call draws anew.
    """

    draws = True

    def forward(self, e: Tensor, context: Context, latent: int = 0) -> Tensor:
        scale = self.config.initial_state_scale
        if scale == 0:
            return torch.zeros_like(e)
        most = self.config.initial_state_cut * scale
        draw = partial(nn.init.trunc_normal_, std=scale, a=-most, b=most)
        if self.training:
            return draw(torch.empty_like(e))
        needed, index = (context.position_ids.cpu() // BLOCK).unique(return_inverse=True)
        blocks = torch.empty(len(needed), BLOCK, e.shape[-1], device="cpu")  # the same on every device
        for number, block in zip(needed.tolist(), blocks, strict=True):
            generator = torch.Generator().manual_seed(self.config.initial_state_seed + number)
            for _ in range(latent + 1):  # each latent has the draw behind that of the one before
                draw(block, generator=generator)
        return blocks[index, context.position_ids.cpu() % BLOCK].to(e)


INITIAL_STATES: dict[str, type[InitialState] | None] = {
    "zeros": None,
    "input": FromInput,
    "learned": Learned,
    "random": Random,
}
