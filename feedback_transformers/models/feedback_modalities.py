"""INPUTS: the inputs by their names, and their fields in a config."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import nn

from .feedback_inputs import Fields, names_of
from .feedback_inputs_image import ImageInput, VideoInput
from .feedback_inputs_pretrained import PretrainedInput
from .feedback_inputs_series import ValueInput
from .feedback_inputs_text import TokenInput

INPUTS: dict[str, Any] = {
    "tokens": TokenInput,
    "images": ImageInput,
    "videos": VideoInput,
    "values": ValueInput,
    "pretrained": PretrainedInput,
}
# Fields of FeedbackConfig up to format 2, by the type of input that they were of.
FLAT = {"tokens": (), "patches": ("patch_size", "num_channels"), "values": ("num_channels",)}
OF_PATCHES = {"patch_size": 4, "num_channels": 1}
FLAT_FIELDS = ("embedding_type", "image_size", *OF_PATCHES)


def fields_of(given: Any, name: str, advice: str = "") -> Fields:
    """Return the fields of an input, given by its type, a dictionary or as they are.

    Args:
        name: the config's field that they are given for.
        advice: what an error adds about a type that is not known.

    Raises:
        ValueError: an unknown type or field, or a value that can't be built.
    """
    if isinstance(given, Fields):
        given.check()
        return given
    asked = given
    if isinstance(given, str):
        given = {"type": given}
    if not isinstance(given, dict) or given.get("type") not in INPUTS:
        raise ValueError(
            f"{name} is {asked!r}; give the type of "
            f"an input ({', '.join(INPUTS)}), or a dictionary of its type and its fields.{advice}"
        )
    kind = INPUTS[given["type"]].Fields
    known = names_of(kind)
    for field in set(given) - {"type", *known}:
        close = get_close_matches(field, known, n=1)
        advice = f"did you mean {close[0]}?" if close else f"it has {', '.join(known) or 'none'}."
        raise ValueError(f"Unknown field {field!r} of {name}, an input of {given['type']}: {advice}")
    made = kind(**given)
    made.check()
    return made


def make_input(config: Any, fields: Fields) -> nn.Module:
    """Build an input."""
    return INPUTS[fields.type](config, fields)


def from_flat(values: dict[str, Any]) -> dict[str, Any]:
    """Return fields of a config without `embedding_type` and what belongs to it, which `input_config` holds now."""
    kind = values.get("embedding_type", "tokens")
    others = {name: value for name, value in values.items() if name not in FLAT_FIELDS}
    if kind not in FLAT:  # registered
        return {**others, "input_config": {"type": kind}}
    own = {name: values.get(name, OF_PATCHES[name]) for name in FLAT[kind]}
    if kind == "patches":
        own["positions"] = "none"
    return {**others, "input_config": {"type": {"patches": "images"}.get(kind, kind), **own}}
