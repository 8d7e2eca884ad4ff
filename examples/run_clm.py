"""Trains a feedback language model, or trains one further, with the stock Trainer.

python examples/run_clm.py                                   # Shakespeare, character by character
python examples/run_clm.py --tokenizer bpe --train_file my.txt --config_overrides hidden_size=256
python examples/run_clm.py --train_file my_folder            # of .txt files; or a pattern, 'my_folder/*.txt'
python examples/run_clm.py --model_name_or_path runs/clm --dataset_name python-docs --output_dir runs/more
python examples/run_clm.py --streaming true --train_file my.txt --validation_file its_end.txt --max_steps 1000
python examples/run_clm.py arguments.json
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from feedback_transformers import data
from feedback_transformers.training import MuonAdamW, StopOnNonFinite, scripts

import torch
from datasets import DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

RECIPE = scripts.recipes.LANGUAGE_MODEL
TOKENIZER_ROWS = 10_000  # of a stream, that a new tokenizer is made of
EMBEDDING_STD = 0.5  # with a readout of its own; a tied one needs small embeddings


@dataclass
class TextArguments(scripts.DataArguments):
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    tokenizer: str = field(
        default="characters", metadata={"help": "Of a new model: characters, bpe, or the name of a pretrained one."}
    )
    vocab_size: int = field(default=2048, metadata={"help": "Of a new bpe tokenizer."})
    block_size: int = field(default=128, metadata={"help": "Tokens per training example."})
    muon_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Train matrices with Muon at this rate, and the rest with AdamW; 0 is AdamW alone."},
    )


@dataclass
class StreamArguments(TextArguments):
    streaming: bool = field(
        default=False, metadata={"help": "Read the text as training goes, for one too large to keep as tokens."}
    )


def stream_blocks(texts: IterableDatasetDict, tokenizer: PreTrainedTokenizerBase, text_args: TextArguments) -> Any:
    """data.blocks of a stream: of each thousand rows, the tokens that don't fill a block are left out. Those of train
    come in the order of a shuffling buffer, the same for every process and after a restart."""
    size, column = text_args.block_size, text_args.text_column

    def cut(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens = [token for text in rows[column] for token in tokenizer(text, verbose=False)["input_ids"]]
        cuts = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": cuts, "labels": cuts}

    def limited(rows: IterableDataset, most: int | None) -> IterableDataset:
        return rows if most is None else rows.take(most)

    blocks = {name: rows.map(cut, batched=True, remove_columns=rows.column_names) for name, rows in texts.items()}
    train = limited(blocks["train"], text_args.max_train_samples).shuffle(seed=0, buffer_size=1000)
    return {"train": train, "validation": limited(blocks["validation"], text_args.max_eval_samples)}


def prepare(
    model_args: scripts.ModelArguments, text_args: TextArguments
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, DatasetDict]:
    """The model, its tokenizer, and blocks of tokens. Also what the other examples of language models begin with."""
    streaming = getattr(text_args, "streaming", False)
    texts: Any = text_args.stream() if streaming else text_args.load(shuffle=False)
    if not streaming:
        scripts.check_columns(texts, text_column=text_args.text_column)
    checkpoint, options = model_args.model_name_or_path, model_args.hub_options
    if checkpoint:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
        model = model_args.load(AutoModelForCausalLM)
    else:
        rows = texts["train"].take(TOKENIZER_ROWS) if streaming else texts["train"]
        train = list(rows[text_args.text_column])
        if text_args.tokenizer == "characters":
            tokenizer = data.characters(train)
        elif text_args.tokenizer == "bpe":
            tokenizer = data.subwords(train, text_args.vocab_size)
        else:
            tokenizer = AutoTokenizer.from_pretrained(text_args.tokenizer)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model = AutoModelForCausalLM.from_config(
            model_args.config(RECIPE.architecture, **RECIPE.sizes, vocab_size=len(tokenizer), **ids)
        )
        if not model.config.tie_word_embeddings:
            torch.nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    scripts.set_max_length(tokenizer, model)
    if streaming:
        return model, tokenizer, stream_blocks(texts, tokenizer, text_args)
    blocks = data.blocks(texts, tokenizer, text_args.block_size, text_args.text_column)
    return model, tokenizer, text_args.limit(blocks)


def blocks(text_args: TextArguments, tokenizer: PreTrainedTokenizerBase, *splits: str) -> DatasetDict:
    """Blocks of tokens of some splits, for a tokenizer that is there."""
    texts = text_args.load(shuffle=False)
    texts = DatasetDict({split: texts[split] for split in splits})
    scripts.check_columns(texts, text_column=text_args.text_column)
    return text_args.limit(data.blocks(texts, tokenizer, text_args.block_size, text_args.text_column))


def optimizer(model: torch.nn.Module, text_args: TextArguments, lr: float, weight_decay: float) -> MuonAdamW | None:
    """Muon with AdamW; None where its rate is zero or not given."""
    if not text_args.muon_learning_rate:
        return None
    return MuonAdamW(model, lr=lr, muon_lr=text_args.muon_learning_rate, weight_decay=weight_decay)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, StreamArguments, TrainingArguments)
    model_args, text_args, training_args = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    set_seed(training_args.seed)
    model, tokenizer, blocks = prepare(model_args, text_args)
    count = "a stream of" if text_args.streaming else f"{len(blocks['train']):,}"
    print(f"{model.num_parameters():,} parameters, {count} blocks of {text_args.block_size} tokens")

    trainer = Trainer(
        model,
        training_args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[*scripts.drawn_passes(model_args, model, training_args.do_train), StopOnNonFinite()],
        optimizers=(optimizer(model, text_args, training_args.learning_rate, training_args.weight_decay), None),
    )
    trainer.args.prediction_loss_only = True  # the logits of a whole validation set are large

    metrics = {}
    if training_args.do_train:
        scripts.record(trainer, "train", scripts.train(trainer))
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        metrics |= scripts.measure_passes(
            trainer, "perplexity", lambda: math.exp(trainer.predict(blocks["validation"]).metrics["test_loss"])
        )
        scripts.record(trainer, "eval", metrics)

    scripts.publish(
        trainer,
        tokenizer,
        {name: value for name, value in metrics.items() if name == "eval_loss" or name.startswith("perplexity")},
        name="Feedback language model",
        dataset=text_args.source,
        description=f"Trained on {text_args.source} in blocks of {text_args.block_size} tokens.",
        command=scripts.command(__file__, arguments),
    )
    return metrics


if __name__ == "__main__":
    main()
