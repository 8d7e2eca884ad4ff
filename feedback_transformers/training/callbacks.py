"""Draw the number of feedback steps anew at each training step: a Trainer callback, and functions for own loops."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..models.feedback_loop import FeedbackLoop


def draw_steps(step: int, minimum: int, maximum: int, seed: int = 0) -> int:
    """Draw the number of feedback steps of training step `step`, uniform in [minimum, maximum].

    The number depends on the arguments alone. So every process draws the same one, and a resumed run draws what the
    uninterrupted run would have drawn.

    Raises:
        ValueError: not 1 <= minimum <= maximum.
    """
    if not 1 <= minimum <= maximum:
        raise ValueError(f"minimum ({minimum}) and maximum ({maximum}) must be 1 <= minimum <= maximum.")
    return random.Random(f"{seed}:{step}").randint(minimum, maximum)


class SampleFeedbackSteps(TrainerCallback):
    """Train each step with another number of feedback steps, so that the model works with any of them afterwards.

    A model that is trained with a fixed number of passes is good with that number only. Evaluation uses the number of
    the config. The range is written to `config.trained_feedback_steps`.

    Args:
        minimum: the fewest feedback steps that are drawn.
        maximum: the most feedback steps that are drawn.
        curriculum: the share of training over which the maximum grows linearly from `minimum` to `maximum`.
    """

    def __init__(self, minimum: int, maximum: int, curriculum: float = 0.0) -> None:
        draw_steps(0, minimum, maximum)  # refuses a wrong range at once
        if not 0 <= curriculum <= 1:
            raise ValueError(f"curriculum ({curriculum}) is a share of training, from 0 to 1.")
        self.minimum, self.maximum, self.curriculum = minimum, maximum, curriculum
        self.model: nn.Module | None = None  # while a step of it is trained

    def most(self, progress: float) -> int:
        """Return the maximum after the share `progress` of training."""
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
        trained_with(model, (self.minimum, self.maximum))

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
        """Give the model its own number of feedback steps back."""
        if self.model is not None:
            set_steps(self.model, None)
        self.model = None


def set_steps(model: nn.Module, num_steps: int | None) -> None:
    """Set the feedback steps of calls in training that do not name theirs; None for the number of the config."""
    for loop in loops_of(model):
        loop.num_steps = num_steps


def trained_with(model: nn.Module, steps: tuple[int, int] | None) -> None:
    """Write to `config.trained_feedback_steps` that the model is trained with `steps`, the fewest and the most passes.

    A loss after every pass trains all passes up to the most. A model without passes has no such range.
    """
    for loop in loops_of(model):
        config = loop.config
        every = config.halting in ("learned", "act") or config.supervision == "all"
        if steps is None or own_steps(model) is None:
            config.trained_feedback_steps = None
        else:
            config.trained_feedback_steps = [1 if every and config.gradient_steps is None else steps[0], steps[1]]


def own_steps(model: nn.Module) -> int | None:
    """Return how many passes the model makes by its config; None where it makes one pass, or goes by positions."""
    loops = loops_of(model)
    steps = loops[0].num_passes() if loops else None
    alone = steps == 1 and loops[0].config.feedback_signal == "none"  # nothing is fed back to a second pass
    return None if alone else steps


@contextmanager
def with_steps(model: nn.Module, num_steps: int) -> Iterator[None]:
    """Set the number of passes in the config for the time of a `with` block, as evaluation reads it there.

    A number that the model was not trained with is chosen on purpose there, and does not warn.
    """
    configs = [loop.config for loop in loops_of(model)]
    before = [(config, name, getattr(config, name)) for config in configs for name in _names_of_steps(config)]
    try:
        for config in configs:
            for name, value in zip(_names_of_steps(config), (num_steps, None), strict=False):
                setattr(config, name, value)
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


def _names_of_steps(config: Any) -> list[str]:
    """Return the fields with the number of passes and the trained ones, as far as a checkpoint's code has them."""
    name = "num_feedback_steps" if config.feedback_axis == "depth" else "solver_steps"
    return [name] + ["trained_feedback_steps"] * hasattr(config, "trained_feedback_steps")


def loops_of(model: nn.Module) -> list[Any]:
    """Return the feedback loops of a model, found by the name of their class.

    A checkpoint may bring a FeedbackLoop of its own code, and FSDP makes a subclass.
    """
    name = FeedbackLoop.__name__
    return [module for module in model.modules() if any(kind.__name__ == name for kind in type(module).__mro__)]
