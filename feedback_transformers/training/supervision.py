"""Deep supervision with a carried state, and an average of the weights: what HRM and TRM are trained with.

Shapes: B rows of a batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from ..models.feedback_states import FeedbackState
from .callbacks import loops_of, set_steps

logger = logging.get_logger(__name__)


def checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of this step's checkpoint."""
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")


def load(args: TrainingArguments, state: TrainerState, name: str) -> Any:
    """Return what a callback saved in the checkpoint that a run resumes from; None at the beginning of a run."""
    file = checkpoint(args, state) / name
    if state.global_step == 0:
        return None
    if not file.exists():
        logger.warning(f"{file} is not there, so this run does not go on as the one before: resume in its output_dir.")
        return None
    return torch.load(file, weights_only=True, map_location=args.device)


def choose(rows: Tensor, new: Any, old: Any) -> Any:
    """Return `new` where rows [B] is true and `old` elsewhere, of tensors [B, ...] or tuples of them.

    A None is a state of zeros.
    """
    if isinstance(new, Tensor) or isinstance(old, Tensor):
        new = torch.zeros_like(old) if new is None else new
        old = torch.zeros_like(new) if old is None else old
        return torch.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    if new is None and old is None:
        return None
    pairs = zip(new or [None] * len(old), old or [None] * len(new), strict=True)
    return tuple(choose(rows, *pair) for pair in pairs)


