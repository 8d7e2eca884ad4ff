"""Classify texts with a small feedback network, trained from nothing or from a checkpoint.

    python examples/run_classification.py                        # is a sentence about a film positive?
    python examples/run_classification.py --train_file reviews.csv --text_column review --label_column stars
    python examples/run_classification.py --model_name_or_path runs/clm      # the body of a language model
    python examples/run_classification.py --model_name_or_path runs/classification --do_train false \
        --test_file new.csv                                      # writes predictions.csv

A label is one class (words or whole numbers), several classes (a list, or a column of 0 and 1 for each class), or a
number with decimals (regression). The script prints what it takes the labels for; --problem_type decides otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from feedback_transformers import data
from feedback_transformers.training import StopOnNonFinite, scripts

from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

RECIPE = scripts.recipes.CLASSIFICATION


@dataclass
class ClassificationArguments(scripts.DataArguments):
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    label_column: str = field(
        default="label",
        metadata={"help": "The column that holds the label; or several with commas, one for each class or number."},
    )
    problem_type: str | None = field(
        default=None, metadata={"help": f"What the labels are: {', '.join(scripts.PROBLEMS)}; else read from them."}
    )
    label_separator: str | None = field(
        default=None, metadata={"help": "Splits a label into several classes, as | does in drama|history."}
    )
    class_weights: Literal["none", "balanced"] = field(
        default="none", metadata={"help": "balanced lets all classes weigh the same in the loss."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Of the tokenizer of a new model."})
    max_seq_length: int = field(default=256, metadata={"help": "Longer texts are cut."})


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, ClassificationArguments, TrainingArguments)
    model_args, text_args, training_args = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    set_seed(training_args.seed)

    # The data, and what its labels are
    columns = [name.strip() for name in text_args.label_column.split(",")]
    texts = {"text_column": text_args.text_column}
    dataset = text_args.load(texts=texts, labels={"label_column": columns}, trains=training_args.do_train)
    known = scripts.known_targets(model_args, AutoModelForSequenceClassification)
    dataset, targets = scripts.read_targets(
        dataset, columns, text_args.problem_type, text_args.label_separator, known, training_args.do_train
    )
    dataset = text_args.limit(dataset, shuffle=True)
    if "validation" not in dataset:  # a test alone, to predict
        training_args.do_eval, training_args.eval_strategy = False, "no"
    print(f"A text has {targets}")

    # The model and its tokenizer
    checkpoint, options = model_args.model_name_or_path, model_args.hub_options
    if checkpoint:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
        others = known is not None and targets != known  # the readout begins anew if it has another size
        model = model_args.load(AutoModelForSequenceClassification, **targets.labels, ignore_mismatched_sizes=others)
    else:
        tokenizer = data.subwords(dataset["train"][text_args.text_column], text_args.vocab_size)
        sizes = {**RECIPE.sizes, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        config = model_args.config(RECIPE.architecture, **sizes, **targets.labels)
        model = AutoModelForSequenceClassification.from_config(config)
    scripts.set_max_length(tokenizer, model)
    rows = dataset["train"] if training_args.do_train else next(iter(dataset.values()))
    print(f"{model.num_parameters():,} parameters, {len(rows):,} texts")
    if text_args.class_weights == "balanced":
        scripts.balance_classes(model, targets, rows["labels"])

    def encode(rows: dict[str, list]) -> dict[str, Any]:
        encoded = tokenizer(rows[text_args.text_column], truncation=True, max_length=text_args.max_seq_length)
        return {**encoded, **({"labels": rows["labels"]} if "labels" in rows else {})}

    encoded = {
        split: rows.map(encode, batched=True, remove_columns=rows.column_names) for split, rows in dataset.items()
    }

    # Training
    if training_args.do_train:
        if training_args.metric_for_best_model == "auto":
            training_args.metric_for_best_model = scripts.best_metric(targets, rows["labels"])
        if training_args.metric_for_best_model.endswith(("mae", "rmse")):
            training_args.greater_is_better = False
        print(f"The best checkpoint is the one with the best {training_args.metric_for_best_model}")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return scripts.score(targets.problem, prediction.predictions, prediction.label_ids)

    trainer = Trainer(
        model,
        training_args,
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
        callbacks=[*scripts.drawn_passes(model_args, model, training_args.do_train), StopOnNonFinite()],
    )
    tested = "test" in dataset and "labels" in dataset["test"].column_names
    metric = "mae" if targets.problem == "regression" else "accuracy"
    results = scripts.fit(trainer, encoded["test"] if tested else None, metric=metric)

    # A report on each class, and predictions
    output, plots = Path(training_args.output_dir), []
    for split in ("test", "validation"):
        if split not in dataset or not (training_args.do_predict if split == "test" else training_args.do_eval):
            continue
        found = trainer.predict(encoded[split])
        if not trainer.is_world_process_zero():
            continue
        if split == "test":
            texts = dataset["test"][text_args.text_column]
            scripts.write_predictions(targets, found.predictions, texts, output / "predictions.csv")
        if found.label_ids is not None and not plots:
            plots = scripts.report(targets, found.predictions, found.label_ids, output)

    shown = ("accuracy", "f1", "mae", "r2")
    if not training_args.do_train and not results:
        return results  # nothing but predictions was asked for
    scripts.publish(
        trainer,
        tokenizer,
        {name: value for name, value in results.items() if any(key in name for key in shown)},
        name="Feedback text classifier",
        dataset=text_args.source,
        description=f"Trained on {text_args.source}. It reads a text and gives {targets}.",
        command=scripts.command(__file__, arguments),
        plots=plots,
    )
    return results


if __name__ == "__main__":
    main()
