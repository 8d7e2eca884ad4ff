"""Run `feedback-transformers export | card | info`.

`hf upload`, `hf download`, `hf auth login` and `hf cache verify` do the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig

from . import hub
from .card import layers
from .models.configuration_feedback import AUTO_MAP, MODELING, FeedbackConfig
from .models.feedback_files import check_download
from .models.modeling_feedback import FeedbackPreTrainedModel

SAID = ("name", "description", "license", "language", "base_model", "repository", "good_at", "limits", "dataset")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what can't be done ends it with one sentence."""
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"feedback-transformers {args.command}: {error}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "feedback-transformers",
        description="Prepare a feedback model for the Hub, or look at one. Upload a folder with `hf upload`.",
    )
    commands = top.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="copy a model to a folder, with its code and a model card")
    export.add_argument("source", help="a folder, such as a checkpoint of Trainer, or a repository of the Hub")
    export.add_argument("folder", type=Path, help="the folder to write; upload it with `hf upload`")
    export.set_defaults(run=run_export)
    card = commands.add_parser("card", help="write the model card (README.md and .eval_results) of a folder")
    card.add_argument("folder", type=Path, help="a folder with a feedback model")
    card.set_defaults(run=run_card)
    for command in (export, card):
        said = command.add_argument_group("what the card says")
        said.add_argument("--name", help="its title; the folder's name by default")
        said.add_argument("--description", help="a sentence below the title")
        said.add_argument("--license", help="the license of the weights, such as apache-2.0; there is no default")
        said.add_argument("--language", help="the language of the texts, such as en")
        said.add_argument("--base_model", help="the model that training started from, as the Hub calls it")
        said.add_argument("--repository", help="the name that the model will have on the Hub, such as me/my-model")
        said.add_argument("--good_at", help="a sentence: what the model does well")
        said.add_argument("--limits", help="a sentence: where the model fails")
        said.add_argument("--reproduce", help="the command that trained and measured the model")
        said.add_argument("--dataset", help="the data set of the results, as the Hub calls it")
        said.add_argument(
            "--results",
            type=Path,
            help="a JSON file of numbers by metric; all_results.json of the training run by default",
        )
    info = commands.add_parser("info", help="show what a model is made of, and whether its repository is complete")
    info.add_argument("source", help="a folder, or a repository of the Hub")
    info.add_argument("--revision", help="a branch, tag or commit of the repository")
    info.set_defaults(run=run_info)
    return top


def load_config(source: str | Path, revision: str | None = None) -> FeedbackConfig:
    if Path(source, "adapter_config.json").is_file() and not Path(source, "config.json").is_file():
        raise ValueError(f"{source} holds an adapter alone: give the folder of the model it adapts, or merge them.")
    path = str(source)
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"There is no folder {source}.")
    config = AutoConfig.from_pretrained(source, revision=revision)
    if not isinstance(config, FeedbackConfig):
        raise ValueError(f"{source} is a model of type {config.model_type!r}, not a feedback model.")
    return config


def auto_class(config: FeedbackConfig) -> Any:
    """Return the Auto class of the head that the config names."""
    head = (config.architectures or ["FeedbackModel"])[0]
    autos = [auto for auto, reference in MODELING.items() if reference.endswith(f".{head}")]
    if not autos:
        raise ValueError(f"This version has no class {head!r}: upgrade feedback_transformers.")
    return getattr(transformers, autos[0])


def outline(config: FeedbackConfig) -> FeedbackPreTrainedModel:
    """Return the model without its weights."""
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def sharing(args: argparse.Namespace, source: Path, target: Path) -> hub.Sharing:
    """Return what the options, and the files of a training run in `source`, say for the card."""
    results, state = args.results or source / "all_results.json", source / "trainer_state.json"
    said = {name: getattr(args, name) for name in SAID} | {"command": args.reproduce}
    card = {"name": target.resolve().name, **{name: value for name, value in said.items() if value is not None}}
    if args.results and not results.is_file():
        raise ValueError(f"There is no file {results}: give --results a JSON of metrics by name.")
    numbers = read_metrics(results) if results.is_file() else {}
    found = numbers if args.results else hub.measured(numbers)
    for name, value in found.items():
        if not isinstance(value, int | float):
            raise ValueError(f"{results} holds {name}={value!r}, which is not a number.")
    if found and not args.dataset:
        raise ValueError(f"{results} holds results: name with --dataset what they were measured on.")
    plots = sorted(source.glob("plots/*.png"))
    if state.is_file() and not plots:
        plots = hub.draw_losses(read_metrics(state).get("log_history") or [], target)
    return hub.Sharing(results=found, plots=plots, card=card)


def read_metrics(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f'{file} holds a {type(found).__name__}: give metrics by name, such as {{"eval_loss": 1.5}}.')
    return found


def run_export(args: argparse.Namespace) -> None:
    said = sharing(args, Path(args.source), args.folder)
    model = auto_class(load_config(args.source)).from_pretrained(args.source)
    hub.export(model, args.folder, hub.processor_of(args.source), said.results, said.plots, **said.card)
    print(f"{args.folder} holds the model, its code and its card. Upload it: hf upload OWNER/NAME {args.folder}")


def run_card(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise ValueError(f"There is no folder {args.folder}: give one with a feedback model.")
    model, said = outline(load_config(args.folder)), sharing(args, args.folder, args.folder)
    readme = args.folder / "README.md"
    if readme.is_file() and not said.results and hub.load_card(readme).data.get("eval_results"):
        raise ValueError(f"{readme} states results, which this would remove: give --results, or delete that file.")
    hub.complete(model, args.folder, said)
    print(f"The card is in {readme}")


def run_info(args: argparse.Namespace) -> None:
    config = load_config(args.source, args.revision)
    model = outline(config)
    parts = {"encoder": "encoder", "cell": "feedback", "decoder": "decoder"}
    about = {
        "class": type(model).__name__,
        "parameters": f"{model.num_parameters():,}",
        **{
            part: layers(getattr(config, f"{name}_type"), getattr(config, f"num_{name}_layers"))
            for part, name in parts.items()
        },
        "axis, signal, connection": f"{config.feedback_axis}, {config.feedback_signal}, {config.feedback_connection}",
        "format": config.format_version,
        "made with transformers": config.transformers_version,
    }
    folder = Path(args.source)
    if folder.is_dir():
        missing = sorted({reference.split(".")[0] + ".py" for reference in AUTO_MAP.values()} - set(names(folder)))
        lacks = f"lacks {', '.join(missing)}: run `feedback-transformers export`"
        about["code"] = lacks if missing else "complete"
        about["card"] = measured_in(folder / "README.md")
    else:
        commit = getattr(config, "_commit_hash", None)
        about["commit"] = commit
        found = try_to_load_from_cache(args.source, "config.json", revision=commit)
        checked = check_download(Path(found).parent) if isinstance(found, str) else 0
        about["weights here"] = f"{checked} files, each with the announced SHA-256" if checked else "none"
    for name, value in about.items():
        print(f"{name:<26}{value}")


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def measured_in(card: Path) -> str:
    """Return the results that a card states, in one line."""
    if not card.is_file():
        return "none: write one with `feedback-transformers card`"
    results = hub.load_card(card).data.get("eval_results") or []
    shown = [f"{r.metric_value:.4g}" if isinstance(r.metric_value, Real) else str(r.metric_value) for r in results]
    return ", ".join(f"{r.metric_name} {value}" for r, value in zip(results, shown, strict=True)) or "without results"
