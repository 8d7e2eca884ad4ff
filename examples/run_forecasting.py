"""Forecast a series: each forecast value is fed back as the next input, for as many steps ahead as wanted.

    python examples/run_forecasting.py                           # hourly electricity, 24 hours ahead
    python examples/run_forecasting.py --train_file my.csv --value_column sales --context_length 28 \
        --prediction_length 7 --season 7
    python examples/run_forecasting.py --train_file shops.csv --value_column sales --id_column shop --series_id north

The error is the MASE. It is printed beside that of the naive forecasts, which repeat the last day and the last week.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import AutoModelForTimeSeriesPrediction, EvalPrediction, Trainer, TrainingArguments, set_seed

from feedback_transformers import data, metrics
from feedback_transformers.training import MuonAdamW, StopOnNonFinite, scripts

ARCHITECTURE = {
    "feedback_axis": "depth",
    "feedback_type": "transformer",
    "feedback_connection": "gate",
    "num_feedback_steps": 3,
    "num_encoder_layers": 1,
    "num_feedback_layers": 1,
    "num_decoder_layers": 1,
}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/forecasting",
    "dataset_name": "electricity",
    "max_steps": 1000,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 128,
    "learning_rate": 3e-3,
    "warmup_steps": 0.05,
    "weight_decay": 0.05,
    "eval_strategy": "steps",
    "eval_steps": 500,
    "save_steps": 500,
    "label_names": ["future_values"],
}
SMOKE: dict[str, Any] = {
    "output_dir": "runs/smoke/forecasting",
    "max_steps": 2,
    "max_train_samples": 16,
    "max_eval_samples": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "config_overrides": "hidden_size=16,intermediate_size=32",
}


@dataclass
class SeriesArguments(scripts.DataArguments):
    value_column: str = field(default="value", metadata={"help": "The column that holds the series, in order."})
    timestamp_column: str | None = field(
        default=None, metadata={"help": "The column that holds the time; 'none' takes the rows as equally spaced."}
    )
    id_column: str | None = field(default=None, metadata={"help": "The column that tells several series apart."})
    series_id: str | None = field(default=None, metadata={"help": "The series of id_column to forecast."})
    context_length: int = field(default=168, metadata={"help": "Steps of the past that a forecast is made from."})
    prediction_length: int = field(default=24, metadata={"help": "Steps ahead."})
    season: int = field(default=24, metadata={"help": "The period of MASE and of the first naive forecast."})
    long_season: int = field(default=168, metadata={"help": "The period of the second naive forecast."})
    train_stride: int = field(default=1, metadata={"help": "A training window starts at every so many steps."})
    eval_stride: int = field(default=24, metadata={"help": "And so does a test window."})


def windows(series: DatasetDict, arguments: SeriesArguments) -> DatasetDict:
    """Cut each split into past_values and future_values.

    Where validation is the end of one's own train file, its first windows look back into train, as a forecast would.
    """
    values = {split: rows[arguments.value_column] for split, rows in series.items()}
    if arguments.train_file and not arguments.validation_file:
        values["validation"] = [*values["train"][-arguments.context_length :], *values["validation"]]
    strides = {"train": arguments.train_stride}
    sizes = (arguments.context_length, arguments.prediction_length)
    return DatasetDict(
        {
            split: data.windows(each, *sizes, strides.get(split, arguments.eval_stride))
            for split, each in values.items()
        }
    )


def naive(past: np.ndarray, season: int, length: int) -> np.ndarray:
    """Return the seasonal naive forecast [N, length] of the past [N, T]: the values of `season` steps before."""
    return np.tile(past[:, -season:], (1, -(-length // season)))[:, :length]


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, SeriesArguments, TrainingArguments)
    model_args, series_args, training_args = scripts.parse(types, arguments, DEFAULTS, SMOKE)
    set_seed(training_args.seed)
    header = str(series_args.train_file).endswith((".csv", ".tsv"))

    def one_series(rows: Dataset) -> Dataset:
        scripts.check_columns({"given": rows}, texts=False, value_column=series_args.value_column)
        names = (series_args.timestamp_column, series_args.id_column, series_args.series_id)
        return data.one_series(rows, series_args.value_column, *names, first_line=2 if header else 1)

    series = series_args.load(shuffle=False, prepare=one_series)
    dataset = series_args.limit(windows(series, series_args))

    if model_args.model_name_or_path:
        model = model_args.load(AutoModelForTimeSeriesPrediction)
    else:
        config = model_args.config(
            ARCHITECTURE, **SIZES, embedding_type="values", prediction_length=series_args.prediction_length
        )
        model = AutoModelForTimeSeriesPrediction.from_config(config)
    print(f"{model.num_parameters():,} parameters, {len(dataset['train']):,} windows")

    history = series["train"][series_args.value_column]
    mase = metrics.load("mase")

    def error(predictions: np.ndarray, references: np.ndarray) -> float:
        values = {"predictions": predictions, "references": references}
        return mase.compute(**values, training=list(history), periodicity=series_args.season)["mase"]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return {"mase": error(prediction.predictions, prediction.label_ids)}

    trainer = Trainer(
        model,
        training_args,
        train_dataset=dataset["train"].with_format("torch"),
        eval_dataset=dataset["validation"].with_format("torch"),
        compute_metrics=compute_metrics,
        callbacks=[StopOnNonFinite(), *scripts.drawn_passes(model_args, model, training_args.do_train)],
        optimizers=(MuonAdamW(model, training_args.learning_rate, weight_decay=training_args.weight_decay), None),
    )

    def naive_errors(split: str, name: str) -> dict[str, float]:
        past, future = (np.asarray(dataset[split][column]) for column in ("past_values", "future_values"))
        seasons = [n for n in (series_args.season, series_args.long_season) if n <= past.shape[1]] or [1]
        return {f"{name}_mase_naive_{n}": error(naive(past, n, future.shape[1]), future) for n in seasons}

    test = dataset["test"].with_format("torch") if "test" in dataset else None
    results = scripts.fit(trainer, test, lambda predictions: naive_errors("test", "test"), metric="mase")
    if "eval_mase" in results:
        results |= naive_errors("validation", "eval")
        trainer.save_metrics("eval", results)
    for name, value in results.items():
        if "mase" in name and "_step_" not in name:
            print(f"{value:8.3f}  {name.partition('_')[2].replace('_', ' ')}, the lower the better")
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


if __name__ == "__main__":
    main()
