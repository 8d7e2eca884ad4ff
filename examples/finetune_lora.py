"""Adapts a checkpoint to another text with LoRA: PEFT knows the projections of every feedback cell.

    python examples/run_clm.py                                              # makes runs/clm
    python examples/finetune_lora.py --model_name_or_path runs/clm          # from Shakespeare to Python's manual

Prints the perplexity before and after on the new text and on the old one. The adapter is in output_dir/adapter, the
merged model in output_dir.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import run_clm
from feedback_transformers.training import StopOnNonFinite, scripts

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, default_data_collator, set_seed

RECIPE = scripts.recipes.LORA


@dataclass
class LoraArguments:
    old_dataset_name: str = field(
        default="shakespeare", metadata={"help": "What the checkpoint was trained on, to see what it forgets."}
    )
    lora_r: int = field(default=8, metadata={"help": "The rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "Their scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    target_modules: str | None = field(
        default=None,
        metadata={"help": "Names of projections, with commas, or all-linear; else PEFT's default."},
    )

    def config(self, **fields: Any) -> LoraConfig:
        """`fields`: any other of LoraConfig."""
        names = self.target_modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=names.split(",") if names and names != "all-linear" else names,
            **fields,
        )


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, run_clm.TextArguments, LoraArguments, TrainingArguments)
    model_args, text_args, lora_args, training_args = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    output = Path(training_args.output_dir)
    if model_args.model_name_or_path is None and text_args.smoke:
        run_clm.main(["--smoke", "--output_dir", str(output / "base")])
        model_args.model_name_or_path = str(output / "base")
    if model_args.model_name_or_path is None:
        raise ValueError("Give --model_name_or_path, a checkpoint to adapt; examples/run_clm.py makes one.")
    if not training_args.do_train:
        raise ValueError("This script trains, and compares with before: leave --do_train out.")
    set_seed(training_args.seed)
    model, tokenizer, new = run_clm.prepare(model_args, text_args)
    old_args = run_clm.TextArguments(
        dataset_name=lora_args.old_dataset_name,
        block_size=text_args.block_size,
        max_eval_samples=text_args.max_eval_samples,
    )
    old = run_clm.blocks(old_args, tokenizer, "validation")
    validation = {text_args.source: new["validation"], old_args.source: old["validation"]}

    model = get_peft_model(model, lora_args.config())
    model.print_trainable_parameters()
    trainer = Trainer(
        model,
        training_args,
        train_dataset=new["train"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[*scripts.drawn_passes(model_args, model), StopOnNonFinite()],
    )
    trainer.args.prediction_loss_only = True

    def perplexity(dataset: Dataset) -> float:
        return math.exp(trainer.predict(dataset).metrics["test_loss"])

    scripts.record(trainer, "train", scripts.train(trainer))
    with model.disable_adapter():  # not before training: a model evaluated first is not trained in parallel
        before = {name: perplexity(dataset) for name, dataset in validation.items()}
    after = {name: perplexity(dataset) for name, dataset in validation.items()}

    metrics = {}
    print(f"{'perplexity':<20}{'before':>10}{'after':>10}")
    for name in validation:
        metrics |= {f"perplexity_before_{name}": before[name], f"perplexity_after_{name}": after[name]}
        print(f"{name:<20}{before[name]:>10.2f}{after[name]:>10.2f}")
    metrics |= scripts.measure_passes(
        trainer, f"perplexity_after_{text_args.source}", lambda: perplexity(new["validation"])
    )
    scripts.record(trainer, "eval", metrics)

    model.save_pretrained(output / "adapter")
    trainer.model = model.merge_and_unload()
    scripts.publish(
        trainer,
        tokenizer,
        metrics,
        name="Feedback language model, adapted with LoRA",
        dataset=text_args.source,
        description=f"{model_args.model_name_or_path}, adapted to {text_args.source}; the adapter is in adapter/.",
        command=scripts.command(__file__, arguments),
    )
    return metrics


if __name__ == "__main__":
    main()
