"""What a call knows of its positions: the context, the cache and the state that it begins with, checked.

Shapes: B batch, T positions, P positions in the cache, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .feedback_arguments import PACKED, check_positions
from .feedback_cache import Context, FeedbackCache, PositionState
from .feedback_padding import first_real, gather
from .feedback_rules import check_windows
from .feedback_states import FeedbackState

logger = logging.get_logger(__name__)


class ContextMixin:
    """Make the context of a call of FeedbackModel, and reject arguments that do not fit it."""

    config: Any
    loop: Any
    positions: Any
    embedding_proj: Any
    embedding_size: int
    first_position: int
    has_attention: bool
    training: bool
    windows: Any = None  # as they were last checked

    def check_windows(self) -> None:
        """Check sliding windows anew where they were changed on this model."""
        backbone = self.config.backbone_config
        now = getattr(backbone, "sliding_window", None), getattr(backbone, "layer_types", None)
        if now != self.windows:
            check_windows(self.config)
            self.windows = now

    @staticmethod
    def check_alone(**arguments: Any) -> None:
        for name, value in arguments.items():
            if value is not None:
                raise ValueError(f"{name} does not go with num_prefix_tokens: leave it out.")

    def start_of(
        self, state: FeedbackState | None, e: Tensor, order: Tensor | None, cache: FeedbackCache | None
    ) -> FeedbackState | None:
        """Return the state that a call begins with, in the order of its positions."""
        if state is None:
            return None
        if self.config.feedback_connection == "memory":
            raise ValueError(
                "feedback_state holds no memory of past positions, which feedback_connection='memory' reads."
            )
        if cache is not None:
            raise ValueError(
                "feedback_state goes on with the passes of a text, of which a cache would miss the first ones: set "
                "use_cache=False."
            )
        state = FeedbackState(*state)
        if state.h.shape != e.shape:
            raise ValueError(f"feedback_state is of {[*state.h.shape]} and the input of {[*e.shape]}.")
        return state.map(lambda x: gather(x, order))

    def cache_after(self, state: FeedbackState | None, cache: FeedbackCache | None) -> FeedbackCache | None:
        """Return the cache of a call position by position, which goes on from a state.

        A model without attention has one in any case, for the state that the call returns.
        """
        if state is None:
            keeps = not self.has_attention and self.config.is_causal and not torch.compiler.is_compiling()
            return FeedbackCache() if cache is None and keeps else cache
        if self.has_attention or not self.config.is_causal:
            raise ValueError("feedback_state holds no keys and values, which attention reads: use past_key_values.")
        if cache is not None and cache.length > 0:
            raise ValueError("feedback_state and past_key_values both say what was read: give one of them.")
        kept = FeedbackState(*state).cell
        if not isinstance(kept, tuple) or len(kept) != 3 or not isinstance(kept[0], int):
            raise ValueError(
                "feedback_state is of passes, and this model goes position by position: give one of its own."
            )
        cache = FeedbackCache() if cache is None else cache
        cache.restore(PositionState(*kept))
        return cache

    def make_cache(self, cache: FeedbackCache | None, use_cache: bool | None) -> FeedbackCache | None:
        if cache is not None and not isinstance(cache, FeedbackCache):
            raise ValueError(
                f"past_key_values must be a FeedbackCache, not {type(cache).__name__}: leave it out; prefix tuning, "
                "which makes one, does not go with feedback, as LoRA and prompt tuning do."
            )
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if cache is not None and self.loop.gradient_checkpointing and self.training:
            raise ValueError("Gradient checkpointing would drop past_key_values: leave them out, or disable it.")
        if use_cache and self.loop.gradient_checkpointing and self.training:
            logger.warning_once("use_cache=True does not go with gradient checkpointing; no cache is made.")
            return None
        if not use_cache or not self.config.is_causal:
            return cache
        return FeedbackCache() if cache is None else cache

    def make_context(
        self,
        embedded: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: FeedbackCache | None,
        grid: tuple[int, ...] = (),
    ) -> tuple[Context, Tensor | None]:
        """Return what the parts may know of these positions, and the order [B, T] that puts the real ones first."""
        self.check_shapes(embedded, position_ids, cache)
        batch, length, _ = embedded.shape
        offset = 0 if cache is None else cache.length
        check_positions("attention_mask", attention_mask, batch, (length, offset + length))
        mask, order = (None, None) if attention_mask is None else first_real(attention_mask, length)
        columns = torch.arange(length, device=embedded.device)
        count = columns.new_zeros(batch) if cache is None or cache.count is None else cache.count
        if position_ids is None:
            position_ids = count[:, None] + columns
        else:
            position_ids = position_ids.expand(batch, length) - self.first_position
            position_ids = position_ids if order is None else position_ids.gather(1, order)
            position_ids = position_ids if mask is None else position_ids.masked_fill(~mask, 0)
            self.check_order(position_ids, mask)
        key_mask = None
        if not self.config.is_causal:
            key_mask = mask
        elif cache is not None and cache.key_mask is not None:
            key_mask = torch.cat([cache.key_mask, cache.key_mask.new_ones(batch, length)], dim=1)
        return Context(position_ids, count, offset, mask, key_mask, cache, grid=grid, order=order), order

    def check_shapes(self, embedded: Tensor, position_ids: Tensor | None, cache: FeedbackCache | None) -> None:
        if embedded.ndim != 3:
            raise ValueError(f"The input has {embedded.ndim - 1} dimensions; it must be [batch, positions].")
        batch, length, size = embedded.shape
        if size != self.embedding_size:
            raise ValueError(
                f"inputs_embeds are {size} wide; this model takes {self.embedding_size}, its "
                f"{'hidden_size' if self.embedding_proj is None else 'embedding_size'}."
            )
        if position_ids is not None and tuple(position_ids.shape) not in {(batch, length), (1, length)}:
            raise ValueError(
                f"position_ids have the shape {[*position_ids.shape]} and the input {[batch, length]}: give a place "
                "for each position."
            )
        offset = 0 if cache is None else cache.length
        if cache is not None and cache.count is not None and cache.count.shape[0] != batch:
            raise ValueError(
                f"past_key_values are of {cache.count.shape[0]} rows and the input has {batch}: give each row its "
                "own, as past_key_values.batch_repeat_interleave(n) makes them of one."
            )
        if batch == 0 or length == 0:
            raise ValueError("The input is empty: give at least one position.")
        longest = self.config.max_position_embeddings - self.first_position
        if self.config.token_mixer == "mlp" and length > longest:
            raise ValueError(
                f"{length} positions are more than the MLP over positions takes, {longest}: shorten the input."
            )
        if self.has_attention and offset + length > longest:
            if self.positions is not None:
                raise ValueError(
                    f"{offset + length} positions are more than max_position_embeddings ({longest}): shorten the "
                    "input, or build a model with more."
                )
            # The sentence holds no number that grows, as warning_once shows each sentence once.
            logger.warning_once(
                f"A text is longer than max_position_embeddings ({longest}), which this model was not made for; "
                "rotary positions go on."
            )

    def check_order(self, position_ids: Tensor, mask: Tensor | None) -> None:
        """Reject positions [B, T] that do not rise where they are real: texts packed into one row, most likely."""
        if torch.compiler.is_compiling() or (position_ids.shape[1] == 1 and self.positions is None):
            return
        real = torch.ones_like(position_ids, dtype=torch.bool) if mask is None else mask
        if ((position_ids[:, 1:] <= position_ids[:, :-1]) & real[:, 1:]).any():
            raise ValueError(f"position_ids do not rise within a row: {PACKED}")
        table = getattr(self.positions, "weight", None)
        if table is not None and ((position_ids < 0) | (position_ids + self.first_position >= len(table)))[real].any():
            raise ValueError(f"position_ids must be 0 or more, and below {len(table) - self.first_position}.")

    def check_steps(self, cache: FeedbackCache | None, num_steps: int | None, every_step: bool) -> None:
        """Reject a change of steps halfway through a text: a cache has a slot for every pass that is decoded."""
        if cache is None:
            return
        steps = (self.loop.num_passes(num_steps) or 1, every_step, self.config.shared_step_cache)
        if cache.steps is not None and cache.steps != steps:
            then, now = (f"{n} feedback steps (each decoded: {d}, shared: {s})" for n, d, s in (cache.steps, steps))
            raise ValueError(
                f"This cache was filled with {then} and this call makes {now}: to change that, leave past_key_values "
                "out."
            )
        cache.steps = steps
