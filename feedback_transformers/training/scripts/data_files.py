"""Read the data that a script is given: files, folders, a packaged data set, or one of the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from ... import data
from .files import read_files
from .rows import check_columns, filled, split_off, without_labels

if TYPE_CHECKING:
    from datasets import DatasetDict, IterableDatasetDict


@dataclass
class DataArguments:
    dataset_name: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(data.DATASETS)}, or the id of a data set on the Hub."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration on the Hub."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Your own data: a file (txt, csv, tsv, json or jsonl), a folder of such files, a pattern such as "
            "'texts/*.txt', or a folder with a folder of images for each class."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "As train_file; else a part of that is used."})
    test_file: str | None = field(default=None, metadata={"help": "As train_file."})
    validation_split_percentage: int = field(
        default=10, metadata={"help": "How much of train is kept for validation where there is none."}
    )
    drop_empty_rows: bool = field(
        default=False, metadata={"help": "Leave out rows without a text or a label, and say how many; else they stop."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many examples only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on so many examples only."})
    smoke: bool = field(default=False, metadata={"help": "A run of seconds, to see that everything works."})

    @property
    def files(self) -> dict[str, str]:
        """The files that were given, by the name of their split."""
        given = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: name for split, name in given.items() if name is not None}

    def read(self, words: bool = False) -> DatasetDict:
        """Return the data as it is in its files or under its name; `words` as in `read_files`.

        Raises:
            FileNotFoundError, ValueError: the data is missing, damaged or empty.
        """
        from datasets import load_dataset

        if self.files:
            dataset = read_files(self.files, words)
        elif self.dataset_name is None:
            raise ValueError("There is no data: give --dataset_name or --train_file.")
        elif self.dataset_name in data.DATASETS:
            dataset = data.load(self.dataset_name)
        else:
            self._refuse_misspelled()
            dataset = load_dataset(self.dataset_name, self.dataset_config_name)
        for split, rows in dataset.items():
            if len(rows) == 0:
                raise ValueError(f"The {split} data of {self.files.get(split, self.dataset_name)} has no examples.")
        return dataset

    def load(
        self,
        shuffle: bool = True,
        texts: dict[str, str] | None = None,
        labels: dict[str, list[str]] | None = None,
        trains: bool = True,
    ) -> DatasetDict:
        """Return the data set with `train`, `validation` and perhaps `test`. Files win over a name.

        Rows without a text or a label are refused with the lines of their file, or dropped with --drop_empty_rows.

        Args:
            shuffle: draw a missing validation split at random; otherwise it is the end of train, as for a series.
            texts: the columns that must hold a text, by the flag that names each.
            labels: the columns that must hold a label, by the flag that names them. A split that is drawn has each
                class in the same share. The test data may lack them all, as data to predict.
            trains: whether there must be train and validation data; without, files may be given for a test alone.

        Raises:
            FileNotFoundError, ValueError: the data is missing, damaged, empty or lacks a column.
        """
        dataset, files = self.read(words=texts is not None), self.files
        for split, rows in dataset.items():
            known = labels or {}
            alone = without_labels(rows, [x for names in known.values() for x in names]) if split == "test" else None
            if alone is not None:
                rows, known = alone, {}
            check_columns({split: rows}, False, **(texts or {}))
            for flag, names in known.items():
                for name in names:
                    check_columns({split: rows}, False, **{flag: name})
            columns = [*(texts or {}).values(), *(name for names in known.values() for name in names)]
            dataset[split] = filled(rows, split, columns, files.get(split), self.drop_empty_rows)
        if texts is not None:
            check_columns(dataset, True, **texts)
        if "train" not in dataset and (trains or "validation" in dataset):
            raise ValueError("There is no train data, which tells what to prepare for: give --train_file too.")
        if "train" in dataset and "validation" not in dataset:
            share = self.validation_split_percentage / 100
            if len(dataset["train"]) * share < 1:
                raise ValueError(
                    f"{len(dataset['train'])} examples are too few to keep {self.validation_split_percentage} % of "
                    "them for validation: give --validation_file."
                )
            by = [name for names in (labels or {}).values() for name in names]
            parts = split_off(dataset["train"], share, shuffle, by[0] if len(by) == 1 else None)
            dataset["train"], dataset["validation"] = parts
        return dataset

    def stream(self) -> IterableDatasetDict:
        """Return `train` and `validation`, read as they are iterated over."""
        from datasets import IterableDatasetDict, load_dataset

        files = {split: name for split, name in self.files.items() if split != "test"}
        if files:
            dataset = read_files(files, words=True, streaming=True)
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
        """Return at most `max_train_samples` and `max_eval_samples` rows of each split.

        They are the first ones or, where rows may be sorted by class, random ones.
        """
        for split, rows in dataset.items():
            most = self.max_train_samples if split == "train" else self.max_eval_samples
            if most is not None and most < len(rows):
                dataset[split] = (rows.shuffle(seed=0) if shuffle else rows).select(range(most))
        return dataset

    @property
    def source(self) -> str:
        """The name of the data in a model card."""
        return Path(self.train_file).name if self.train_file else self.dataset_name or "unknown"
