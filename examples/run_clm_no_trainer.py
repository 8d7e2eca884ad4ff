"""run_clm.py without Trainer: a loop of one's own with Accelerate, which can be stopped and resumed.

python examples/run_clm_no_trainer.py
accelerate launch examples/run_clm_no_trainer.py --resume_from_checkpoint true
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import run_clm
from accelerate import Accelerator
from feedback_transformers.training import (
    Sigterm,
    check_complete,
    draw_steps,
    first_non_finite,
    last_complete_checkpoint,
    own_steps,
    saving,
    scripts,
    trained_with,
    with_steps,
)

import torch
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import default_data_collator, get_scheduler


@dataclass
class LoopArguments:
    output_dir: str = field(default="runs/clm-no-trainer", metadata={"help": "For checkpoints, model and results."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Blocks per step and process."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Blocks per evaluation step and process."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches per update."})
    max_train_steps: int = field(default=3000, metadata={"help": "Updates of the weights."})
    learning_rate: float = field(default=3e-3, metadata={"help": "The highest one."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "As in transformers."})
    num_warmup_steps: int = field(default=150, metadata={"help": "Updates until the highest learning rate."})
    weight_decay: float = field(default=0.1, metadata={"help": "For AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Longer gradients are shortened."})
    checkpointing_steps: int = field(default=500, metadata={"help": "Updates between checkpoints."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "The folder of a checkpoint, or true for the last complete one of output_dir."}
    )
    report_to: str = field(default="none", metadata={"help": "tensorboard, trackio, wandb, ... or none."})
    seed: int = field(default=42, metadata={"help": "Of everything random."})
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the model at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "The repository; else named as output_dir."})
    hub_token: str | None = field(default=None, metadata={"help": "Access token with the right to write."})


RECIPE = scripts.recipes.OWN_LOOP


def endless(loader: DataLoader, accelerator: Accelerator, done: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches from epoch to epoch, each shuffled in its own order, without the first `done` ones."""
    epoch, skipped = divmod(done, len(loader))
    while True:
        loader.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from accelerator.skip_first_batches(loader, skipped) if skipped else loader
        epoch, skipped = epoch + 1, 0


@torch.no_grad()
def evaluate(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> float:
    """The mean loss per block; blocks have the same number of tokens."""
    model.eval()
    losses = []
    for batch in loader:
        loss = model(**batch).loss.repeat(len(batch["input_ids"]))
        losses.append(accelerator.gather_for_metrics(loss))
    model.train()
    return torch.cat(losses).mean().item()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, run_clm.TextArguments, LoopArguments)
    model_args, text_args, args = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    output = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True
        ),  # else a restart has the first epoch again
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
    )
    set_seed(args.seed)
    with accelerator.main_process_first():
        model, tokenizer, blocks = run_clm.prepare(model_args, text_args)
    steps = scripts.steps_to_draw(model_args, model)
    trained_with(model, steps)
    accelerator.print(f"{model.num_parameters():,} parameters, {len(blocks['train']):,} blocks")

    train = DataLoader(
        blocks["train"],
        batch_size=args.per_device_train_batch_size,
        shuffle=True,
        collate_fn=default_data_collator,
        generator=torch.Generator().manual_seed(args.seed),
        drop_last=len(blocks["train"]) >= args.per_device_train_batch_size,
    )
    validation = DataLoader(
        blocks["validation"], batch_size=args.per_device_eval_batch_size, collate_fn=default_data_collator
    )
    optimizer = run_clm.optimizer(model, text_args, args.learning_rate, args.weight_decay)
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, args.max_train_steps)
    model, optimizer, train, validation = accelerator.prepare(model, optimizer, train, validation)
    accelerator.register_for_checkpointing(scheduler)
    if accelerator.log_with:
        accelerator.init_trackers("clm", {name: value for name, value in vars(args).items() if name != "hub_token"})

    step, checkpoint = 0, args.resume_from_checkpoint
    if checkpoint and checkpoint.lower() == "true":
        checkpoint = last_complete_checkpoint(output, "step_")
    if checkpoint:
        check_complete(checkpoint)
        accelerator.load_state(checkpoint)
        step = int(Path(checkpoint).name.removeprefix("step_"))
        accelerator.print(f"Going on from step {step}")

    bar = tqdm(initial=step, total=args.max_train_steps, disable=not accelerator.is_main_process)
    sigterm = Sigterm()
    model.train()
    # An update at the end of an epoch is of what is left, so that an epoch has so many:
    epochs, updates = divmod(step, -(-len(train) // args.gradient_accumulation_steps))
    done = epochs * len(train) + updates * args.gradient_accumulation_steps
    for batch in endless(train, accelerator, done):
        if step >= args.max_train_steps:
            break
        drawn = None
        if steps is not None:  # the same number on every process, and after a restart
            drawn = draw_steps(step, *steps, args.seed)
        with accelerator.accumulate(model):
            loss = model(**batch, num_feedback_steps=drawn).loss
            if not torch.isfinite(loss):
                where = first_non_finite(accelerator.unwrap_model(model), {**batch, "num_feedback_steps": drawn})
                raise FloatingPointError(f"The loss is {loss.item()} at step {step}; it began in {where}.")
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        scheduler.step()
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        accelerator.log({"train_loss": loss.item()}, step=step)
        stopped = sigterm.received()
        if step % args.checkpointing_steps == 0 or stopped:
            with saving(output / f"step_{step}"):
                accelerator.save_state(str(output / f"step_{step}"))
        if stopped:
            raise SystemExit(0)
    sigterm.close()
    bar.close()

    loss = evaluate(model, validation, accelerator)
    metrics = {"eval_loss": loss, "perplexity": math.exp(loss)}
    accelerator.print(metrics)
    for number in range(1, 2 * (own_steps(model) or 0) + 1):
        with with_steps(model, number):
            metrics[f"perplexity_step_{number}"] = math.exp(evaluate(model, validation, accelerator))
        accelerator.print(f"perplexity with {number} passes: {metrics[f'perplexity_step_{number}']:.4f}")
    accelerator.log(metrics, step=step)
    trained = scripts.whole(accelerator, model)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / "all_results.json").write_text(json.dumps(metrics, indent=2) + "\n")
        scripts.publish_model(
            trained,
            args.output_dir,
            tokenizer,
            metrics,
            (args.hub_model_id or output.name) if args.push_to_hub else None,
            args.hub_token,
            name="Feedback language model",
            dataset=text_args.source,
            description=f"Trained on {text_args.source} with Accelerate.",
            command=scripts.command(__file__, arguments),
        )
    accelerator.end_training()
    return metrics


if __name__ == "__main__":
    main()
