"""Sequence to sequence: translation, summarization. Every feedback step can look at the source.

    python examples/run_seq2seq.py                               # King James English to modern English
    python examples/run_seq2seq.py --dataset_name aws-docs       # first sentences from the rest of a document
    python examples/run_seq2seq.py --train_file pairs.csv --source_column en --target_column fr

Translations are scored with sacreBLEU and chrF, summaries with ROUGE; and beside the model's score stands that of
copying the source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from feedback_transformers import data, metrics
from feedback_transformers.training import StopOnNonFinite, scripts

import numpy as np
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

RECIPE = scripts.recipes.SEQ2SEQ


@dataclass
class PairArguments(scripts.DataArguments):
    source_column: str = field(default="source", metadata={"help": "The column that holds what is read."})
    target_column: str = field(default="target", metadata={"help": "The column that holds what is written."})
    vocab_size: int = field(default=4096, metadata={"help": "Of the tokenizer of a new model."})
    max_source_length: int = field(default=128, metadata={"help": "Longer sources are cut."})
    max_target_length: int = field(default=96, metadata={"help": "Longer targets are cut; none longer is written."})
    num_beams: int = field(default=1, metadata={"help": "1 writes greedily."})
    metric: str | None = field(
        default=None, metadata={"help": "bleu (with chrF) or rouge; by default rouge for aws-docs and bleu elsewhere."}
    )

    def __post_init__(self) -> None:
        if self.metric not in (None, "bleu", "rouge"):
            raise ValueError(f"Unknown metric {self.metric!r}; choose bleu or rouge.")


def score(predictions: list[str], references: list[str], metric: str) -> dict[str, float]:
    texts = {"predictions": predictions, "references": references}
    if metric == "rouge":
        return metrics.load("rouge").compute(**texts)
    return {
        "bleu": metrics.load("sacrebleu").compute(**texts)["score"],
        "chrf": metrics.load("chrf").compute(**texts)["score"],
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, PairArguments, Seq2SeqTrainingArguments)
    model_args, pair_args, training_args = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    training_args.predict_with_generate = True
    training_args.generation_max_length = pair_args.max_target_length
    training_args.generation_num_beams = pair_args.num_beams
    set_seed(training_args.seed)
    columns = {"source_column": pair_args.source_column, "target_column": pair_args.target_column}
    dataset = pair_args.load(texts=columns)
    dataset = pair_args.limit(dataset)
    metric = pair_args.metric or ("rouge" if pair_args.dataset_name == "aws-docs" else "bleu")

    checkpoint, options = model_args.model_name_or_path, model_args.hub_options
    if checkpoint:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
        model = model_args.load(AutoModelForSeq2SeqLM)
    else:
        train = dataset["train"]
        texts = [*train[pair_args.source_column], *train[pair_args.target_column]]
        tokenizer = data.subwords(texts, pair_args.vocab_size)
        config = model_args.config(
            RECIPE.architecture,
            **RECIPE.sizes,
            is_encoder_decoder=True,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.bos_token_id,
        )
        model = AutoModelForSeq2SeqLM.from_config(config)
    scripts.set_max_length(tokenizer, model)
    print(f"{model.num_parameters():,} parameters, {len(dataset['train']):,} pairs")

    def encode(rows: dict[str, list]) -> dict[str, Any]:
        def ids(column: str, length: int) -> list[list[int]]:
            encoded = tokenizer(rows[column], truncation=True, max_length=length - 1)["input_ids"]
            return [[*tokens, tokenizer.eos_token_id] for tokens in encoded]

        sources = ids(pair_args.source_column, pair_args.max_source_length)
        return {
            "input_ids": sources,
            "attention_mask": [[1] * len(source) for source in sources],
            "labels": ids(pair_args.target_column, pair_args.max_target_length),
        }

    encoded = dataset.map(encode, batched=True, remove_columns=dataset["train"].column_names)

    def texts_of(ids: np.ndarray) -> list[str]:
        return tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return score(texts_of(prediction.predictions), texts_of(prediction.label_ids), metric)

    trainer = Seq2SeqTrainer(
        model,
        training_args,
        train_dataset=encoded["train"],
        eval_dataset=encoded["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        compute_metrics=compute_metrics,
        callbacks=[*scripts.drawn_passes(model_args, model, training_args.do_train), StopOnNonFinite()],
    )

    def compare(predictions: np.ndarray) -> dict[str, float]:
        test = dataset["test"]
        sources, targets = test[pair_args.source_column], test[pair_args.target_column]
        for source, written in zip(sources[:3], texts_of(predictions[:3]), strict=True):
            print(f"  {source}\n-> {written}\n")
        return {f"test_{name}_of_the_source": value for name, value in score(sources, targets, metric).items()}

    results = scripts.fit(trainer, encoded.get("test"), compare, "rougeL" if metric == "rouge" else "bleu")
    scripts.publish(
        trainer,
        tokenizer,
        {name: value for name, value in results.items() if any(key in name for key in ("bleu", "chrf", "rouge"))},
        name="Feedback sequence-to-sequence model",
        dataset=pair_args.source,
        description=f"Trained on the pairs of {pair_args.source}.",
        command=scripts.command(__file__, arguments),
    )
    return results


if __name__ == "__main__":
    main()
