"""Stop training at NaN or infinity, before the weights change, and say where it began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .checkpoints import last_complete_checkpoint


class StopOnNonFinite(TrainerCallback):
    """Raise an error, before the weights change, when the loss or a gradient is NaN or infinite.

    The error names the step, the last good checkpoint, the layer where it began and the batch: its number, and its
    rows of the data where they can be told. It is kept too, in `non_finite_batch_<process>.pt` in `output_dir`.
    To name the layer, the step is made once more, watched; until then nothing is watched but the loss and the norm of
    the gradient. Weights that are not finite are not saved.
    """

    def __init__(self) -> None:
        self.loss: Tensor | None = None
        self.batches: list[tuple[Tensor, dict[str, Any]]] = []  # of a step: the random state before, the inputs
        self.hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.release()  # of a run that was interrupted
        self.hooks = [
            model.register_forward_pre_hook(self.keep, with_kwargs=True),
            model.register_forward_hook(self.remember),
        ]

    def keep(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        if model.training:
            self.batches.append((torch.get_rng_state(), inputs))

    def remember(self, model: nn.Module, args: Any, output: Any) -> None:
        loss = output.get("loss") if hasattr(output, "get") else None
        if model.training and loss is not None:
            loss = loss.detach()
            self.loss = loss if self.loss is None else self.loss + loss  # of the micro-batches of a step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        loss, self.loss = self.loss, None
        batches, self.batches = self.batches, []
        if loss is not None and not torch.isfinite(loss).all():
            what, backward = f"The loss is {loss.mean().item()}", False
        else:
            gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            if args.fp16 or torch.isfinite(nn.utils.get_total_norm(gradients.values())):
                return  # the scaler of fp16 meets infinite gradients by design, and skips such steps itself
            name = next(
                (name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()), "a weight"
            )
            what, backward = f"The gradient of {name} is not finite", args.world_size == 1  # else DDP would wait
        self.release()
        for number, (random_state, inputs) in enumerate(batches):
            torch.set_rng_state(random_state)
            where = first_non_finite(model, inputs, backward)
            if where is not None:
                batch = _describe(number, inputs, args, state, kwargs["train_dataloader"])
                path = Path(str(args.output_dir), f"non_finite_batch_{args.process_index}.pt")
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save({"step": state.global_step, "random_state": random_state, "inputs": inputs}, path)
                self.stop(args, state, what, f"It began in {where}, with {batch}, which is kept in {path}")
        self.stop(args, state, what, "Made once more on this process the step was finite, so that no layer is named")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if control.should_save:
            for name, parameter in model.named_parameters():
                if not torch.isfinite(parameter).all():
                    self.release()
                    self.stop(args, state, f"The weight {name} is not finite", "The update made it so")

    def stop(self, args: TrainingArguments, state: TrainerState, what: str, where: str) -> None:
        folder = str(args.output_dir)
        checkpoint = Path(folder).exists() and (last_complete_checkpoint(folder) or get_last_checkpoint(folder))
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been saved"
        raise FloatingPointError(
            f"{what} at step {state.global_step}; {kept}. {where}: lower the learning rate, or look at the batch."
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.release()

    def release(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.loss, self.batches, self.hooks = None, [], []


def first_non_finite(model: nn.Module, inputs: dict[str, Any], backward: bool = False) -> str | None:
    """Find where `model(**inputs)`, or with `backward` the gradient of its loss, first is NaN or infinite, or None.

    In words: the output of a layer, the gradient at one, the gradient of a weight, or the loss. A layer that is called
    once per feedback step is named with the number of the call.
    """
    found: list[str] = []
    calls: Counter[str] = Counter()

    def check(where: str, tensor: Tensor) -> None:
        if not found and not torch.isfinite(tensor).all():
            found.append(where)

    def watch(name: str, module: nn.Module, args: Any, output: Any) -> None:
        calls[name] += 1
        where = f"the output of {name} (call {calls[name]})" if name else "the loss"
        broken = [weight for weight, p in module.named_parameters(recurse=False) if not torch.isfinite(p).all()]
        where += f", whose {' and '.join(broken)} is not finite" if broken else ""
        for tensor in _tensors(output):
            check(where, tensor.detach())
            if backward and tensor.requires_grad:
                tensor.register_hook(partial(check, f"the gradient at {where}"))

    hooks = [module.register_forward_hook(partial(watch, name)) for name, module in model.named_modules()]
    if backward:
        named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        hooks += [p.register_hook(partial(check, f"the gradient of {name}")) for name, p in named]
    try:
        with torch.set_grad_enabled(backward):
            output = model(**inputs)
            loss = output.get("loss") if hasattr(output, "get") else None
            if backward and not found and loss is not None:
                loss.sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[Tensor]:
    """Return the floating-point tensors in what a layer returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and not output.is_meta:
            yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


def _describe(number: int, inputs: dict[str, Any], args: TrainingArguments, state: TrainerState, loader: Any) -> str:
    """Say where in the data the batch `number` of this step is."""
    number += state.global_step * args.gradient_accumulation_steps
    if isinstance(loader.dataset, IterableDataset):
        return f"batch {number} of the stream"
    updates = -(-len(loader) // args.gradient_accumulation_steps)
    epoch, update = divmod(state.global_step, updates)
    number -= epoch * updates * args.gradient_accumulation_steps
    rows = _rows(loader, number, inputs)
    return f"batch {number} of epoch {epoch}" + (f" (rows {', '.join(map(str, rows))} of the data)" if rows else "")


def _rows(loader: Any, number: int, inputs: dict[str, Any]) -> list[int]:
    """Return what the sampler drew, if it draws the same once more, so that these rows do make this batch."""
    rows: list[int] = next(islice(iter(loader.batch_sampler), number, None), [])
    batch = loader.collate_fn([loader.dataset[row] for row in rows]) if rows else {}
    shared = [name for name in batch if name in inputs]
    same = all(torch.equal(torch.as_tensor(batch[name]), inputs[name].cpu()) for name in shared)
    return rows if shared and same else []
