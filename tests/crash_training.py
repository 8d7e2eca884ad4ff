"""The trainings that test_crashes.py ends in the middle; each function is run in a process of its own."""

import gc
import os
import resource
import signal
import sys
from itertools import count
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from feedback_transformers import FeedbackConfig, FeedbackForCausalLM, data
from feedback_transformers.training import (
    MuonAdamW,
    SampleFeedbackSteps,
    Sigterm,
    StopOnNonFinite,
    draw_steps,
    last_complete_checkpoint,
    saving,
    train_safely,
)

STEPS, SAVE_STEPS = 30, 2
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 32}
LAYERS = {"num_encoder_layers": 1, "num_feedback_layers": 1, "num_decoder_layers": 1}
AXES = {
    "depth": {"feedback_axis": "depth"},
    "jacobi": {"feedback_axis": "time", "solver": "jacobi", "solver_steps": 3},
    "time": {"feedback_axis": "time"},
}

torch.set_num_threads(1)
PLAYS = data.load("shakespeare")["validation"].select(range(1))
TOKENIZER = data.characters(PLAYS["text"])
BLOCKS = data.blocks(PLAYS, TOKENIZER, block_size=16).select(range(75))  # an epoch is 19 batches
gc.freeze()  # what all processes share is not looked through in each


def make_model(axis: str) -> FeedbackForCausalLM:
    torch.manual_seed(0)
    return FeedbackForCausalLM(FeedbackConfig(vocab_size=len(TOKENIZER), dropout=0.1, **SIZES, **LAYERS, **AXES[axis]))


def make_trainer(folder: Path, axis: str = "depth", callbacks: tuple = (), **fields) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",  # the same for a run that is meant to be shorter
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **fields})
    sampled = [] if axis == "time" else [SampleFeedbackSteps(1, 4)]
    callbacks = [*sampled, StopOnNonFinite(), *callbacks]
    few = BLOCKS.select(range(4))
    return Trainer(make_model(axis), arguments, train_dataset=BLOCKS, eval_dataset=few, callbacks=callbacks)


def train(folder: Path, **fields) -> None:
    train_safely(make_trainer(folder, **fields), resume=True)


def train_in_a_loop(folder: Path, limit: int | None = None, max_steps: int = STEPS) -> None:
    """The same with Accelerate alone; `limit`, in bytes, of every file after the first checkpoint."""
    set_seed(0)
    loading = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, dataloader_config=loading)
    model = make_model("depth")
    optimizer = MuonAdamW(model)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(BLOCKS, 4, shuffle=True, collate_fn=default_data_collator, generator=generator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    checkpoint, step = last_complete_checkpoint(folder, "step_"), 0
    if checkpoint:
        accelerator.load_state(checkpoint)
        step = int(Path(checkpoint).name.removeprefix("step_"))
    sigterm = Sigterm()
    model.train()
    while step < max_steps:
        epoch, skipped = divmod(step, len(loader))
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, skipped) if skipped else loader:
            loss = model(**batch, num_feedback_steps=draw_steps(step, 1, 4)).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % SAVE_STEPS == 0 or sigterm.received():
                with saving(folder / f"step_{step}"):
                    accelerator.save_state(str(folder / f"step_{step}"))
                limit_files(limit)
            if sigterm.received():
                raise SystemExit(0)
            if step == max_steps:
                break


def limit_files(size: int | None) -> None:
    """Writing beyond it fails, as on a full disk."""
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class LimitFiles(TrainerCallback):
    """After the first checkpoint."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == SAVE_STEPS:
            limit_files(self.size)


def fill_the_disk(folder: Path, report: Path, limit: int | None, kind: str) -> None:
    """Writes the error that ends the training to `report`."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # what is printed may go to a file, and would be limited as well
    os.dup2(nothing, 2)
    try:
        if kind == "loop":
            train_in_a_loop(folder, limit)
        else:
            train(folder, callbacks=() if limit is None else (LimitFiles(limit),), save_total_limit=None)
    except OSError as error:
        report.write_text(str(error))


def die_at(operation: int, folder: Path, **fields) -> None:
    """SIGKILL before the given one of all operations on files in checkpoints: opening, renaming, removing."""
    operations = count()

    def watch(event: str, args: tuple) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        path, mode = str(args[0]), args[1] if event == "open" else "w"
        inside = "checkpoint-" in path or event in ("os.remove", "os.rmdir")  # these by the open folder they are in
        if inside and isinstance(mode, str) and mode[0] in "wxa" and next(operations) == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = make_trainer(folder, **fields)
    sys.addaudithook(watch)
    train_safely(trainer, resume=True)
