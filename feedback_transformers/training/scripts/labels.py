"""Check the columns of a data set, and number its labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .rows import check_columns

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def with_classes(dataset: DatasetDict, column: str, known: Sequence[str] = (), trains: bool = False) -> DatasetDict:
    """Number the labels of all splits by one list of classes: those `known` of a checkpoint, else those of train.

    Splits that were read from files of their own number their classes each for itself. A checkpoint that `trains`
    learns the classes of train, where they are others.
    """
    from datasets import ClassLabel

    check_columns(dataset, texts=False, label_column=column)
    found = {split: [*_class_names(rows, column, split)] for split, rows in dataset.items()}
    own = dataset["train"].features[column]
    if trains and set(found["train"]) - set(known):
        known = ()
    names = list(known) or (own.names if isinstance(own, ClassLabel) else sorted(set(found["train"])))
    numbers = {name: i for i, name in enumerate(names)}
    for split, labels in found.items():
        if unknown := sorted(set(labels) - numbers.keys()):
            who = "the checkpoint" if known else "train"
            raise ValueError(f"The {split} data has the class {unknown[0]!r}, and {who} only {', '.join(names[:20])}.")
        rows, kind = dataset[split], ClassLabel(names=names)
        if rows.features[column] != kind:
            values = [numbers[label] for label in labels]
            dataset[split] = rows.remove_columns(column).add_column(column, values, feature=kind)
    return dataset


def _class_names(rows: Dataset, column: str, split: str) -> Iterator[str]:
    name_of = getattr(rows.features[column], "int2str", None)
    for i, label in enumerate(rows[column]):
        if label is None or label != label:
            raise ValueError(f"Row {i} of the {split} data has no {column}: give it a class, or leave it out.")
        if name_of is not None:
            yield name_of(label)
        else:  # a file with a gap, or with decimals, has 1.0 where another has 1
            yield str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
