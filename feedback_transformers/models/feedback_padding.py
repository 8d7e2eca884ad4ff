"""Move padding behind the text of each row, wherever it was given, and move outputs back.

Shapes: B batch, T positions, P positions in the cache, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def first_real(attention_mask: Tensor | None, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask [B, T] of this call with its real positions first, and the order [B, T] that puts them so.

    This is the one place that deals with left, right and inner padding. With padding behind the text, no causal part
    can see it, a convolution or a chunk of positions meets no gap, and all rows begin at the same column.

    Args:
        attention_mask: [B, T] or [B, P + T].
    """
    if attention_mask is None:
        return None, None
    mask = attention_mask[:, -length:].bool()
    if not torch.compiler.is_compiling():  # which cannot look at the values, and takes the general way
        if mask.all():
            return None, None
        if (mask[:, 1:] <= mask[:, :-1]).all():
            return mask, None
    order = real_first(mask)
    return mask.gather(1, order), order


def all_real(mask: Tensor) -> bool:
    """Return whether no position is padding, as far as that is known: a compiled model can't look at the values."""
    return not torch.compiler.is_compiling() and bool(mask.all())


def real_first(mask: Tensor) -> Tensor:
    """Return the order [B, T] that puts the real positions of a mask [B, T] first, and keeps the order of each kind.

    It counts instead of sorting, as ONNX has no stable sort.
    """
    real = mask.long()
    seen = real.cumsum(dim=1)
    place = torch.where(mask, seen, seen[:, -1:] + (1 - real).cumsum(dim=1)) - 1
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(place)
    return torch.empty_like(place).scatter(1, place, columns)


def fixed_length(length: int) -> int:
    """Return the number of positions that a loop walks; raise ValueError where an export leaves it open."""
    if isinstance(length, torch.SymInt):
        raise ValueError(
            "Position by position the length must be fixed: export with one length, or a model with "
            "feedback_axis='depth', or with solver='jacobi' and a cell that is not recurrent."
        )
    return length


def gather(x: Tensor, order: Tensor | None) -> Tensor:
    """Return x [B, T, D] in `order` [B, T]."""
    return x if order is None else x.gather(1, order[..., None].expand_as(x))


def scatter(x: Tensor, order: Tensor | None) -> Tensor:
    """Return x [B, T] or [B, T, D] in the order in which the positions were given."""
    if order is None:
        return x
    return torch.empty_like(x).scatter(1, order if x.ndim == 2 else order[..., None].expand_as(x), x)


def behind_padding(attention_mask: Tensor) -> Tensor:
    """Return which real positions stand right behind padding, [B, T].

    The position before has read all of the text, since padding stands behind it inside the model.
    """
    real = attention_mask.bool()
    return real & ~F.pad(real, (1, 0), value=True)[:, :-1]
