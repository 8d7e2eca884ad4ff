"""Decide what the labels of a data set are: one class, several classes, or numbers."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PreTrainedModel

from .arguments import ModelArguments
from .labels import with_classes

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SINGLE, MULTI, NUMBERS = "single_label_classification", "multi_label_classification", "regression"
PROBLEMS = (SINGLE, MULTI, NUMBERS)


@dataclass
class Targets:
    """What a classifier predicts: `problem` as transformers' `problem_type`, and the `names` of its outputs."""

    problem: str
    names: list[str]

    @property
    def labels(self) -> dict[str, Any]:
        """The fields of the config."""
        names = dict(enumerate(self.names))
        return {"problem_type": self.problem, "id2label": names, "label2id": {name: i for i, name in names.items()}}

    def __str__(self) -> str:
        shown = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
        if self.problem == NUMBERS:
            return f"numbers (regression): {shown}"
        many = "one of" if self.problem == SINGLE else "any of"
        return f"{many} {len(self.names):,} classes: {shown}"


def read_targets(
    dataset: DatasetDict,
    columns: Sequence[str],
    problem: str | None = None,
    separator: str | None = None,
    known: Targets | None = None,
    trains: bool = True,
) -> tuple[DatasetDict, Targets]:
    """Return the data set with a column `labels` as the model takes it, and what the labels are.

    A column of lists, or several columns of 0 and 1, name any number of classes for a row. A column of numbers with
    decimals is a regression. Everything else, whole numbers too, names one class.

    Args:
        problem: one of PROBLEMS, to decide it otherwise.
        separator: splits a text into the names of several classes, as | in "drama|history".
        known: what the checkpoint predicts. Its classes are kept, unless it `trains` and meets another one.

    Raises:
        ValueError: labels are of several kinds, or a split has a class that train lacks.
    """
    if problem not in (None, *PROBLEMS):
        raise ValueError(f"Unknown problem_type {problem!r}; choose one of {', '.join(PROBLEMS)}.")
    labelled = {split: rows for split, rows in dataset.items() if set(columns) <= set(rows.column_names)}
    if not labelled:
        if known is None:
            raise ValueError("There are no labels to learn from: give --train_file with --label_column.")
        return dataset, known
    first = labelled.get("train", next(iter(labelled.values())))
    if problem is None:
        problem = known.problem if known is not None and not trains else problem_of(first, columns, separator)
    if problem == SINGLE:
        return _one_class(dataset, labelled, columns, known, trains)
    if problem == NUMBERS:
        values = {split: numbers(rows, columns) for split, rows in labelled.items()}
        return _with_labels(dataset, values), Targets(NUMBERS, list(columns))
    return _any_classes(dataset, labelled, columns, separator, known, trains)


def known_targets(model_args: ModelArguments, auto: Any) -> Targets | None:
    """Return what the checkpoint predicts, if it is a classifier of the kind of `auto` with names for its classes."""
    names = model_args.classes(auto)
    if not names:
        return None
    config = AutoConfig.from_pretrained(str(model_args.model_name_or_path), **model_args.hub_options)
    return Targets(config.problem_type or (SINGLE if len(names) > 1 else NUMBERS), names)


def problem_of(rows: Dataset, columns: Sequence[str], separator: str | None = None) -> str:
    """Return the problem_type that the labels of `rows` look like."""
    values = [value for name in columns for value in rows[name]]
    if any(isinstance(value, list | tuple) or is_list(value) for value in values) or separator:
        return MULTI
    numeric = all(isinstance(value, int | float) for value in values)
    if len(columns) > 1:
        return MULTI if numeric and set(values) <= {0, 1} else NUMBERS
    if numeric and any(isinstance(value, float) and not value.is_integer() for value in values):
        return NUMBERS
    return SINGLE


def is_list(value: Any) -> bool:
    """Return whether a text is a list in Python's words, as pandas writes one to a csv file."""
    return isinstance(value, str) and value.startswith("[") and value.endswith("]")


