"""What training scripts share: arguments, data files, results. `examples/` is written with it.

Flags are named as in the example scripts of transformers.
"""

from __future__ import annotations

import ast
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments

from .. import data, hub
from ..models.configuration_feedback import PRESETS, FeedbackConfig
from .checkpoints import train_safely

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDatasetDict

TRAINING = {  # defaults of all scripts that use Trainer
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "lr_scheduler_type": "cosine",
    "save_total_limit": 1,
    "logging_steps": 50,
}
BUILDERS = {"txt": "text", "csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json"}  # by the ending of a file


@dataclass
class DataArguments:
    dataset_name: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(data.DATASETS)}, or the id of a data set on the Hub."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration on the Hub."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "Your own data: txt, csv, tsv, json or jsonl; or a folder with one of images per class."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "As train_file; else a part of that is used."})
    test_file: str | None = field(default=None, metadata={"help": "As train_file."})
    validation_split_percentage: int = field(
        default=10, metadata={"help": "How much of train is kept for validation where there is none."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many examples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many examples only."})
    smoke: bool = field(default=False, metadata={"help": "A run of seconds, to see that everything works."})

    def load(self, shuffle: bool = True) -> DatasetDict:
        """The data set, with `train`, `validation` and perhaps `test`; files win over a name.

        `shuffle`: whether a missing validation split is drawn at random, or is the end of train (texts, series).
        """
        from datasets import load_dataset

        given = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        files = {split: name for split, name in given.items() if name is not None}
        if files:
            dataset = _load_files(files)
        elif self.dataset_name is None:
            raise ValueError("There is no data: give --dataset_name or --train_file.")
        elif self.dataset_name in data.DATASETS:
            dataset = data.load(self.dataset_name)
        else:
            self._refuse_misspelled()
            dataset = load_dataset(self.dataset_name, self.dataset_config_name)
        for split, rows in dataset.items():
            if len(rows) == 0:
                raise ValueError(f"The {split} data of {files.get(split, self.dataset_name)} has no examples.")
        if "train" not in dataset:
            raise ValueError("There is no train data, which tells what to prepare for: give --train_file too.")
        if "validation" not in dataset:
            share = self.validation_split_percentage / 100
            if len(dataset["train"]) * share < 1:
                raise ValueError(
                    f"{len(dataset['train'])} examples are too few to keep {self.validation_split_percentage} % of "
                    "them for validation: give --validation_file."
                )
            parts = dataset["train"].train_test_split(share, shuffle=shuffle, seed=0)
            dataset["train"], dataset["validation"] = parts["train"], parts["test"]
        return dataset

    def stream(self) -> IterableDatasetDict:
        """`train` and `validation`, read as they are iterated over."""
        from datasets import IterableDatasetDict, load_dataset

        given = {"train": self.train_file, "validation": self.validation_file}
        files = {split: name for split, name in given.items() if name is not None}
        if files:
            dataset = _load_files(files, streaming=True)
        elif self.dataset_name is None:
            raise ValueError("There is no data: give --dataset_name or --train_file.")
        elif self.dataset_name in data.DATASETS:
            dataset = {name: rows.to_iterable_dataset() for name, rows in data.load(self.dataset_name).items()}
        else:
            self._refuse_misspelled()
            dataset = load_dataset(self.dataset_name, self.dataset_config_name, streaming=True)
        if not {"train", "validation"} <= dataset.keys():
            raise ValueError("A stream can't be split: give --train_file and --validation_file.")
        return IterableDatasetDict(dataset)

    def _refuse_misspelled(self) -> None:
        if close := get_close_matches(str(self.dataset_name), data.DATASETS, n=1, cutoff=0.8):
            raise ValueError(f"Unknown data set {self.dataset_name!r}: did you mean {close[0]}?")

    def limit(self, dataset: DatasetDict, shuffle: bool = False) -> DatasetDict:
        """At most `max_train_samples` and `max_eval_samples` of it, the first ones or, where rows may be sorted by
        class, random ones."""
        for split, rows in dataset.items():
            most = self.max_train_samples if split == "train" else self.max_eval_samples
            if most is not None and most < len(rows):
                dataset[split] = (rows.shuffle(seed=0) if shuffle else rows).select(range(most))
        return dataset

    @property
    def source(self) -> str:
        """What the data is called in a model card."""
        return Path(self.train_file).name if self.train_file else self.dataset_name or "unknown"


def check_columns(dataset: Any, texts: bool = True, **columns: str) -> None:
    """That every split has the `columns`, by their flags; and where they are `texts`, one in every row."""
    for split, rows in dataset.items():
        for flag, column in columns.items():
            if column not in rows.column_names:
                there = ", ".join(map(repr, rows.column_names))
                raise ValueError(f"The {split} data has no column {column!r}, only {there}: give --{flag}.")
            for i, text in enumerate(rows[column]) if texts else ():
                if not isinstance(text, str):
                    raise ValueError(f"Row {i} of the {split} data has {text!r} as its {column}, which is no text.")


def with_classes(dataset: DatasetDict, column: str, known: Sequence[str] = (), trains: bool = False) -> DatasetDict:
    """The labels of all splits as numbers of one list of classes: those `known` of a checkpoint, else those of train.

    Splits that were read from files of their own number their classes each for itself. A checkpoint that `trains`
    learns the classes of train, where they are others.
    """
    from datasets import ClassLabel

    check_columns(dataset, texts=False, label_column=column)
    found = {split: [*_class_names(rows, column, split)] for split, rows in dataset.items()}
    own = dataset["train"].features[column]
    if trains and set(found["train"]) - set(known):
        known = ()
    names = list(known) or (own.names if isinstance(own, ClassLabel) else sorted(set(found["train"])))
    numbers = {name: i for i, name in enumerate(names)}
    for split, labels in found.items():
        if unknown := sorted(set(labels) - numbers.keys()):
            who = "the checkpoint" if known else "train"
            raise ValueError(f"The {split} data has the class {unknown[0]!r}, and {who} only {', '.join(names[:20])}.")
        rows, kind = dataset[split], ClassLabel(names=names)
        if rows.features[column] != kind:
            values = [numbers[label] for label in labels]
            dataset[split] = rows.remove_columns(column).add_column(column, values, feature=kind)
    return dataset


def _class_names(rows: Dataset, column: str, split: str) -> Iterator[str]:
    name_of = getattr(rows.features[column], "int2str", None)
    for i, label in enumerate(rows[column]):
        if label is None or label != label:
            raise ValueError(f"Row {i} of the {split} data has no {column}: give it a class, or leave it out.")
        if name_of is not None:
            yield name_of(label)
        else:  # a file with a gap, or with decimals, has 1.0 where another has 1
            yield str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _load_files(files: dict[str, str], streaming: bool = False) -> Any:
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetGenerationError

    dataset = DatasetDict()
    for split, name in files.items():
        path = Path(name)
        ending = path.suffix.lstrip(".").lower()
        if not path.exists():
            raise FileNotFoundError(f"{name} does not exist.")
        if path.is_dir():
            dataset[split] = load_dataset("imagefolder", data_dir=name, split="train", streaming=streaming)
            continue
        if ending not in BUILDERS:
            raise ValueError(f"{name} ends in {ending!r}; it must be one of {', '.join(BUILDERS)}.")
        if path.stat().st_size == 0 or (not streaming and not path.read_bytes().strip()):
            raise ValueError(f"{name} is empty: there is nothing to learn from.")
        options: dict[str, Any] = {"keep_linebreaks": True} if BUILDERS[ending] == "text" else {}
        if ending == "tsv":
            options = {"sep": "\t"}
        try:
            rows = load_dataset(BUILDERS[ending], data_files=name, split="train", streaming=streaming, **options)
            dataset[split] = rows
        except (ValueError, DatasetGenerationError) as error:
            if "corresponds to no data" in str(error):  # a csv file with a header alone
                raise ValueError(f"{name} has no examples: there is nothing to learn from.") from None
            reason = str(error.__cause__ or error).partition("\n")[0]
            raise ValueError(f"{name} can't be read as {BUILDERS[ending]}, it may be damaged: {reason}") from error
    return dataset


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
        default=None, metadata={"help": "Train with a number of feedback steps drawn anew at every training step:"}
    )
    max_feedback_steps: int | None = field(default=None, metadata={"help": "the least and the most of them."})

    def __post_init__(self) -> None:
        if self.model_name_or_path and (self.preset or self.config_overrides):
            raise ValueError("preset and config_overrides are of a new model: leave them out with model_name_or_path.")

    @property
    def hub_options(self) -> dict[str, Any]:
        """For every from_pretrained of the checkpoint."""
        options = {"revision": self.model_revision, "token": self.token, "trust_remote_code": self.trust_remote_code}
        return {name: value for name, value in options.items() if value}

    def load(self, auto: Any, **fields: Any) -> PreTrainedModel:
        """The checkpoint, as a model of the class `auto`."""
        model = auto.from_pretrained(self.model_name_or_path, **fields, **self.hub_options)
        if model.config.model_type != FeedbackConfig.model_type:
            raise ValueError(
                f"{self.model_name_or_path} is a model of type {model.config.model_type!r}, not a feedback model: "
                "examples/retrofit_lora.py makes one of it."
            )
        return model

    def classes(self, auto: Any) -> list[str]:
        """The names of the classes that the checkpoint tells apart, if it is a classifier of the kind of `auto`."""
        if self.model_name_or_path is None:
            return []
        config = AutoConfig.from_pretrained(self.model_name_or_path, **self.hub_options)
        head = auto._model_mapping.get(type(config), type(None)).__name__
        names = list((config.id2label or {}).values())
        unnamed = all(str(name).startswith("LABEL_") for name in names)
        return [] if unnamed or head not in (config.architectures or []) else names

    def config(self, architecture: dict[str, Any], **sizes: Any) -> FeedbackConfig:
        """The config of a new model: `sizes`, then the preset or else `architecture`, then the overrides."""
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"Unknown preset {self.preset!r}; choose one of {', '.join(PRESETS)}.")
        chosen = architecture if self.preset is None else PRESETS[self.preset]
        return FeedbackConfig(**{**sizes, **chosen, **overrides(self.config_overrides)})


