"""Read the flags of the example scripts."""

from __future__ import annotations

import ast
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, HfArgumentParser, PreTrainedModel, TrainingArguments

from ...conversion.convert import is_published
from ...models.configuration_feedback import PRESETS, FeedbackConfig

TRAINING = {  # defaults of all scripts that use Trainer
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "lr_scheduler_type": "cosine",
    "save_total_limit": 1,
    "logging_steps": 50,
}


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Go on from this checkpoint; without it, a new model is made."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the checkpoint."})
    token: str | None = field(default=None, metadata={"help": "Access token of the Hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the checkpoint."})
    preset: str | None = field(default=None, metadata={"help": f"Architecture of a new model: {', '.join(PRESETS)}."})
    config_overrides: str | None = field(
        default=None, metadata={"help": "Fields of FeedbackConfig of a new model: hidden_size=256,feedback_type=gru"}
    )
    min_feedback_steps: int | None = field(
        default=None,
        metadata={"help": "In training, draw the number of passes anew at each step: at least so many; 1 by default,"},
    )
    max_feedback_steps: int | None = field(
        default=None, metadata={"help": "and at most so many; by default twice the number in the config."}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path and (self.preset or self.config_overrides):
            raise ValueError("preset and config_overrides are of a new model: leave them out with model_name_or_path.")

    @property
    def hub_options(self) -> dict[str, Any]:
        """Return what every from_pretrained of the checkpoint gets."""
        options = {"revision": self.model_revision, "token": self.token, "trust_remote_code": self.trust_remote_code}
        return {name: value for name, value in options.items() if value}

    def load(self, auto: Any, **fields: Any) -> PreTrainedModel:
        """Load the checkpoint as a model of the class `auto`."""
        published, _ = FeedbackConfig.get_config_dict(str(self.model_name_or_path), **self.hub_options)
        head = (
            auto._model_mapping[FeedbackConfig] if is_published(published) else auto
        )  # also where both know the type
        model = head.from_pretrained(self.model_name_or_path, **fields, **self.hub_options)
        if model.config.model_type != FeedbackConfig.model_type:
            raise ValueError(
                f"{self.model_name_or_path} is a model of type {model.config.model_type!r}, not a feedback model: "
                "examples/retrofit_lora.py makes one of it."
            )
        return model

    def classes(self, auto: Any) -> list[str]:
        """Return the names of the checkpoint's classes, if it is a classifier of the kind of `auto`."""
        if self.model_name_or_path is None:
            return []
        config = AutoConfig.from_pretrained(self.model_name_or_path, **self.hub_options)
        head = auto._model_mapping.get(type(config), type(None)).__name__
        names = list((config.id2label or {}).values())
        unnamed = all(str(name).startswith("LABEL_") for name in names)
        return [] if unnamed or head not in (config.architectures or []) else names

    def config(self, architecture: dict[str, Any], **sizes: Any) -> FeedbackConfig:
        """Return the config of a new model: `sizes`, then the preset or else `architecture`, then the overrides."""
        chosen = architecture if self.preset is None else PRESETS.named(self.preset)
        asked = overrides(self.config_overrides)
        for name, value in asked.items():
            if isinstance(value, dict) and isinstance(sizes.get(name), dict):
                asked[name] = {**sizes[name], **value}
        return FeedbackConfig(**{**sizes, **chosen, **asked})


def overrides(text: str | None) -> dict[str, Any]:
    """Turn hidden_size=256,is_causal=false,input_config.patch_size=2 into fields of FeedbackConfig by name."""
    known = [f.name for f in fields(FeedbackConfig)]
    result: dict[str, Any] = {}
    for pair in filter(None, (text or "").split(",")):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ValueError(f"{pair!r} in config_overrides is not of the form name=value.")
        name, _, inner = name.partition(".")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "it must be one of FeedbackConfig."
            raise ValueError(f"Unknown field {name!r} in config_overrides: {hint}")
        made: Any = value
        with suppress(ValueError, SyntaxError):
            made = ast.literal_eval(value.title() if value in ("true", "false") else value)
        result[name] = {**result.get(name, {}), inner: made} if inner else made
    return result


def parse(
    types: Sequence[Any],
    arguments: Sequence[str] | None = None,
    defaults: dict[str, Any] | None = None,
    smoke: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """Fill the dataclasses `types` from the command line, or from the one .json file that it names.

    `defaults` replace those of the dataclasses, and so does `smoke` with --smoke; what is given wins over both.
    """
    parser = HfArgumentParser(types, allow_abbrev=False)  # a token in a flag cut short would be shown in the card
    given = list(sys.argv[1:] if arguments is None else arguments)
    defaults = defaults or {}
    if any(issubclass(kind, TrainingArguments) for kind in types):
        pin = torch.accelerator.is_available()  # without one, PyTorch warns
        defaults = {**TRAINING, "dataloader_pin_memory": pin, **defaults}
    small = dict(smoke or {})
    if len(given) == 1 and given[0].endswith(".json"):
        values = json.loads(Path(given[0]).read_text(encoding="utf-8"))
        if values.get("model_name_or_path"):
            small.pop("config_overrides", None)  # its sizes are those of the checkpoint
        parsed = parser.parse_dict({**defaults, **(small if values.get("smoke") else {}), **values})
    else:
        parser.set_defaults(**defaults)
        known = parser.parse_known_args(given)[0]
        if getattr(known, "model_name_or_path", None):
            small.pop("config_overrides", None)
        if known.smoke:
            parser.set_defaults(**small)
        parsed = parser.parse_args_into_dataclasses(given)
    if any(isinstance(args, TrainingArguments) and args.push_to_hub and args.hub_token for args in parsed):
        raise ValueError(
            "Trainer uploads training_args.bin with the hub_token in it: leave --hub_token out, and set HF_TOKEN or "
            "run `hf auth login`."
        )
    return parsed


def command(script: str, arguments: Sequence[str] | None = None) -> str:
    """Return how `script` was called, for the model card; without access tokens, since a card is public."""
    shown: list[str] = []
    secret = False
    for word in sys.argv[1:] if arguments is None else arguments:
        flag = word.startswith("--")
        name, equals, _ = word.partition("=")
        token = flag and "tok" in name and "tokenizer" not in name  # --token, --hub_token, --hub-token, --hub_tok
        shown.append("..." if secret and not flag else f"{name}=..." if token and equals else word)
        secret = token and not equals
    return shlex.join(["python", f"examples/{Path(script).name}", *shown])
