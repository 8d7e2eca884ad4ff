"""Prepare batches for a loss that does not depend on the side of padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..models.feedback_padding import behind_padding


@dataclass
class DataCollatorForLeftPadding:
    """Wrap a data collator: label the first token behind padding -100, as no text before it predicts it.

    Trainer counts the targets of a whole batch before the model sees a part of it, and its label smoothing takes the
    loss outside of the model. With these labels both are exact on the left too.

    Args:
        collator: makes a batch with `labels` [B, T] and `attention_mask` [B, T] of rows.
    """

    collator: Callable[[list[Any]], Any]

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collator(rows)
        batch["labels"] = batch["labels"].masked_fill(behind_padding(batch["attention_mask"]), -100)
        return batch
