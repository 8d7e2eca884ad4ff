"""Check the arguments of `forward`, so that none is ignored in silence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from transformers.utils import can_return_tuple

PACKED = (
    "Several texts in one row would read each other: give each a row of its own, with padding; in TRL set "
    "packing=False and padding_free=False."
)
OF_PACKED_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def named_arguments(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `forward`: reject arguments that the model would ignore, and return a tuple with `return_dict=False`.

    The model knows what the signature of `forward` names. A `forward` that ends with `**kwargs` also takes the names
    in the model's `more_arguments`. Trainer keeps only those columns of a dataset that the signature names, so every
    argument that can be a column has to be there.
    """
    parameters = list(signature(forward).parameters.values())[1:]
    named = {parameter.name for parameter in parameters if parameter.kind is not Parameter.VAR_KEYWORD}
    takes_more = len(named) < len(parameters)

    @wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_attentions", self.config.output_attentions):
            raise ValueError("Attention weights are not returned: leave output_attentions out.")
        known = named.union(self.more_arguments) if takes_more else named
        for name, value in kwargs.items():
            if name not in known and not changes_nothing(name, value):
                raise ValueError(refusal(self, name, known))
        return forward(self, *args, **{name: value for name, value in kwargs.items() if name in known})

    return can_return_tuple(checked)


def changes_nothing(name: str, value: Any) -> bool:
    """Tell whether a model that does not read this argument computes what the caller expects."""
    return value is None or name == "use_cache" or (name.startswith("output_") and value is False)


def refusal(model: Any, name: str, known: Iterable[str]) -> str:
    """Return the sentence that rejects the argument `name`."""
    kind = type(model).__name__
    if name in OF_PACKED_ROWS:
        return f"{name}: {PACKED}"
    if advice := model.unread.get(name):
        return f"{kind} does not read {name}: {advice}."
    if meant := get_close_matches(name, known, n=1, cutoff=0.8):
        return f"{kind} does not know {name}: did you mean {meant[0]}?"
    return f"{kind} does not read {name}: leave it out."


def check_positions(name: str, value: Tensor | None, batch: int, lengths: tuple[int, ...]) -> None:
    """Reject `value`, unless its shape is [batch, one of `lengths`]."""
    if value is None or (value.ndim == 2 and value.shape[0] == batch and value.shape[1] in lengths):
        return
    expected = " or ".join(str([batch, length]) for length in dict.fromkeys(lengths))
    raise ValueError(
        f"{name} has the shape {[*value.shape]}; it must have the shape {expected}, [batch, positions]"
        + (" of the input or of the cache and the input." if len(set(lengths)) > 1 else ".")
    )


def check_types(token_type_ids: Tensor | None, embedded: Tensor, told_apart: bool) -> None:
    """Reject token types that are not [B, T] as `embedded` [B, T, D], and types other than 0 where all are alike."""
    check_positions("token_type_ids", token_type_ids, embedded.shape[0], (embedded.shape[1],))
    if token_type_ids is None or told_apart or torch.compiler.is_compiling():
        return
    if token_type_ids.any():  # a tokenizer may give zeros to every model
        raise ValueError("This model does not tell types of tokens apart: leave token_type_ids out.")
