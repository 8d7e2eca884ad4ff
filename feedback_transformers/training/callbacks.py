"""Callbacks for Trainer, and the functions they are made of for loops of one's own."""

from __future__ import annotations

import random
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.feedback_loop import FeedbackLoop


def draw_steps(step: int, minimum: int, maximum: int, seed: int = 0) -> int:
    """The number of feedback steps of training step `step`, uniform in [minimum, maximum].

    It depends on nothing but its arguments, so that every process draws the same, and a resumed run what the
    uninterrupted one would have.
    """
    if not 1 <= minimum <= maximum:
        raise ValueError(f"minimum ({minimum}) and maximum ({maximum}) must be 1 <= minimum <= maximum.")
    return random.Random(f"{seed}:{step}").randint(minimum, maximum)


class SampleFeedbackSteps(TrainerCallback):
    """Trains each step with another number of feedback steps, so that afterwards any number from there on works.

    A model trained at a fixed number of passes is good only at that number; one trained so is good at those drawn and
    above, and not below `minimum`. Evaluation uses the config's number.

    Args:
        curriculum: the share of training over which the maximum grows linearly from `minimum` to `maximum`.
    """

    def __init__(self, minimum: int, maximum: int, curriculum: float = 0.0) -> None:
        draw_steps(0, minimum, maximum)  # refuses a wrong range at once
        if not 0 <= curriculum <= 1:
            raise ValueError(f"curriculum ({curriculum}) is a share of training, from 0 to 1.")
        self.minimum, self.maximum, self.curriculum = minimum, maximum, curriculum
        self.model: nn.Module | None = None  # while a step of it is trained

    def most(self, progress: float) -> int:
        """The maximum after the share `progress` of training."""
        if progress >= self.curriculum:
            return self.maximum
        return self.minimum + int((self.maximum - self.minimum) * progress / self.curriculum)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        loops = loops_of(model)
        if not loops:
            raise ValueError(
                f"This {type(model).__name__} has no feedback steps to draw: make a feedback model of it with "
                "feedback_transformers.retrofit, or leave SampleFeedbackSteps out."
            )
        if not all(loop.config.in_passes or loop.config.feedback_signal == "none" for loop in loops):
            raise ValueError(
                "This model goes position by position and makes no passes to draw: set config.solver='jacobi', or "
                "leave SampleFeedbackSteps out."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        most = self.most(state.global_step / state.max_steps)
        self.model = model
        set_steps(model, draw_steps(state.global_step, self.minimum, most, args.seed))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.release()

    def release(self) -> None:
        if self.model is not None:
            set_steps(self.model, None)
        self.model = None


def set_steps(model: nn.Module, num_steps: int | None) -> None:
    """The feedback steps of calls in training that don't name theirs; None for the config's."""
    for loop in loops_of(model):
        loop.num_steps = num_steps


def loops_of(model: nn.Module) -> list[Any]:
    """By name, as a checkpoint may bring a FeedbackLoop of its own code, and FSDP makes a subclass."""
    name = FeedbackLoop.__name__
    return [module for module in model.modules() if any(kind.__name__ == name for kind in type(module).__mro__)]
