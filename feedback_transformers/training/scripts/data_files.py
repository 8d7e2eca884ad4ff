"""Read the data that a script is given: files, folders, a packaged data set, or one of the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import data

if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDatasetDict

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
