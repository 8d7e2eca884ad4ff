"""Objectives: how the losses of the passes add up; losses over targets, and checks of labels.

Shapes: B batch, T positions, D hidden size, V vocabulary, L labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .feedback_padding import behind_padding

logger = logging.get_logger(__name__)


class Losses(NamedTuple):
    """What a head says of an answer y [B, T, D], for objectives to put together."""

    mean: Callable[[Tensor], Tensor]  # y -> []
    weighted: Callable[[Tensor, Tensor], Tensor] | None = None  # y, p [B, T] -> [], each position weighted by p
    over_targets: Callable[[Tensor], Tensor] = torch.mean  # x [B, T] -> [], the mean where the loss counts
    right: Callable[[Tensor], Tensor] | None = None  # y -> [B], whether all of a row is predicted right


def losses_of_units(
    units: Callable[[Tensor], Tensor],
    counted: Tensor,
    read: Callable[[Tensor], Tensor],
    over: Callable[[Tensor], Tensor] | None = None,
    count: Tensor | int | None = None,
    right: Callable[[Tensor], Tensor] | None = None,
) -> Losses:
    """Return what a head says of an answer, from the loss of each of its units: a row, a pixel, a box.

    Args:
        units: y -> the loss of each unit, of the shape of `counted`.
        counted: 1 for units with a target and 0 for others, [B, ...].
        read: x [B, T] -> what each unit reads of x, as it reads y.
        over: x [B, T] -> the mean of x over all positions of each unit; `read` where left out.
        count: the number of counted units of a batch that comes in parts; that of these where left out.
        right: y -> [B], whether all of a row is predicted right.
    """
    counted = counted.float()
    whole = counted.sum().clamp(min=1) if count is None else count

    def mean(losses: Tensor) -> Tensor:
        return (losses * counted).sum() / whole

    over = over or read
    return Losses(lambda y: mean(units(y)), lambda y, p: mean(units(y) * read(p)), lambda x: mean(over(x)), right)


def total_loss(config: Any, losses: Losses, outputs: Any, training: bool) -> Tensor:
    """Return the loss of a call: that of its supervised answers, and what halting adds.

    Args:
        outputs: a FeedbackModelOutput.
    """
    if outputs.halting_probabilities is not None and losses.weighted is not None:
        total = expected_loss(losses, outputs)
    else:
        answers = supervised_answers(config, outputs, training)
        total = torch.stack([losses.mean(y) for y in answers]).mean()
        if training and outputs.halting_logits is not None and losses.right is not None:
            share = losses.over_targets(torch.ones_like(outputs.last_hidden_state[..., 0]))  # of a batch in parts
            stopping = stopping_loss(losses.right, answers, outputs.halting_logits)
            total = total + config.halting_weight * share.detach() * stopping
    if outputs.halting_loss is not None:
        total = total + config.halting_weight * losses.over_targets(outputs.halting_loss)
    return total


def expected_loss(losses: Losses, outputs: Any) -> Tensor:
    """Return Σ_k p_k L_k, the loss at the pass where a position stops (PonderNet; Ouro)."""
    states = outputs.feedback_states or (outputs.last_hidden_state,)
    steps = zip(states, outputs.halting_probabilities, strict=True)
    return torch.stack([losses.weighted(y, p) for y, p in steps]).sum()  # type: ignore[misc]


def supervised_answers(config: Any, outputs: Any, training: bool) -> tuple[Tensor, ...]:
    """Return the last y; with supervision="all" in training, those of all answers that carry a gradient."""
    if not training or config.supervision != "all" or outputs.feedback_states is None:
        return (outputs.last_hidden_state,)
    passes = outputs.feedback_states
    count, every = len(passes), config.supervision_interval
    first = count - (config.gradient_steps or count)
    return tuple(y for k, y in enumerate(passes, start=1) if k > first and (k % every == 0 or k == count))


def stopping_loss(
    right: Callable[[Tensor], Tensor], answers: tuple[Tensor, ...], logits: tuple[Tensor, ...]
) -> Tensor:
    """Return the mean binary cross entropy of q_stop [B] with whether a row's answer is right (TRM)."""
    each = zip(answers, logits[-len(answers) :], strict=True)
    made = []
    for y, q in each:
        with torch.no_grad():
            target = right(y).float()
        made.append(F.binary_cross_entropy_with_logits(q[:, 0].float(), target))
    return torch.stack(made).mean()


