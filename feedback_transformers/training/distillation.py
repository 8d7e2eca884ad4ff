"""Distillation: a causal language model that learns something new stays near what a teacher predicts.

Shapes: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

READ = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")  # by the teacher too


def divergence(
    logits: Tensor,
    teacher: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Return KL(teacher || model) of logits [B, T, V], in nats: the mean over the tokens that the loss counts.

    As in the loss, labels [B, T] are shifted, and a batch that comes in parts is divided by `num_items_in_batch`, the
    number of tokens in all of them. Padding is left out even if it has labels, and so is what it would
    predict: the first token behind padding on the left.
    """
    counted = labels[:, 1:] != -100
    if attention_mask is not None:
        counted = counted & attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
    log_q, log_p = (F.log_softmax(given[:, :-1][counted].float(), dim=-1) for given in (logits, teacher))
    total = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / total


class Distill(TrainerCallback):
    """Add `weight` times KL(teacher || model) on the same text to the loss that the model is trained with.

    It is added to the output of the model, so that Trainer scales it as it does the loss; StopOnNonFinite sees the sum
    where it comes later in `callbacks`. The teacher may be the original of a retrofit, and costs no memory then: the
    weights that they share must be frozen, as they are under an adapter.
    """

    def __init__(self, teacher: PreTrainedModel, weight: float = 1.0) -> None:
        self.teacher, self.weight = teacher.eval(), weight
        self.autocast: Any = None
        self.hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        if any(id(parameter) in trained for parameter in self.teacher.parameters()):
            raise ValueError("The model trains weights that its teacher shares: freeze them, or distill from a copy.")
        self.teacher.to(args.device)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
        self.autocast = torch.autocast(args.device.type, dtype, enabled=dtype is not None)
        self.release()  # of a run that was interrupted
        self.hook = model.register_forward_hook(self.add, with_kwargs=True)

    def add(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not model.training:
            return
        if output.get("loss") is None:
            raise ValueError("Distillation adds to the loss that the model computes: give labels, without smoothing.")
        with torch.no_grad(), self.autocast:
            teacher = self.teacher(**{name: kwargs[name] for name in READ if name in kwargs}, use_cache=False)
        mask, items = kwargs.get("attention_mask"), kwargs.get("num_items_in_batch")
        apart = divergence(output.logits, teacher.logits, kwargs["labels"], mask, items)
        output.loss = output.loss + self.weight * apart

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.release()

    def release(self) -> None:
        if self.hook is not None:
            self.hook.remove()
