"""Inputs: raw data -> embeddings [B, T, D], a mask, and the grid whose cells the positions are.

A modality is a subclass of Input, in a file of its own, and a row of INPUTS in feedback_modalities.py.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .feedback_padding import all_real


class Embedded(NamedTuple):
    """What an input makes of raw data."""

    x: Tensor  # [B, T, D]
    mask: Tensor | None = None  # [B, T] bool, False where padding; None where all are real, or the caller has a mask
    grid: tuple[int, ...] = ()  # sizes of a grid of T cells, the last axis fastest; () for a plain sequence


@dataclass(kw_only=True)
class Fields:
    """Fields of an input of one type, a part of FeedbackConfig."""

    type: str

    def check(self) -> None:
        """Raise ValueError for what can't be built."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Input(nn.Module):
    """Base of inputs, built from the config and their own fields; `forward` takes what `takes` names."""

    Fields: ClassVar[type[Fields]] = Fields
    takes: tuple[str, ...] = ("input_ids",)  # arguments of the model; the first one holds the data
    axes = 1  # of the grid: 1 for a sequence, 2 for an image, 3 for a video, 0 where it is not known
    layer = "projection"  # the module that get_input_embeddings returns

    def __init__(self, config: Any, fields: Any) -> None:
        super().__init__()
        self.fields, self.takes = fields, self.takes_of(fields)

    @classmethod
    def takes_of(cls, fields: Any) -> tuple[str, ...]:
        """Return the arguments that an input of these fields takes."""
        return cls.takes


class GridPositions(nn.Module):
    """A learned map of sines and cosines of each coordinate of a cell, for grids of any size: [T, D].

    The wavelengths are those of Vaswani et al. 2017, from 2π cells to WAVES of them.
    """

    FREQUENCIES, WAVES = 16, 1000.0

    def __init__(self, axes: int, size: int) -> None:
        super().__init__()
        self.projection = nn.Linear(2 * self.FREQUENCIES * axes, size, bias=False)

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        weight = self.projection.weight
        steps = torch.arange(self.FREQUENCIES, device=weight.device) / self.FREQUENCIES
        lines = [torch.arange(size, device=weight.device) for size in grid]
        places = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).view(prod(grid), len(grid), 1)
        angles = places * self.WAVES**-steps  # [T, axes, frequencies]
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        return self.projection(waves.to(weight.dtype))


class GridInput(Input):
    """Cut an array [B, C, *sizes] into boxes of `boxes` numbers, a position each; any sizes, padded with zeros."""

    def __init__(self, config: Any, fields: Any, channels: int, boxes: tuple[int, ...]) -> None:
        super().__init__(config, fields)
        self.channels, self.boxes = channels, boxes
        conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[self.axes]
        self.projection = conv(channels, config.hidden_size, kernel_size=boxes, stride=boxes)
        learned = fields.positions == "grid"
        self.positions = GridPositions(self.axes, config.hidden_size) if learned else None

    def cut(self, pixels: Tensor, pixel_mask: Tensor | None) -> Embedded:
        """Return the positions of pixels [B, C, *sizes], of which pixel_mask [B, *sizes] tells the real ones."""
        sizes = pixels.shape[2:]
        missing = [-size % box for size, box in zip(sizes, self.boxes, strict=True)]
        if any(missing):
            pixels = F.pad(pixels, [n for more in reversed(missing) for n in (0, more)])
        mask = None
        if pixel_mask is not None:
            if pixel_mask.shape != (len(pixels), *sizes):
                raise ValueError(
                    f"The mask of the pixels has the shape {[*pixel_mask.shape]} and they {[len(pixels), *sizes]}: "
                    "give 1 for each real pixel and 0 for padding."
                )
            pool = {2: F.max_pool2d, 3: F.max_pool3d}[self.axes]
            padded = F.pad(pixel_mask.to(pixels.dtype), [n for more in reversed(missing) for n in (0, more)])
            pixels = pixels * padded[:, None]
            mask = pool(padded[:, None], self.boxes).flatten(1) > 0
            mask = None if all_real(mask) else mask
        cells = self.projection(pixels)  # [B, D, *grid]
        x = cells.flatten(2).transpose(1, 2)
        grid = tuple(cells.shape[2:])
        if self.positions is not None:
            x = x + self.positions(grid)
        return Embedded(x, mask, grid)


def at_least_one(fields_of_input: Fields, *names: str) -> None:
    """Raise ValueError unless these fields are whole numbers of at least 1."""
    for name in names:
        value = getattr(fields_of_input, name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise ValueError(
                f"{name} of an input of {fields_of_input.type} is {value!r}; it must be a whole number above 0."
            )


def one_of(fields_of_input: Fields, name: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless the field is one of the known values."""
    value = getattr(fields_of_input, name)
    if value not in known:
        raise ValueError(
            f"Unknown {name} {value!r} of an input of {fields_of_input.type}; choose one of {', '.join(known)}."
        )


def names_of(kind: type[Fields]) -> list[str]:
    """Return the names of the fields of an input, but for its type."""
    return [each.name for each in fields(kind) if each.name != "type"]
