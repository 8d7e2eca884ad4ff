"""Check the columns and rows of a data set, and split rows off for validation."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import lines_of_rows

if TYPE_CHECKING:
    from datasets import Dataset

SHOWN = 5  # lines that an error names
FEWEST = 4  # rows of a class from which one is taken for validation, however small the share


def check_columns(dataset: Any, texts: bool = True, **columns: str) -> None:
    """Check that every split has the `columns`, by their flags; and where they are `texts`, a text in every row.

    Raises:
        ValueError: a column is missing, or a row of it holds no text.
    """
    for split, rows in dataset.items():
        for flag, column in columns.items():
            if column not in rows.column_names:
                there = ", ".join(map(repr, rows.column_names))
                raise ValueError(f"The {split} data has no column {column!r}, only {there}: give --{flag}.")
            for i, text in enumerate(rows[column]) if texts else ():
                if not isinstance(text, str):
                    raise ValueError(f"Row {i} of the {split} data has {text!r} as its {column}, which is no text.")


def is_empty(value: Any) -> bool:
    """Return whether a field of a row holds nothing: None, nan, or a text of spaces."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def without_labels(rows: Dataset, columns: list[str]) -> Dataset | None:
    """Return rows to predict without their empty columns of labels; None where one of them has a label."""
    there = [name for name in columns if name in rows.column_names]
    if not all(is_empty(value) for name in there for value in rows[name]):
        return None
    return rows.remove_columns(there)


def filled(rows: Dataset, split: str, columns: list[str], file: str | None, drop: bool) -> Dataset:
    """Return the rows that hold something in each of `columns`.

    Args:
        file: what the rows were read from, to name its lines; None for a data set with a name.
        drop: leave the empty rows out and print their number, instead of an error.

    Raises:
        ValueError: some rows are empty, and `drop` is False; or all of them are.
    """
    empty: dict[int, str] = {}
    for column in columns:
        for row, value in enumerate(rows[column]):
            if is_empty(value):
                empty.setdefault(row, column)
    if not empty:
        return rows
    if len(empty) == len(rows):
        raise ValueError(f"No row of the {split} data has {' and '.join(columns)}: there is nothing to learn from.")
    names = " or ".join(dict.fromkeys(empty.values()))
    number = f"{len(empty):,} of {len(rows):,} rows" if len(empty) > 1 else f"1 of {len(rows):,} rows"
    if not drop:
        verb = "have" if len(empty) > 1 else "has"
        raise ValueError(
            f"{number} of {file or f'the {split} data'} {verb} no {names} ({places(file, sorted(empty))}): fill them, "
            "or leave them out with --drop_empty_rows."
        )
    print(f"Left out {number} of {file or f'the {split} data'} without {names}")
    return rows.select([row for row in range(len(rows)) if row not in empty])


def places(file: str | None, rows: list[int]) -> str:
    """Return where the first of `rows` stand: "lines 3, 17" of a file, or "rows 1, 15" where rows are not lines."""
    lines = lines_of_rows(file) if file is not None else []
    more = ", ..." if len(rows) > SHOWN else ""
    if not lines or rows[-1] >= len(lines):
        return f"row{'s' * (len(rows) > 1)} {', '.join(map(str, rows[:SHOWN]))}{more}"
    several = len({path for path, _ in lines}) > 1
    named = [f"{path.name}:{line}" if several else str(line) for path, line in (lines[row] for row in rows[:SHOWN])]
    return f"line{'s' * (len(rows) > 1)} {', '.join(named)}{more}"


def split_off(rows: Dataset, share: float, shuffle: bool, by: str | None = None) -> tuple[Dataset, Dataset]:
    """Return two parts of `rows`, the second with a `share` of them.

    Args:
        shuffle: draw the second part at random; otherwise it is the end.
        by: a column of classes. Each class then has the same share in both parts, and a class of at least
            `FEWEST` rows has one in the second part.
    """
    values = list(rows[by]) if by is not None and shuffle else []
    classes = [] if any(isinstance(value, float | list | dict) for value in values) else [str(x) for x in values]
    counts = Counter(classes)
    if not counts or max(counts.values()) < 2:
        parts = rows.train_test_split(share, shuffle=shuffle, seed=0)
        return parts["train"], parts["test"]
    mixed = np.random.default_rng(0).permutation(len(rows))
    order = np.asarray(sorted((row for row in mixed if counts[classes[row]] > 1), key=lambda row: classes[row]))
    number = max(1, round(len(order) * share))
    chosen = order[
        ((np.arange(number) + 0.5) * len(order) / number).astype(int)
    ]  # of each class its share; the only row of a class stays in train
    there = {classes[row] for row in chosen}
    lacking = [name for name, count in counts.items() if count >= FEWEST and name not in there]
    chosen = np.append(chosen, [next(row for row in order if classes[row] == name) for name in lacking]).astype(int)
    rest = np.setdiff1d(mixed, chosen)
    return rows.select(np.random.default_rng(0).permutation(rest)), rows.select(np.sort(chosen))
