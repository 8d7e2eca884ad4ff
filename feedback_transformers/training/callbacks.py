"""Callbacks for Trainer, and the functions they are made of for loops of one's own."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

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
    """Trains each step with another number of feedback steps, so that afterwards any number works.

    A model trained at a fixed number of passes is good only at that number. Evaluation uses the config's number.

    Args:
        curriculum: the share of training over which the maximum grows linearly from `minimum` to `maximum`.
    """

    def __init__(self, minimum: int, maximum: int, curriculum: float = 0.0) -> None:
        draw_steps(0, minimum, maximum)  # refuses a wrong range at once
        if not 0 <= curriculum <= 1:
            raise ValueError(f"curriculum ({curriculum}) is a share of training, from 0 to 1.")
        self.minimum, self.maximum, self.curriculum = minimum, maximum, curriculum

    def most(self, progress: float) -> int:
        """The maximum after the share `progress` of training."""
        if progress >= self.curriculum:
            return self.maximum
        return self.minimum + int((self.maximum - self.minimum) * progress / self.curriculum)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        most = self.most(state.global_step / state.max_steps)
        set_steps(model, draw_steps(state.global_step, self.minimum, most, args.seed))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        set_steps(model, None)


def set_steps(model: nn.Module, num_steps: int | None) -> None:
    """The feedback steps of calls that don't name theirs; None for the config's."""
    for module in model.modules():
        if isinstance(module, FeedbackLoop):
            module.num_steps = num_steps


class StopOnNonFinite(TrainerCallback):
    """Raises, before the weights change, when the loss or a gradient is NaN or infinite, and names the step."""

    def __init__(self) -> None:
        self.loss: torch.Tensor | None = None
        self.hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.hook = model.register_forward_hook(self.remember)

    def remember(self, model: nn.Module, args: Any, output: Any) -> None:
        loss = output.get("loss") if hasattr(output, "get") else None
        if model.training and loss is not None:
            loss = loss.detach()
            self.loss = loss if self.loss is None else self.loss + loss  # of the micro-batches of a step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        loss, self.loss = self.loss, None
        if loss is not None and not torch.isfinite(loss).all():
            self.stop(args, state, f"The loss is {loss.mean().item()}")
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if args.fp16 or torch.isfinite(nn.utils.get_total_norm(gradients.values())):
            return  # the scaler of fp16 meets infinite gradients by design, and skips such steps itself
        name = next((name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()), "the model")
        self.stop(args, state, f"The gradient of {name} is not finite")

    def stop(self, args: TrainingArguments, state: TrainerState, what: str) -> None:
        self.hook.remove()
        checkpoint = get_last_checkpoint(args.output_dir) if args.output_dir else None
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been saved"
        raise FloatingPointError(
            f"{what} at step {state.global_step}; {kept}. Lower the learning rate, or look at the batch of that step."
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.hook.remove()