class CarryState(TrainerCallback):
    """Make one answer of each row at a training step, and go on from it, detached, at the next (HRM, TRM).

    A row stays for at most `max_answers` steps, and leaves its place to the new batch's row once the model says that
    it is done, σ(q_stop) >= 0.5. So the rows that a new batch has at places which are still taken are left out. With
    the probability `exploration` a row that would leave stays, unless it has made a random number of answers.

    All batches have rows of one length. An answer takes `supervision_interval` passes, of which the last
    `gradient_steps` have a gradient. In a loop of your own, call `attach` before it and `release` behind it, and give
    inputs by name. HRM's own rule, q_stop > q_go_on with targets of Q-learning, is not here.

    Hierarchical Reasoning Model: Wang et al. 2025, arXiv:2506.21734. Tiny Recursive Model: Jolicoeur-Martineau 2025,
    arXiv:2510.04871.
    """

    FILE = "carried_state_{}.pt"  # of each process, in a checkpoint's folder

    def __init__(self, max_answers: int = 16, exploration: float = 0.1) -> None:
        if max_answers < 1 or not 0 <= exploration <= 1:
            raise ValueError(f"max_answers ({max_answers}) is at least 1, and exploration ({exploration}) a share.")
        self.max_answers, self.exploration = max_answers, exploration
        self.model: nn.Module | None = None
        self.handles: list[Any] = []
        self.over_devices = True  # whether targets are counted in all processes
        self.forget()

    def forget(self) -> None:
        """Let the next batch begin anew."""
        self.rows: dict[str, Tensor] = {}  # the inputs that the places hold
        self.state: FeedbackState | None = None
        self.done = self.answers = torch.empty(0)

    def attach(self, model: nn.Module) -> None:
        """Let calls of `model` in training go on from each other. Raises ValueError for models that make no passes."""
        loops = loops_of(model)
        config: Any = loops[0].config if len(loops) == 1 else None
        carries = config is not None and config.feedback_axis == "depth" and config.feedback_signal == "state"
        if not carries or config.feedback_connection == "memory":
            raise ValueError(
                f"This {type(model).__name__} has no state of passes in depth to carry: use feedback_axis='depth' and "
                "feedback_signal='state', or leave CarryState out."
            )
        if config.halting != "fixed" and config.halting_scope != "sequence":
            raise ValueError(
                f"halting={config.halting!r} weighs all passes of a call, and CarryState makes one answer: use "
                "halting='select' with halting_scope='sequence', or 'fixed'."
            )
        self.release()
        for hook in list(model._forward_pre_hooks.values()):
            other = getattr(hook, "__self__", None)
            if isinstance(other, CarryState):  # of a run that was interrupted
                other.release()
        self.model, loop = model, loops[0]
        set_steps(model, loop.config.supervision_interval)
        self.handles = [
            model.register_forward_pre_hook(self.fill, with_kwargs=True),
            loop.register_forward_pre_hook(self.begin),
            loop.register_forward_hook(self.end),
        ]

    def release(self) -> None:
        """Give the model its own calls back."""
        for handle in self.handles:
            handle.remove()
        if self.model is not None:
            set_steps(self.model, None)
        self.model, self.handles = None, []

    def fill(self, model: nn.Module, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Give the places that are free to rows of the batch, and keep the others."""
        if not model.training:
            return None
        if args:
            raise ValueError("CarryState keeps the inputs of each row by name: call the model with keyword arguments.")
        batch = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.ndim > 0}
        size = max(len(value) for value in batch.values())
        batch = {name: value for name, value in batch.items() if len(value) == size}
        if not self.rows:
            self.rows = {name: value.clone() for name, value in batch.items()}
            device = next(iter(batch.values())).device
            self.done = torch.ones(size, dtype=torch.bool, device=device)
            self.answers = torch.zeros(size, dtype=torch.long, device=device)
        if {name: value.shape[1:] for name, value in batch.items()} != {
            name: value.shape[1:] for name, value in self.rows.items()
        } or size > len(self.done):
            raise ValueError(
                "CarryState goes on with rows of the batch before, so all batches need one shape: pad with "
                'padding="max_length", and begin with the largest batch.'
            )
        new = self.done[:size]
        for name, value in batch.items():
            self.rows[name][:size] = choose(new, value, self.rows[name][:size])
        self.answers[:size] = torch.where(new, 0, self.answers[:size])
        filled = {name: self.rows[name][:size].clone() for name in batch}
        if given.get("num_items_in_batch") is not None:  # which Trainer has counted in the new batch
            labels = filled["labels"]
            shifted = type(model).__name__ == "FeedbackForCausalLM"
            count = ((labels[..., 1:] if shifted else labels) != -100).sum()
            filled["num_items_in_batch"] = reduce(count, "sum") if self.over_devices else count
        return args, given | filled

    def begin(self, loop: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Begin at the carried state of the rows that stay, and at the initial state of new ones."""
        if not loop.training:
            return None
        e, context, _, num_steps, *_ = args
        if num_steps is not None or loop.num_steps != loop.config.supervision_interval:
            raise ValueError(
                "CarryState makes the passes of one answer: leave SampleFeedbackSteps and num_feedback_steps out."
            )
        if self.state is None:
            return None
        size = len(e)
        old = self.state.map(lambda x: x[:size])
        first = loop.initial(e, context)
        start = FeedbackState(*choose(self.done[:size], tuple(first), tuple(old)))
        return *args[:-1], start

    def end(self, loop: Any, args: tuple[Any, ...], made: Any) -> None:
        """Keep the state, and note which rows are done."""
        if not loop.training:
            return
        now, size = made.state.detach(), len(made.state.h)
        if self.state is None:
            self.state = now.map(torch.Tensor.clone)
        else:
            for mine, new in zip(tensors(self.state), tensors(now), strict=True):
                mine[:size] = new
        self.answers[:size] += 1
        done = self.answers[:size] >= self.max_answers
        if made.halting_logits:
            stops = made.halting_logits[-1][:, 0].detach() >= 0
            drawn = torch.randint(2, max(2, self.max_answers) + 1, (size,))
            least = torch.where(torch.rand(size) < self.exploration, drawn, 0).to(stops.device)
            done = done | (stops & (self.answers[:size] >= least))
        self.done = torch.cat([done, self.done[size:]])  # not in place, as the gradient reads the old one

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if args.gradient_accumulation_steps > 1:
            raise ValueError("CarryState goes on at each training step: set gradient_accumulation_steps=1.")
        if args.label_smoothing_factor:
            raise ValueError("CarryState needs the loss that the model computes: set label_smoothing_factor=0.")
        if args.n_gpu > 1:
            raise ValueError("CarryState keeps the rows of one process: start one for each GPU, with torchrun.")
        self.over_devices = args.average_tokens_across_devices
        self.forget()
        self.attach(model)
        if (saved := load(args, state, self.FILE.format(args.process_index))) is not None:
            self.load_state_dict(saved)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.save(self.state_dict(), checkpoint(args, state) / self.FILE.format(args.process_index))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.release()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step needs, as tensors and tuples."""
        return {
            "rows": self.rows,
            "state": None if self.state is None else self.state.plain(),
            "done": self.done,
            "answers": self.answers,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.rows = saved["rows"]
        self.state = None if saved["state"] is None else FeedbackState(*saved["state"])
        self.done, self.answers = saved["done"], saved["answers"]


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors of a nested tuple, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [] if value is None else [tensor for each in value for tensor in tensors(each)]


class AverageWeights(TrainerCallback):
    """Evaluate, and end with, an exponential moving average of the trained weights: w̄ <- decay w̄ + (1 - decay) w.

    It is kept in float32. Checkpoints hold the weights themselves, and the average in a file beside them, from which a
    resumed run goes on.
    """

    FILE = "averaged_weights.pt"

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay ({decay}) lies between 0 and 1.")
        self.move = get_ema_multi_avg_fn(decay)
        self.model: Any = None
        self.average: list[Tensor] = []
        self.own: list[Tensor] | None = None  # the weights, while the average stands in their place
        self.evaluates = False
        self.handle: Any = None

    def attach(self, model: nn.Module) -> None:
        """Begin an average at the weights of `model`."""
        self.release()
        self.model = model
        self.average = [weight.detach().float().clone() for weight in self.weights()]

    def weights(self) -> list[Tensor]:
        """Return the weights that are trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of now into the average."""
        self.move(self.average, [weight.detach().float() for weight in self.weights()], 0)

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the average in the place of the weights."""
        if self.own is None:
            self.own = [weight.detach().clone() for weight in self.weights()]
            for weight, mean in zip(self.weights(), self.average, strict=True):
                weight.copy_(mean)

    @torch.no_grad()
    def release(self) -> None:
        """Put the weights back."""
        if self.own is not None:
            for weight, own in zip(self.weights(), self.own, strict=True):
                weight.copy_(own)
        self.own = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if args.load_best_model_at_end:
            raise ValueError(
                "AverageWeights ends with the average and not the best weights: set load_best_model_at_end=False."
            )
        if args.fsdp or args.deepspeed:
            raise ValueError("AverageWeights holds all weights at each process: leave FSDP and DeepSpeed out.")
        self.attach(model)
        if (saved := load(args, state, self.FILE)) is not None:
            self.average = saved
        if self.handle is not None:  # of a run that was interrupted
            self.handle.remove()
        self.handle = model.register_forward_pre_hook(self.before_call)

    def before_call(self, model: nn.Module, args: Any) -> None:
        """Evaluate with the average."""
        if self.evaluates and not model.training:
            self.swap_in()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluates = False
        self.release()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.update()
        self.evaluates = control.should_evaluate

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluates = control.should_evaluate

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.release()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 0:
            torch.save(self.average, checkpoint(args, state) / self.FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluates = False
        self.handle.remove()
        self.swap_in()
        self.own = None

    def finished(self, folder: str, model: nn.Module) -> None:
        """End with the average of a finished run, whose last checkpoint `model` has been loaded from."""
        file = Path(folder) / self.FILE
        if file.exists():
            self.attach(model)
            self.average = torch.load(file, weights_only=True)
            self.swap_in()
            self.own = None