def numbers(rows: Dataset, columns: Sequence[str]) -> list[list[float]]:
    """Return the labels of each row as numbers, one of each column."""
    found = []
    for name in columns:
        try:
            found.append([float(value) for value in rows[name]])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The column {name!r} does not hold numbers alone ({error}): choose another --problem_type."
            ) from None
    return [list(row) for row in zip(*found, strict=True)]


def classes_of(value: Any, separator: str | None = None) -> list[str]:
    """Return the names of the classes of a row: of a list, or of a text that holds one."""
    if is_list(value):
        value = ast.literal_eval(value)
    elif isinstance(value, str):
        value = [part.strip() for part in value.split(separator)] if separator else [value]
    names = [str(name) for name in (value if isinstance(value, list | tuple) else [value])]
    if len(set(names)) < len(names):
        raise ValueError(
            f"The labels {names} of a row name a class twice: name each class once, or give a column of 0 and 1 for "
            "each class, as in --label_column drama,history."
        )
    return names


def _one_class(
    dataset: DatasetDict, labelled: dict[str, Any], columns: Sequence[str], known: Targets | None, trains: bool
) -> tuple[DatasetDict, Targets]:
    if len(columns) > 1:
        raise ValueError("One class for a row stands in one column: give one --label_column.")
    names = known.names if known is not None and known.problem == SINGLE else []
    if "train" not in labelled:
        labelled = {**labelled, "train": next(iter(labelled.values())).select([])}
    numbered = with_classes(type(dataset)(labelled), columns[0], names, trains)
    kinds = numbered["train"].features[columns[0]].names
    values = {split: list(numbered[split][columns[0]]) for split in labelled if split in dataset}
    return _with_labels(dataset, values), Targets(SINGLE, kinds)


def _any_classes(
    dataset: DatasetDict,
    labelled: dict[str, Any],
    columns: Sequence[str],
    separator: str | None,
    known: Targets | None,
    trains: bool,
) -> tuple[DatasetDict, Targets]:
    if len(columns) > 1:
        found = {
            split: [
                [name for name, there in zip(columns, row, strict=True) if there] for row in numbers(rows, columns)
            ]
            for split, rows in labelled.items()
        }
        every = list(columns)
    else:
        found = {
            split: [classes_of(value, separator) for value in rows[columns[0]]] for split, rows in labelled.items()
        }
        every = sorted({name for names in found.get("train", []) for name in names})
    names = known.names if known is not None and known.problem == MULTI else []
    if not names or (trains and set(every) - set(names)):
        names = every
    places = {name: place for place, name in enumerate(names)}
    values: dict[str, list[list[float]]] = {}
    for split, rows in found.items():
        unknown = sorted({name for row in rows for name in row} - places.keys())
        if unknown:
            raise ValueError(f"The {split} data has the class {unknown[0]!r}, and train only {', '.join(names[:20])}.")
        values[split] = [[float(name in row) for name in names] for row in rows]
    return _with_labels(dataset, values), Targets(MULTI, names)


def _with_labels(dataset: DatasetDict, values: dict[str, list]) -> DatasetDict:
    """Return the data set with `values` as the column `labels` of the splits that have some."""
    for split, labels in values.items():
        rows = dataset[split]
        if "labels" in rows.column_names:
            rows = rows.remove_columns("labels")
        dataset[split] = rows.add_column("labels", labels)
    return dataset


def class_weights(labels: Sequence[int], count: int) -> list[float]:
    """Return a weight for each class, so that all classes weigh the same and the mean over the rows is 1."""
    rows = Counter(labels)
    return [len(labels) / (len(rows) * rows[number]) if rows[number] else 0.0 for number in range(count)]


def balance_classes(model: PreTrainedModel, targets: Targets, labels: Sequence[int]) -> None:
    """Let each class weigh the same in the loss of `model`, by its number of `labels`.

    Raises:
        ValueError: the labels are not one class for each row.
    """
    if targets.problem != SINGLE:
        raise ValueError("--class_weights balanced is for one class in each row: leave it out.")
    weights = torch.tensor(class_weights(labels, len(targets.names)))
    print("Weights: " + ", ".join(f"{name} {weight:.2f}" for name, weight in zip(targets.names, weights, strict=True)))
    model.class_weights = weights