def rows_right(logits: Tensor, targets: Tensor, ignored: int = -100) -> Tensor:
    """Return whether the logits [B, T, V] are right at each position of a row that has a target. [B]"""
    return ((logits.argmax(-1) == targets) | (targets == ignored)).all(1)


def check_shape(labels: Tensor, logits: Tensor) -> None:
    """Reject labels that are not one for each position of the logits [B, T, V]."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels have the shape {[*labels.shape]} and the logits {[*logits.shape]}: give a label for each "
            "position that has logits, -100 where there is none."
        )


def check_classes(labels: Tensor, name: str, size: int, ignored: int = -100) -> None:
    """Reject labels that are not numbers of classes below `size`, in words of the config.

    Their values are compared on a CPU only, where that costs nothing; elsewhere the loss stops in its own way.
    """
    if labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype}: give the number of a class, labels.long().")
    if torch.compiler.is_compiling() or labels.device.type != "cpu" or not labels.numel():
        return
    low, high = int(labels.masked_fill(labels == ignored, 0).min()), int(labels.max())
    if high >= size:
        raise ValueError(f"labels go up to {high} and {name} is {size}: set {name} in the config.")
    if low < 0:
        raise ValueError(f"labels go down to {low}: number them from 0, and give {ignored} where there is none.")


def shift(labels: Tensor, ignored: int = -100) -> Tensor:
    """Return the label of the next position, [B, T], as transformers' ForCausalLMLoss shifts them."""
    return F.pad(labels, (0, 1), value=ignored)[:, 1:].contiguous()


def targets_of_texts(
    targets: Tensor, mask: Tensor, num_items_in_batch: Tensor | int | None, ignored: int = -100
) -> tuple[Tensor, Tensor | int | None]:
    """Leave out the first token behind padding, which no text before it predicts; also of the number of targets.

    `targets` [B, T] stand at the position that predicts them. Padding stands behind the text inside the model, so the
    position before the first token has read all of the text. Trainer has counted that token in `num_items_in_batch`.
    The number is corrected by the share of the targets here that are left out. This is exact for a batch in one
    part. Of a batch in several parts (gradient accumulation, several processes), a part knows its own targets only:
    the loss then is a mean of the means of the parts, and each has the weight that Trainer counted. Labels of -100
    are exact there too, as training.DataCollatorForLeftPadding gives them.
    """
    hidden = F.pad(behind_padding(mask), (0, 1))[:, 1:]
    kept = targets.masked_fill(hidden.to(targets.device), ignored)
    if num_items_in_batch is None:
        return kept, None
    counted, real = (targets != ignored).sum(), (kept != ignored).sum()
    if not torch.compiler.is_compiling() and counted != real and counted != num_items_in_batch:
        logger.warning_once(
            "The first token of a text has no target, and Trainer counts it where padding stands before it: the parts "
            "of a batch are then weighted a little otherwise than on the right. Pad on the right, or wrap the data "
            "collator in feedback_transformers.training.DataCollatorForLeftPadding."
        )
    share = torch.where(real > 0, real / counted.clamp(min=1), 1.0)
    return kept, num_items_in_batch * share


def warn_of_padding(mask: Tensor) -> None:
    """Warn that a loss outside of the model would ask for the first token behind padding, where there is padding."""
    if not torch.compiler.is_compiling() and behind_padding(mask).any():
        logger.warning_once(
            "A loss that is taken outside of the model, as Trainer's label smoothing, predicts the first token behind "
            "padding from a position that has read the text, unless its label is -100: pad on the right, or wrap the "
            "data collator in feedback_transformers.training.DataCollatorForLeftPadding."
        )


def token_mean(
    x: Tensor,
    targets: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Return the mean of x [B, T] over the positions with a target, as transformers' ForCausalLMLoss takes it."""
    here = targets.to(x.device) != ignore_index
    return (x * here).sum() / (here.sum() if num_items_in_batch is None else num_items_in_batch)


def token_loss(logits: Tensor, weight: Tensor, targets: Tensor, **kwargs: Any) -> Tensor:
    """Return the cross entropy of logits [B, T, V] with targets [B, T], each position weighted by weight [B, T]."""
    ignored = kwargs.get("ignore_index", -100)
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none", ignore_index=ignored)
    return token_mean(losses * weight, targets, **kwargs)


def row_means(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of x [B, T] over the real positions of each row, [B]."""
    real = torch.ones_like(x) if mask is None else mask[:, -x.shape[1] :].to(x)
    return (x * real).sum(1) / real.sum(1).clamp(min=1)
