"""What goes into a call of a model, checked, so that nothing is ignored in silence; and what comes out of it.

Shapes: B batch, T positions, P positions in the cache, D hidden size, K feedback steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.utils import ModelOutput, can_return_tuple, logging
from typing_extensions import Self

from .feedback_cache import Context, FeedbackCache, PositionState
from .feedback_padding import first_real, gather
from .feedback_rules import check_windows
from .feedback_states import FeedbackState

logger = logging.get_logger(__name__)

PACKED = (
    "Several texts in one row would read each other: give each a row of its own, with padding; in TRL set "
    "packing=False and padding_free=False."
)
OF_PACKED_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def named_arguments(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `forward`: reject arguments that the model would ignore, and return a tuple with `return_dict=False`.

    The model knows what the signature of `forward` names. A `forward` that ends with `**kwargs` also takes the names
    in the model's `more_arguments`. Trainer keeps only those columns of a dataset that the signature names, so every
    argument that can be a column has to be there.
    """
    parameters = list(signature(forward).parameters.values())[1:]
    named = {parameter.name for parameter in parameters if parameter.kind is not Parameter.VAR_KEYWORD}
    takes_more = len(named) < len(parameters)

    @wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError("Attention weights are not returned: leave output_attentions out.")
        known = named.union(self.more_arguments) if takes_more else named
        for name, value in kwargs.items():
            if name not in known and not changes_nothing(name, value):
                raise ValueError(refusal(self, name, known))
        return forward(self, *args, **{name: value for name, value in kwargs.items() if name in known})

    return can_return_tuple(checked)


def changes_nothing(name: str, value: Any) -> bool:
    """Tell whether a model that does not read this argument computes what the caller expects."""
    return value is None or name == "use_cache" or (name.startswith("output_") and value is False)


def refusal(model: Any, name: str, known: Iterable[str]) -> str:
    """Return the sentence that rejects the argument `name`."""
    kind = type(model).__name__
    if name in OF_PACKED_ROWS:
        return f"{name}: {PACKED}"
    if advice := model.unread.get(name):
        return f"{kind} does not read {name}: {advice}."
    if meant := get_close_matches(name, known, n=1, cutoff=0.8):
        return f"{kind} does not know {name}: did you mean {meant[0]}?"
    return f"{kind} does not read {name}: leave it out."


def check_positions(name: str, value: Tensor | None, batch: int, lengths: tuple[int, ...]) -> None:
    """Reject `value`, unless its shape is [batch, one of `lengths`]."""
    if value is None or (value.ndim == 2 and value.shape[0] == batch and value.shape[1] in lengths):
        return
    expected = " or ".join(str([batch, length]) for length in dict.fromkeys(lengths))
    raise ValueError(
        f"{name} has the shape {[*value.shape]}; it must have the shape {expected}, [batch, positions]"
        + (" of the input or of the cache and the input." if len(set(lengths)) > 1 else ".")
    )


def check_types(token_type_ids: Tensor | None, embedded: Tensor, told_apart: bool) -> None:
    """Reject token types that are not [B, T] as `embedded` [B, T, D], and types other than 0 where all are alike."""
    check_positions("token_type_ids", token_type_ids, embedded.shape[0], (embedded.shape[1],))
    if token_type_ids is None or told_apart or torch.compiler.is_compiling():
        return
    if token_type_ids.any():  # a tokenizer may give zeros to every model
        raise ValueError("This model does not tell types of tokens apart: leave token_type_ids out.")


class StatefulOutput(ModelOutput):
    """Base of outputs with the state after the last pass, which `feedback_state=` of another call goes on from.

    The state is an attribute and no item, so that tuples, exports and Trainer's predictions are without it. Compiled
    models return none.
    """

    feedback_state: ClassVar[Any] = None  # a FeedbackState of tensors [B, T, ...]
    positions_mask: ClassVar[Tensor | None] = None  # [B, T] which positions are real, where the input itself knows it
    grid: ClassVar[tuple[int, ...]] = ()  # whose cells the positions are

    def with_state(self, state: FeedbackState | None, **others: Any) -> Self:
        """Set the state, and others that are no items, and return self."""
        if state is not None and not torch.compiler.is_compiling():
            others["feedback_state"] = state
        for name, value in others.items():
            object.__setattr__(self, name, value)
        return self


@dataclass
class FeedbackModelOutput(StatefulOutput):
    """
    Args:
        last_hidden_state: y [B, T, D] of the last step.
        past_key_values: what the next call needs, with `use_cache=True`.
        hidden_states: the embeddings, the encoder's output, h of every pass and y, each [B, T, D], with
            `output_hidden_states=True`.
        feedback_states: y after every pass, K of [B, T, D], with `output_feedback_states=True`. Position by position
            there is one pass, and its trajectory is last_hidden_state itself.
        num_feedback_steps: [B, T] passes that each position made, where `halting` or `solver_tolerance` may stop it.
        halting_probabilities: K of [B, T], of stopping after each pass, in training with learned halting.
        halting_loss: [B, T] what learned halting adds to the loss of each position, before its weight.
        halting_logits: [B, 2] of each answer, to stop there and to go on, with halting_scope="sequence".
    """

    last_hidden_state: Any = None
    past_key_values: FeedbackCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    feedback_states: tuple[Tensor, ...] | None = None
    num_feedback_steps: Tensor | None = None
    halting_probabilities: tuple[Tensor, ...] | None = None
    halting_loss: Tensor | None = None
    halting_logits: tuple[Tensor, ...] | None = None


class ContextMixin:
    """Make the context of a call of FeedbackModel, and reject arguments that do not fit it."""

    config: Any
    loop: Any
    positions: Any
    embeddings: Any
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
        if getattr(self.embeddings, "positions", None) is not None:
            raise ValueError(
                "The places of cells begin anew in each call: set positions='none' in input_config to go on from a "
                "feedback_state along time."
            )
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
