"""Tables of names that turn the weights of a published model into ours, and back without a loss.

A row says which weight of theirs holds which weights of ours, and how: as it is, in rows that follow each other, or in
another order. `{n}` in a name stands for the number of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Weights = dict[str, Tensor]


class Whole:
    """One weight, as it is."""

    def split(self, weight: Tensor) -> list[Tensor]:
        """Return our weights of theirs."""
        return [weight]

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        """Return their weight of ours."""
        return weights[0]


class Rows(Whole):
    """Several weights of these numbers of rows, one below the other."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = list(sizes)

    def split(self, weight: Tensor) -> list[Tensor]:
        return list(weight.split(self.sizes))

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(weights))


class PairedRows(Rows):
    """Rows of which those of the first `rotated` weights turn in neighbouring pairs, and ours in halves of a head."""

    def __init__(self, *sizes: int, head_dim: int, rotated: int = 2) -> None:
        super().__init__(*sizes)
        self.head_dim, self.rotated = head_dim, rotated

    def split(self, weight: Tensor) -> list[Tensor]:
        parts = super().split(weight)
        return [self.halves(part) if i < self.rotated else part for i, part in enumerate(parts)]

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        return super().join([self.pairs(part) if i < self.rotated else part for i, part in enumerate(weights)])

    def halves(self, part: Tensor) -> Tensor:
        """Put rows 0, 2, 4, ... of each head before rows 1, 3, 5, ..."""
        return part.reshape(-1, self.head_dim // 2, 2, *part.shape[1:]).transpose(1, 2).reshape(part.shape)

    def pairs(self, part: Tensor) -> Tensor:
        """Undo `halves`."""
        return part.reshape(-1, 2, self.head_dim // 2, *part.shape[1:]).transpose(1, 2).reshape(part.shape)


class PairedBias(PairedRows):
    """The biases [2, 1, H, d] of queries and keys."""

    def split(self, weight: Tensor) -> list[Tensor]:
        return super().split(weight.flatten())

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        return super().join(weights).reshape(2, 1, -1, self.head_dim)


class SwappedColumns(Whole):
    """A matrix on [φ; e], which is on [e; φ] here."""

    def split(self, weight: Tensor) -> list[Tensor]:
        return [weight.roll(weight.shape[1] // 2, dims=1)]

    def join(self, weights: Sequence[Tensor]) -> Tensor:
        return weights[0].roll(weights[0].shape[1] // 2, dims=1)


class Row(NamedTuple):
    """A weight of theirs, and ours that it holds."""

    theirs: str
    ours: tuple[str, ...]
    how: Whole = Whole()


def layers(theirs: str, ours: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Prefix the rows of one layer."""
    for row in rows:
        yield Row(theirs + row.theirs, tuple(ours + name for name in row.ours), row.how)


def same(*names: str) -> list[Row]:
    """Return rows of weights that have the same name."""
    return [Row(name, (name,)) for name in names]


def pattern(name: str) -> re.Pattern[str]:
    """Return what finds a name and the number of its layer."""
    return re.compile(re.escape(name).replace(r"\{n\}", r"(\d+)"))


def to_ours(rows: Sequence[Row], theirs: Weights) -> Weights:
    """Return our weights of theirs.

    Raises:
        ValueError: a weight is in no row of the table.
    """
    made: Weights = {}
    for name, weight in theirs.items():
        for row in rows:
            if found := pattern(row.theirs).fullmatch(name):
                number = found.groups()[0] if found.groups() else ""
                for ours, part in zip(row.ours, row.how.split(weight), strict=True):
                    made[ours.replace("{n}", number)] = part.contiguous()
                break
        else:
            raise ValueError(f"The checkpoint holds {name}, which no part of this family has: it is of another kind.")
    return made


def to_theirs(rows: Sequence[Row], ours: Weights) -> Weights:
    """Return the official weights of ours.

    Raises:
        ValueError: a weight is in no row of the table.
    """
    made: Weights = {}
    left = dict(ours)
    for row in rows:
        for name in list(left):
            if found := pattern(row.ours[0]).fullmatch(name):
                number = found.groups()[0] if found.groups() else ""
                names = [each.replace("{n}", number) for each in row.ours]
                made[row.theirs.replace("{n}", number)] = row.how.join([left.pop(each) for each in names]).contiguous()
    if left:
        raise ValueError(f"{next(iter(left))} has no place in the official layout of this family.")
    return made


def refuse(config: dict[str, Any], **plain: Any) -> None:
    """Raise ValueError for a feature that is not built; `plain` are the values without it."""
    for name, value in plain.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"The published config asks for {name}={config[name]!r}, which is not built here.")