def draws_steps(model_args: ModelArguments, model: PreTrainedModel) -> bool:
    """Whether to train with drawn numbers of passes: a model that goes position by position has none."""
    given = model_args.min_feedback_steps and model_args.max_feedback_steps
    return bool(given) and model.config.in_passes


def overrides(text: str | None) -> dict[str, Any]:
    """hidden_size=256,is_causal=false,solver=jacobi -> the fields of FeedbackConfig by name"""
    known = [f.name for f in fields(FeedbackConfig)]
    result: dict[str, Any] = {}
    for pair in filter(None, (text or "").split(",")):
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ValueError(f"{pair!r} in config_overrides is not of the form name=value.")
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "it must be one of FeedbackConfig."
            raise ValueError(f"Unknown field {name!r} in config_overrides: {hint}")
        try:
            result[name] = ast.literal_eval(value.title() if value in ("true", "false") else value)
        except (ValueError, SyntaxError):
            result[name] = value
    return result


def parse(
    types: Sequence[Any],
    arguments: Sequence[str] | None = None,
    defaults: dict[str, Any] | None = None,
    smoke: dict[str, Any] | None = None,
) -> tuple[Any, ...]:
    """The dataclasses `types`, filled from the command line, or from the one .json file that it names.

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
    """How `script` was called, for the model card; without access tokens, since a card is public."""
    shown: list[str] = []
    secret = False
    for word in sys.argv[1:] if arguments is None else arguments:
        flag = word.startswith("--")
        name, equals, _ = word.partition("=")
        token = flag and "tok" in name and "tokenizer" not in name  # --token, --hub_token, --hub-token, --hub_tok
        shown.append("..." if secret and not flag else f"{name}=..." if token and equals else word)
        secret = token and not equals
    return shlex.join(["python", f"examples/{Path(script).name}", *shown])


def train(trainer: Trainer) -> dict[str, float]:
    """Trains, from the checkpoint that --resume_from_checkpoint says; true is the last complete one of output_dir."""
    given = trainer.args.resume_from_checkpoint
    known = {"true": True, "false": None}
    return train_safely(trainer, known.get(given.lower(), given) if given else None).metrics


def fit(
    trainer: Trainer, test: Dataset | None = None, more: Callable[[Any], dict[str, float]] | None = None
) -> dict[str, float]:
    """Trains, evaluates and tests, as --do_train, --do_eval and --do_predict say; the metrics of the last of these.

    `more`: further metrics, of the predictions for `test`.
    """
    args, metrics = trainer.args, dict[str, float]()
    if args.do_train:
        record(trainer, "train", train(trainer))
    if args.do_eval:
        metrics = trainer.evaluate()
        record(trainer, "eval", metrics)
    if args.do_predict and test is not None:
        output = trainer.predict(test)
        metrics = dict(output.metrics or {})
        if more is not None:
            metrics |= more(output.predictions)
        record(trainer, "test", metrics)
    return metrics


def record(trainer: Trainer, split: str, metrics: dict[str, float]) -> None:
    """Prints the metrics and writes them to {split}_results.json and all_results.json in output_dir; none, where
    nothing was left to train, leave those of the run that did."""
    if not metrics:
        return
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    trainer.save_state()


def publish(trainer: Trainer, processor: Any, results: dict[str, float], **card: Any) -> None:
    """Writes the model and its card to output_dir, and with --push_to_hub to the Hub too."""
    args, model = trainer.args, whole(trainer.accelerator, trainer.model)
    if not trainer.is_world_process_zero():
        return
    push = args.hub_model_id or Path(str(args.output_dir)).name if args.push_to_hub else None
    publish_model(model, str(args.output_dir), processor, results, push, args.hub_token, **card)


def whole(accelerator: Accelerator, model: Any) -> Any:
    """The model without what wraps it; where its weights are in shards, on the main process a copy with all of them.

    Every process must call it.
    """
    unwrapped = accelerator.unwrap_model(model)
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return unwrapped
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return unwrapped
    kind: Any = next(
        kind for kind in type(unwrapped).__mro__ if not issubclass(kind, FSDPModule)
    )  # FSDP makes a subclass
    complete = kind(deepcopy(unwrapped.config))
    complete.load_state_dict(weights)
    return complete


def publish_model(
    model: Any,
    folder: str,
    processor: Any,
    results: dict[str, float],
    push: str | None,
    token: str | None,
    **card: Any,
) -> None:
    """hub.export; and where `push` names a repository, an upload without checkpoints and logs."""
    from huggingface_hub import HfApi

    hub.export(model, folder, processor=processor, results=results, **card)
    print(f"Model, processor and card are in {folder}")
    if push:
        api = HfApi(token=token)
        repository = api.create_repo(push, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="End of training",
            ignore_patterns=["checkpoint-*", "step_*", "non_finite_batch_*", "runs/*", "logs/*", "training_args.bin"],
        )
