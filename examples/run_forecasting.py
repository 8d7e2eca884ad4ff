"""Forecast a series: each forecast value is fed back as the next input, for as many steps ahead as wanted.

    python examples/run_forecasting.py                           # hourly electricity, 24 hours ahead
    python examples/run_forecasting.py --train_file my.csv --value_column sales --context_length 28 \
        --prediction_length 7 --season 7

The file holds one series: a row for each hour, day or month, in order, with a number in each. A file of several
series is refused; --id_column store --series_id Berlin chooses one of them.

The error is the MASE. The script prints it beside the errors of two forecasts that need no model: to repeat the last
day, and to repeat the last week (--season, --long_season).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from feedback_transformers import data, metrics
from feedback_transformers.training import MuonAdamW, StopOnNonFinite, scripts

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForTimeSeriesPrediction, Trainer, TrainingArguments, set_seed

RECIPE = scripts.recipes.FORECASTING


@dataclass
class SeriesArguments(scripts.DataArguments):
    value_column: str = field(default="value", metadata={"help": "The column that holds the values, in order."})
    timestamp_column: str | None = field(
        default=None,
        metadata={
            "help": "The column of their times; else one that looks like it. none takes the rows as evenly spaced."
        },
    )
    id_column: str | None = field(
        default=None, metadata={"help": "The column that tells several series apart, or several with commas."}
    )
    series_id: str | None = field(default=None, metadata={"help": "Which of them: a value of id_column."})
    context_length: int = field(default=168, metadata={"help": "Steps of the past that a forecast is made from."})
    prediction_length: int = field(default=24, metadata={"help": "Steps ahead."})
    season: int = field(default=24, metadata={"help": "The period of MASE and of the first naive forecast."})
    long_season: int = field(default=168, metadata={"help": "The period of the second naive forecast."})
    train_stride: int = field(default=1, metadata={"help": "A training window starts at every so many steps."})
    eval_stride: int = field(default=24, metadata={"help": "And so does a test window."})

    def series(self) -> DatasetDict:
        """Return the rows of one series in `train`, `validation` and perhaps `test`.

        Without validation data it is the end of train. The first forecasts of it then look back into train.
        """
        dataset = self.read()
        if "train" not in dataset:
            raise ValueError("There is no train data, whose end is the validation data: give --train_file too.")
        scripts.check_columns(dataset, texts=False, value_column=self.value_column)
        names = (self.value_column, self.timestamp_column, self.id_column, self.series_id)
        for split, rows in dataset.items():
            file = self.files.get(split)
            dataset[split] = scripts.one_series(rows, file or f"The {split} data of {self.source}", file, *names)
        if "validation" not in dataset:
            rows, share = dataset["train"], self.validation_split_percentage / 100
            start = len(rows) - max(round(len(rows) * share), self.prediction_length)
            self.check_length("train", start)
            dataset["train"] = rows.select(range(start))
            dataset["validation"] = rows.select(range(start - self.context_length, len(rows)))
        return dataset

    def check_length(self, split: str, length: int) -> None:
        """Refuse a split that is shorter than one window."""
        window = self.context_length + self.prediction_length
        if length < window:
            raise ValueError(
                f"A window takes {window} values (--context_length {self.context_length} and --prediction_length "
                f"{self.prediction_length}), and the {split} data has {max(length, 0)}: make them smaller, or give "
                "more rows."
            )

    def windows(self, series: DatasetDict) -> DatasetDict:
        """Return past_values and future_values of each split; a window lies inside its split."""
        cut = DatasetDict()
        for split, rows in series.items():
            self.check_length(split, len(rows))
            stride = self.train_stride if split == "train" else self.eval_stride
            cut[split] = data.windows(rows[self.value_column], self.context_length, self.prediction_length, stride)
        return self.limit(cut)


def naive(past: np.ndarray, season: int, length: int) -> np.ndarray:
    """Return the seasonal naive forecast [N, length] of the past [N, T]: what was `season` steps before."""
    return np.tile(past[:, -season:], (1, -(-length // season)))[:, :length]


def tensors(rows: Dataset) -> Dataset:
    """Return windows as tensors, in float64 where they need it: large values with small changes."""
    return rows.with_format("torch", dtype=getattr(torch, rows.features["past_values"].feature.dtype))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, SeriesArguments, TrainingArguments)
    model_args, series_args, training_args = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    set_seed(training_args.seed)

    # The data, and what forecasts without a model are worth
    series = series_args.series()
    dataset = series_args.windows(series)
    history = list(series["train"][series_args.value_column])
    mase = metrics.load("mase")
    if series_args.season >= len(history):
        raise ValueError(f"--season {series_args.season} is longer than the train data, {len(history)} steps.")

    def error(predictions: np.ndarray, references: np.ndarray) -> float:
        values = {"predictions": predictions, "references": references}
        return mase.compute(**values, training=history, periodicity=series_args.season)["mase"]

    def naive_errors(split: str) -> dict[int, float]:
        past, future = (np.asarray(dataset[split][name]) for name in ("past_values", "future_values"))
        seasons = [season for season in (series_args.season, series_args.long_season) if season <= past.shape[1]]
        return {season: error(naive(past, season, future.shape[1]), future) for season in seasons or [1]}

    last = "test" if "test" in dataset and training_args.do_predict else "validation"
    without = naive_errors(last)
    print(f"{len(history):,} steps to learn from, {len(dataset['train']):,} windows")
    for season, value in without.items():
        print(f"Repeating the last {season} steps: MASE {value:.3f} on the {last} data")

    # The model
    if model_args.model_name_or_path:
        model = model_args.load(AutoModelForTimeSeriesPrediction)
        model.config.prediction_length = series_args.prediction_length
    else:
        sizes = {**RECIPE.sizes, "input_config": "values", "prediction_length": series_args.prediction_length}
        model = AutoModelForTimeSeriesPrediction.from_config(model_args.config(RECIPE.architecture, **sizes))
    print(f"{model.num_parameters():,} parameters")

    # Training
    trainer = Trainer(
        model,
        training_args,
        train_dataset=tensors(dataset["train"]),
        eval_dataset=tensors(dataset["validation"]),
        compute_metrics=lambda found: {"mase": error(found.predictions, found.label_ids)},
        callbacks=[*scripts.drawn_passes(model_args, model, training_args.do_train), StopOnNonFinite()],
        optimizers=(MuonAdamW(model, training_args.learning_rate, weight_decay=training_args.weight_decay), None),
    )
    prefix = "test" if last == "test" else "eval"
    named = {f"{prefix}_mase_naive_{season}": value for season, value in without.items()}
    test = tensors(dataset["test"]) if last == "test" else None
    results = scripts.fit(trainer, test, lambda predictions: named, metric="mase")
    if not results:
        return results  # neither --do_eval nor --do_predict
    results |= named
    print_errors(results[f"{prefix}_mase"], without)

    scripts.publish(
        trainer,
        None,
        {name: value for name, value in results.items() if "mase" in name},
        name="Feedback forecaster",
        dataset=series_args.source,
        description=f"Forecasts {series_args.source}, {series_args.prediction_length} steps ahead.",
        command=scripts.command(__file__, arguments),
    )
    return results


def print_errors(model: float, without: dict[int, float]) -> None:
    """Print the error of the model beside those of the forecasts that need none."""
    print(f"\n{'MASE':>8}  forecast\n{model:>8.3f}  of the model")
    for season, value in without.items():
        print(f"{value:>8.3f}  repeating the last {season} steps")
    if model >= min(without.values()):
        print("The model is no better than repeating the past: train longer (--max_steps), or give more data.")
    print()


if __name__ == "__main__":
    main()
