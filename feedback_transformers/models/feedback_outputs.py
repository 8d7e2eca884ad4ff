"""Outputs of the models. Shapes: B batch, T positions, D hidden size, K feedback steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.utils import ModelOutput
from typing_extensions import Self

from .feedback_cache import FeedbackCache
from .feedback_states import FeedbackState


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
