"""Classifies texts with a small feedback network trained from nothing, or with a checkpoint.

python examples/run_classification.py                        # is a sentence about a film positive?
python examples/run_classification.py --train_file my.csv --text_column review --label_column stars
python examples/run_classification.py --model_name_or_path runs/clm      # the body of a language model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    set_seed,
)

from feedback_transformers import data, metrics
from feedback_transformers.training import StopOnNonFinite, scripts

ARCHITECTURE = {
    "feedback_axis": "depth",
    "feedback_type": "transformer",
    "feedback_connection": "gate",
    "is_causal": False,
    "num_feedback_steps": 3,
    "supervision": "all",
    "num_encoder_layers": 1,
    "num_feedback_layers": 1,
    "decoder_type": "mlp",
    "num_decoder_layers": 0,
    "dropout": 0.1,
}
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "max_position_embeddings": 512}
DEFAULTS: dict[str, Any] = {
    "output_dir": "runs/classification",
    "dataset_name": "movie-sentiment",
    "num_train_epochs": 4,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 128,
    "learning_rate": 1e-3,
    "warmup_steps": 0.1,
    "weight_decay": 0.1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
}
SMOKE: dict[str, Any] = {
    "output_dir": "runs/smoke/classification",
    "num_train_epochs": 1,
    "max_train_samples": 32,
    "max_eval_samples": 16,
    "per_device_train_batch_size": 16,
    "logging_steps": 1,
    "vocab_size": 300,
    "config_overrides": "hidden_size=32,intermediate_size=64",
}


@dataclass
class ClassificationArguments(scripts.DataArguments):
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    label_column: str = field(default="label", metadata={"help": "The column that holds the class."})
    vocab_size: int = field(default=4096, metadata={"help": "Of the tokenizer of a new model."})
    max_seq_length: int = field(default=256, metadata={"help": "Longer texts are cut."})


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, ClassificationArguments, TrainingArguments)
    model_args, text_args, training_args = scripts.parse(types, arguments, DEFAULTS, SMOKE)
    set_seed(training_args.seed)
    dataset = text_args.load()
    scripts.check_columns(dataset, text_column=text_args.text_column)
    known = model_args.classes(AutoModelForSequenceClassification)
    dataset = scripts.with_classes(dataset, text_args.label_column, known, training_args.do_train)
    dataset = text_args.limit(dataset, shuffle=True)
    names = dict(enumerate(dataset["train"].features[text_args.label_column].names))
    labels = {"id2label": names, "label2id": {name: i for i, name in names.items()}}

    checkpoint, options = model_args.model_name_or_path, model_args.hub_options
    if checkpoint:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
        others = bool(known) and list(names.values()) != known  # whose readout begins anew if they are more or fewer
        model = model_args.load(AutoModelForSequenceClassification, **labels, ignore_mismatched_sizes=others)
    else:
        tokenizer = data.subwords(dataset["train"][text_args.text_column], text_args.vocab_size)
        sizes = {**SIZES, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        model = AutoModelForSequenceClassification.from_config(model_args.config(ARCHITECTURE, **sizes, **labels))
    print(f"{model.num_parameters():,} parameters, {len(dataset['train']):,} texts of {len(names)} classes")

    def encode(rows: dict[str, list]) -> dict[str, Any]:
        encoded = tokenizer(rows[text_args.text_column], truncation=True, max_length=text_args.max_seq_length)
        return {**encoded, "labels": rows[text_args.label_column]}

    encoded = dataset.map(encode, batched=True, remove_columns=dataset["train"].column_names)
    scores = [metrics.load("accuracy"), metrics.load("f1")]
    average = "binary" if len(names) == 2 else "macro"

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        answers = {"predictions": np.argmax(prediction.predictions, axis=-1), "references": prediction.label_ids}
        accuracy, f1 = scores
        return {**accuracy.compute(**answers), **f1.compute(**answers, average=average)}

    trainer = Trainer(
        model,
        training_args,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
        callbacks=[*scripts.drawn_passes(model_args, model, training_args.do_train), StopOnNonFinite()],
    )
    results = scripts.fit(trainer, encoded.get("test"), metric="accuracy")

    scripts.publish(
        trainer,
        tokenizer,
        {name: value for name, value in results.items() if "accuracy" in name or "f1" in name},
        name="Feedback text classifier",
        dataset=text_args.source,
        description=f"Trained on {text_args.source} with the classes {', '.join(names.values())}.",
        command=scripts.command(__file__, arguments),
    )
    return results


if __name__ == "__main__":
    main()
