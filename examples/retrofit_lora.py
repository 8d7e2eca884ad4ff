"""Retrofits a pretrained language model: its middle layers become a loop, and a few percent of it learn to use it.

    python examples/retrofit_lora.py --model_name_or_path HuggingFaceTB/SmolLM2-135M
    python examples/retrofit_lora.py --model_name_or_path my/folder --axis time --train_file my.txt

It begins as what it was, for any number of feedback steps. Trained are the connection that lets the feedback in, and
LoRA of all layers. Prints the perplexity of the original, of the retrofit, and of what training made of it, on the new
text and on an old one. The adapter, for `retrofit` of the same layers, is in output_dir/adapter; the merged model in
output_dir.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import run_clm
from feedback_transformers import data, retrofit
from feedback_transformers.training import Distill, SampleFeedbackSteps, StopOnNonFinite, scripts, with_steps
from finetune_lora import LoraArguments

import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

RECIPE = scripts.recipes.RETROFIT


@dataclass
class OriginalArguments(scripts.ModelArguments):
    """Of the model to retrofit; `config_overrides` are of what is made of it."""

    def __post_init__(self) -> None:
        if self.preset:
            raise ValueError("preset is of a new model: leave it out.")


@dataclass
class RetrofitArguments:
    encoder_layers: int | None = field(
        default=None, metadata={"help": "How many of the first layers run once, before the loop; else a third."}
    )
    decoder_layers: int | None = field(
        default=None, metadata={"help": "How many of the last layers run once, after it; else a third."}
    )
    axis: Literal["depth", "time"] = field(
        default="depth", metadata={"help": "Feedback from the previous pass, or from the previous position."}
    )
    num_feedback_steps: int = field(
        default=4, metadata={"help": "Passes of the layers between, and max_feedback_steps where that is not given."}
    )
    feedback_connection: Literal["gate", "add", "concat"] = field(
        default="gate", metadata={"help": "How feedback enters."}
    )
    gradient_steps: int | None = field(
        default=None, metadata={"help": "Back-propagate through the last so many passes only."}
    )
    curriculum: float = field(
        default=0.25, metadata={"help": "The share of training over which the most feedback steps are reached."}
    )
    distillation_weight: float = field(
        default=0.0, metadata={"help": "How much KL(original || model) on the training text adds to the loss."}
    )


def tiny(folder: Path, text_args: run_clm.TextArguments) -> str:
    """A small random Llama, for --smoke."""
    tokenizer = data.characters(text_args.load(shuffle=False)["train"][text_args.text_column])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (OriginalArguments, run_clm.TextArguments, RetrofitArguments, LoraArguments, TrainingArguments)
    parsed = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    model_args, text_args, retrofit_args, lora_args, training_args = parsed
    output = Path(training_args.output_dir)
    if not training_args.do_train:
        raise ValueError("This script trains, and compares with before: leave --do_train out.")
    set_seed(training_args.seed)
    if model_args.model_name_or_path is None and text_args.smoke:
        model_args.model_name_or_path = tiny(output / "base", text_args)
    if model_args.model_name_or_path is None:
        raise ValueError("Give --model_name_or_path, a language model to retrofit.")

    name, options = model_args.model_name_or_path, model_args.hub_options
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    original = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)  # bf16 loses small steps
    third = original.config.num_hidden_layers // 3
    model = retrofit(
        original,
        third if retrofit_args.encoder_layers is None else retrofit_args.encoder_layers,
        third if retrofit_args.decoder_layers is None else retrofit_args.decoder_layers,
        retrofit_args.num_feedback_steps,
        retrofit_args.axis,
        feedback_connection=retrofit_args.feedback_connection,
        gradient_steps=retrofit_args.gradient_steps,
        **scripts.overrides(model_args.config_overrides),
    )
    scripts.set_max_length(tokenizer, model)
    model = get_peft_model(model, lora_args.config(modules_to_save=["connection"]))
    model.print_trainable_parameters()

    old_args = run_clm.TextArguments(
        dataset_name=lora_args.old_dataset_name,
        block_size=text_args.block_size,
        max_eval_samples=text_args.max_eval_samples,
    )
    new = run_clm.blocks(text_args, tokenizer, "train", "validation")
    old = run_clm.blocks(old_args, tokenizer, "validation")
    validation = {text_args.source: new["validation"], old_args.source: old["validation"]}

    model_args.max_feedback_steps = model_args.max_feedback_steps or retrofit_args.num_feedback_steps
    fewest, most = scripts.steps_to_draw(model_args, model)
    callbacks = [SampleFeedbackSteps(fewest, most, retrofit_args.curriculum)]
    if retrofit_args.distillation_weight:
        callbacks.append(Distill(original, retrofit_args.distillation_weight))
    trainer = Trainer(
        model,
        training_args,
        train_dataset=new["train"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[*callbacks, StopOnNonFinite()],
    )
    trainer.args.prediction_loss_only = True

    def perplexity(trainer: Trainer, steps: int) -> dict[str, float]:
        """By text, at so many feedback steps."""
        with with_steps(model, steps):
            found = {text: trainer.predict(rows).metrics["test_loss"] for text, rows in validation.items()}
        return {text: math.exp(loss) for text, loss in found.items()}

    scripts.record(trainer, "train", scripts.train(trainer))
    counts = sorted({1, retrofit_args.num_feedback_steps})
    untouched = Trainer(original, training_args, data_collator=default_data_collator)
    untouched.model_accepts_loss_kwargs = False  # of GPT-2 it would count a token too many in each row
    first = perplexity(untouched, 1)
    with model.disable_adapter():  # not before training: a model evaluated first is not trained in parallel
        before = {steps: perplexity(trainer, steps) for steps in counts}
    after = {steps: perplexity(trainer, steps) for steps in counts}

    metrics = {}
    print(f"{'perplexity':<20}{'steps':>6}{'original':>10}{'before':>10}{'after':>10}")
    for text in validation:
        metrics[f"perplexity_original_{text}"] = first[text]
        for steps in counts:
            metrics[f"perplexity_before_{text}_step_{steps}"] = before[steps][text]
            metrics[f"perplexity_after_{text}_step_{steps}"] = after[steps][text]
            print(f"{text:<20}{steps:>6}{first[text]:>10.2f}{before[steps][text]:>10.2f}{after[steps][text]:>10.2f}")
    source = text_args.source
    metrics |= scripts.measure_passes(
        trainer,
        f"perplexity_after_{source}",
        lambda: math.exp(trainer.predict(validation[source]).metrics["test_loss"]),
    )
    scripts.record(trainer, "eval", metrics)

    model.save_pretrained(output / "adapter")
    trainer.model = model.merge_and_unload()  # into the weights that the original shares
    scripts.publish(
        trainer,
        tokenizer,
        metrics,
        name="Retrofitted feedback language model",
        dataset=text_args.source,
        license="other",  # that of the original
        description=f"{name}, retrofitted with feedback and trained on {text_args.source} with LoRA, under the "
        "license of the original; the adapter is in adapter/.",
        command=scripts.command(__file__, arguments),
    )
    return metrics


if __name__ == "__main__":
    main()
