"""Train a model to write texts about images: captions, or answers to questions, which begin the text.

Shapes: B batch, T positions of a text, P of what it begins with.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Seq2SeqTrainer

from ...models.modeling_feedback_seq2seq import first_label
from .images import METADATA
from .rows import check_columns, filled, without_labels

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase


def check_folder(folder: str | None) -> None:
    """Raise ValueError for a folder to learn from without a table of the texts."""
    root = Path(folder or "")
    if folder is None or not root.is_dir() or any((root / name).exists() for name in METADATA):
        return
    raise ValueError(
        f'{folder} has no metadata.jsonl: write one with a line such as {{"file_name": "1.jpg", "text": "a cat"}} for '
        "each image."
    )


def with_texts(
    dataset: DatasetDict, text: str, question: str | None, files: dict[str, str], drop: bool
) -> DatasetDict:
    """Return the data set with a text in every row, and a question where there are some; a test may lack texts.

    Args:
        text, question: the columns, `question` None for captions.
        files: what each split was read from.
        drop: leave rows without a text out and print their number, instead of an error.
    """
    columns = {"text_column": text} | ({} if question is None else {"question_column": question})
    for split, rows in dataset.items():
        asked = dict(columns)
        if split == "test":
            alone = without_labels(rows, [text])
            if alone is not None:
                rows, asked = alone, {name: column for name, column in columns.items() if column != text}
        check_columns({split: rows}, False, **asked)
        folder = files.get(split, "")
        table = next((str(Path(folder, name)) for name in METADATA[:2] if Path(folder, name).is_file()), folder)
        dataset[split] = rows = filled(rows, split, list(asked.values()), table or None, drop)
        check_columns({split: rows}, True, **asked)
    return dataset


@dataclass
class Writing:
    """Turn questions and texts into what a decoder reads and writes.

    Args:
        start: the token that a target stands behind.
        longest: the most tokens of a text, with the one that ends it.
    """

    tokenizer: PreTrainedTokenizerBase
    start: int
    longest: int

    def __call__(self, text: str | None, question: str | None = None) -> dict[str, Tensor]:
        """Return `decoder_input_ids` [T] and, of a text, `labels` [T], which are -100 for the question."""
        begun = [] if question is None else self.ids(question)
        if text is None:
            return {"decoder_input_ids": torch.tensor([self.start, *begun])}
        end = self.tokenizer.eos_token_id
        written = [*self.ids(text if question is None else f" {text}")[: self.longest - 1], end]
        read = [self.start, *begun, *written[:-1]]
        return {"decoder_input_ids": torch.tensor(read), "labels": torch.tensor([-100] * len(begun) + written)}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def texts(self, ids: Any) -> list[str]:
        """Return the texts of ids [B, T], in which -100 is padding, with single spaces between words."""
        ids = torch.as_tensor(ids)
        ids = ids.masked_fill(ids < 0, self.tokenizer.pad_token_id)
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return a batch: texts are padded behind their end, and what a text only begins with before its start."""
        ids, pad = [row["decoder_input_ids"] for row in rows], self.tokenizer.pad_token_id
        batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
        if "labels" not in rows[0]:
            return {**batch, "decoder_input_ids": pad_sequence(ids, True, pad, "left")}
        labels = pad_sequence([row["labels"] for row in rows], True, -100)
        return {**batch, "decoder_input_ids": pad_sequence(ids, True, pad), "labels": labels}


def beginnings(decoder_input_ids: Tensor, labels: Tensor, pad: int) -> Tensor:
    """Return what stands before the first label of each row, start token and question, [B, P], padded on the left."""
    ends = (first_label(labels)[:, 0] + 1).tolist()
    rows = [ids[:end] for ids, end in zip(decoder_input_ids, ends, strict=True)]
    return pad_sequence(rows, True, pad, "left")


class CaptionTrainer(Seq2SeqTrainer):
    """Let the model write on behind a question, and return what it writes, without the question."""

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[float | None, Tensor | None, Tensor | None]:
        begun, given = inputs["decoder_input_ids"], {**getattr(self, "_gen_kwargs", {}), **gen_kwargs}
        whole = self.accelerator.unwrap_model(model)
        if "labels" in inputs:
            begun = beginnings(begun, inputs["labels"], whole.config.pad_token_id)
            given["decoder_input_ids"] = begun.to(self.args.device)
        longest = whole.generation_config.max_length
        loss, written, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **given)
        whole.generation_config.max_length = longest  # Trainer sets it to 20, beside the max_new_tokens that count
        if written is not None and not prediction_loss_only:
            written = written[:, begun.shape[1] :]
        return loss, written, labels


def exact_match(written: list[str], texts: list[str]) -> float:
    """Return the share of texts that are written as they are."""
    return sum(one == other for one, other in zip(written, texts, strict=True)) / len(texts)


def without_images(rows: Dataset, text: str, question: str | None, test: Dataset) -> list[str]:
    """Return the most common text of `rows` for each row of a test, where there is a question, of those to it."""
    every = Counter(rows[text]).most_common(1)[0][0]
    if question is None:
        return [every] * len(test)
    known: dict[str, Counter] = {}
    for asked, answer in zip(rows[question], rows[text], strict=True):
        known.setdefault(asked, Counter())[answer] += 1
    return [known[asked].most_common(1)[0][0] if asked in known else every for asked in test[question]]
