"""Register parts of your own: a cell, a connection, a recursion, a halting rule, or any other kind of REGISTRIES.

    @register("feedback_type", "leaky")
    class Leaky(Recurrence): ...

    FeedbackConfig(feedback_type="leaky")

Write the class in a file of its own, which imports from torch, transformers and feedback_transformers only: a copy of
that file goes along with every checkpoint that uses the part, so that `trust_remote_code=True` loads it elsewhere.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import cached_file, logging

from .feedback_cells import CELLS, RecurrentCell
from .feedback_connections import CONNECTIONS
from .feedback_decoders import DECODERS
from .feedback_encoders import ENCODERS
from .feedback_halting import HALTING
from .feedback_modalities import INPUTS
from .feedback_names import CHOICES, RECURRENT_TYPES, REGISTERED, SOLVERS_IN_PASSES
from .feedback_recursions import RECURSIONS
from .feedback_scan import RECURRENCES, Recurrence
from .feedback_solvers import SOLVERS
from .feedback_states import INITIAL_STATES

logger = logging.get_logger(__name__)

Part = TypeVar("Part", bound=type[nn.Module])

REGISTRIES: dict[str, dict[str, Any]] = {
    "input_type": INPUTS,
    "encoder_type": ENCODERS,
    "feedback_type": CELLS,
    "feedback_connection": CONNECTIONS,
    "feedback_recursion": RECURSIONS,
    "initial_state": INITIAL_STATES,
    "solver": SOLVERS,
    "halting": HALTING,
    "decoder_type": DECODERS,
}
# What a file of a checkpoint may not import, since the package need not be there; and what that becomes.
RELATIVE = (
    (r"^(\s*)from feedback_transformers import register$", r"\1from .feedback_registry import register"),
    (r"^(\s*)from feedback_transformers\.models\.(\w+) import", r"\1from .\2 import"),
)
NAME = re.compile(r"[A-Za-z_]\w*\.py")
DOWNLOADS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def register(field: str, name: str) -> Callable[[Part], Part]:
    """Enter the class below as `name`, so that FeedbackConfig(**{field: name}) builds it.

    A class is built as those of the package are: a cell, a connection, an initial state and a halting rule from the
    config; an encoder and a decoder from the config, a number of layers and whether they are causal; a `Recurrence`
    from its size; a solver from the loop; an `Input` from the config and its own fields. A recursion has static
    methods and is not built.

    Args:
        field: one of REGISTRIES, such as feedback_type, feedback_connection, feedback_recursion or halting.
        name: a word that no other part of this field has.

    Raises:
        ValueError: for another field, or a name that is taken.
    """
    if field not in REGISTRIES:
        raise ValueError(f"There are no parts for {field!r}; choose one of {', '.join(REGISTRIES)}.")

    def enter(part: Part) -> Part:
        recurrent = field == "feedback_type" and issubclass(part, Recurrence)
        registry: dict[str, Any] = RECURRENCES if recurrent else REGISTRIES[field]
        known = registry.get(name)
        if name in CHOICES[field] and getattr(known, "__qualname__", None) != part.__qualname__:
            raise ValueError(f"There is a {field} {name!r} already: choose another name.")
        registry[name] = part
        if recurrent:
            CELLS[name] = RecurrentCell
        if name not in CHOICES[field]:
            CHOICES[field] = (*CHOICES[field], name)
            RECURRENT_TYPES.extend([name] if recurrent else [])
            SOLVERS_IN_PASSES.extend([name] if field == "solver" and part.makes_passes else [])  # type: ignore[attr-defined]
        try:
            REGISTERED[field, name] = source_of(part)
        except ValueError as error:
            logger.warning(f"The code of {field}={name!r} can't go along with checkpoints. {error}")
        return part

    return enter


def source_of(part: type) -> tuple[str, str]:
    """Return the name of the file that defines `part`, and its text for a checkpoint, with relative imports."""
    advice = "Put the class in a file of its own, such as leaky.py, and import that file."
    if part.__module__ == "__main__":
        raise ValueError(f"It is part of the program that runs. {advice}")
    try:
        file = Path(inspect.getfile(part))
        text = file.read_text(encoding="utf-8")
    except (OSError, TypeError):
        raise ValueError(f"It has no file. {advice}") from None
    here = Path(__file__).parent
    taken = (here / file.name).is_file() and file.parent != here
    if taken or not NAME.fullmatch(file.name):
        raise ValueError(f"{file.name} can't stand beside the files of the package: rename it, such as leaky.py.")
    for absolute, relative in RELATIVE:
        text = re.sub(absolute, relative, text, flags=re.MULTILINE)
    if left := re.search(r"^\s*(?:from|import) feedback_transformers.*$", text, re.MULTILINE):
        raise ValueError(
            f"{file.name} says `{left[0].strip()}`: write `from feedback_transformers import register`, and import "
            "all else from feedback_transformers.models.<file>."
        )
    return file.name, text


def import_parts(source: Any, **settings: Any) -> None:
    """Import the files of registered parts that came with a checkpoint, unless these parts are known here.

    Their code runs, so call this only where the caller trusts it.

    Args:
        source: a folder, or a repository of the Hub.
        settings: of a download, such as `revision` and `token`.
    """
    settings = {name: value for name, value in settings.items() if name in DOWNLOADS}
    config, _ = PreTrainedConfig.get_config_dict(source, **settings)
    inputs = [config.get(name) or {} for name in ("input_config", "source_config")]
    named = [("input_type", each.get("type", "tokens")) for each in inputs]
    named += [(field, config.get(field, CHOICES[field][0])) for field in REGISTRIES if field != "input_type"]
    if all(name in CHOICES[field] for field, name in named):
        return
    for file in config.get("plugins") or ():
        path = cached_file(source, check_name(file), **settings)
        name = f"{__package__}.{Path(file).stem}"  # so that its relative imports are those of the code that runs
        spec: Any = spec_from_file_location(name, path)
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def check_name(file: str) -> str:
    """Return the name of a file beside a config; reject what would be elsewhere."""
    if not NAME.fullmatch(file):
        raise ValueError(f"plugins names {file!r}, which is not a Python file beside config.json.")
    return file
