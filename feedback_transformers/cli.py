"""Run `feedback-transformers export | card | info | convert | verify`.

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
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from . import conversion, hub
from .card import layers
from .models.configuration_feedback import AUTO_MAP, MODELING, FeedbackConfig
from .models.feedback_files import check_download
from .models.modeling_feedback import FeedbackPreTrainedModel
from .published import TYPES

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
    export.add_argument("folder", type=Path, help="the folder to write, or with --format gguf the file")
    export.add_argument(
        "--format",
        choices=("checkpoint", "gguf"),
        default="checkpoint",
        help="gguf writes one file, for llama.cpp, of a model that computes a Nanbeige or an HRM-Text",
    )
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
    convert = commands.add_parser("convert", help="write a published model as ours, or ours as a published one")
    convert.add_argument("source", help="a folder, or a repository of the Hub")
    convert.add_argument("folder", type=Path, help="the folder to write")
    convert.add_argument("--to", choices=conversion.FAMILIES, help="the published layout; ours where left out")
    convert.set_defaults(run=run_convert)
    verify = commands.add_parser("verify", help="compare a published model, converted, with the official code")
    verify.add_argument("source", help="a folder, or a repository of the Hub")
    verify.add_argument("--trust_remote_code", action="store_true", help="run the code that the checkpoint brings")
    verify.set_defaults(run=run_verify)
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
    if args.format == "gguf":
        from .conversion.gguf import write_gguf

        model = auto_class(load_config(args.source)).from_pretrained(args.source)
        layout = write_gguf(model, args.folder, hub.processor_of(args.source))
        print(f"{args.folder} holds {args.source} in the layout {layout} of llama.cpp, in float32.")
        return
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


def run_convert(args: argparse.Namespace) -> None:
    if args.to is None:
        official, weights = conversion.load_official(args.source)
        model = conversion.convert(official, weights)
        model.save_pretrained(args.folder)
        family = conversion.family_of(official, weights).name
        print(f"{args.folder} holds {args.source}, a model of the family {family}, as a {type(model).__name__}.")
    else:
        model = auto_class(load_config(args.source)).from_pretrained(args.source)
        official, weights = conversion.to_official(model, args.to)
        args.folder.mkdir(parents=True, exist_ok=True)
        (args.folder / "config.json").write_text(json.dumps(official, indent=2) + "\n", encoding="utf-8")
        save_file(weights, args.folder / "model.safetensors", metadata={"format": "pt"})
        print(f"{args.folder} holds {args.source} in the layout of {args.to}.")
    if (processor := hub.processor_of(args.source)) is not None:
        processor.save_pretrained(args.folder)


@torch.no_grad()
def run_verify(args: argparse.Namespace) -> None:
    official, weights = conversion.load_official(args.source)
    family = conversion.family_of(official, weights)
    ours = conversion.convert(official, weights, dtype=torch.float32).eval()
    auto = "AutoModelForCausalLM" if family.head == "FeedbackForCausalLM" else "AutoModelForMaskedLM"
    print(f"{args.source}: family {family.name}, {len(weights)} weights, each of which has its place.")
    print(f"Its mapping was made from {family.source}, and is tested against what that computed.")
    code = (official.get("auto_map") or {}).get(auto)
    theirs, why = None, "it is not here, and the checkpoint brings none"
    try:
        if ours.config.initial_state == "random":
            why, code = "it starts from other random numbers at each call", None
        if family.name in transformers.CONFIG_MAPPING and family.name not in TYPES:
            theirs = getattr(transformers, auto).from_pretrained(args.source, dtype=torch.float32)
        elif code is not None and args.trust_remote_code:
            cls: Any = get_class_from_dynamic_module(code, args.source)
            theirs = cls.from_pretrained(args.source, dtype=torch.float32)
        elif code is not None:
            why = "give --trust_remote_code to run what the checkpoint brings"
    except Exception as error:  # the code of others fails in many ways
        why = f"it could not be run here ({type(error).__name__}: {str(error).splitlines()[0]})"
    if theirs is None:
        print(f"Its logits were NOT compared with the official code: {why}.")
        return
    theirs.eval()
    ids = torch.randint(ours.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    difference = (ours(ids).logits - theirs(ids).logits).abs().max().item()
    print(f"Logits of 2 rows of 16 random tokens, in float32: the largest difference is {difference:.1e}.")
    print("Not compared: its tokenizer, generation, training, and other data types.")
    if difference > 1e-3:
        raise ValueError("The logits differ: please report this checkpoint.")


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def measured_in(card: Path) -> str:
    """Return the results that a card states, in one line."""
    if not card.is_file():
        return "none: write one with `feedback-transformers card`"
    results = hub.load_card(card).data.get("eval_results") or []
    shown = [f"{r.metric_value:.4g}" if isinstance(r.metric_value, Real) else str(r.metric_value) for r in results]
    return ", ".join(f"{r.metric_name} {value}" for r, value in zip(results, shown, strict=True)) or "without results"
