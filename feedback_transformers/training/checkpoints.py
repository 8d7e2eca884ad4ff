"""Training that can be killed at any moment: checkpoints that are known to be complete, SIGTERM, a full disk.

Trainer and Accelerate write a checkpoint file by file, so that whatever ends the process in between leaves a folder
that looks like a checkpoint. Here one counts only with a manifest of its files, which is written last.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import threading
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

MANIFEST = "complete.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, a quota, a limit on the size of a file
FULL_MESSAGES = (
    *("PytorchStreamWriter failed writing", "unexpected pos", "iostream error"),  # torch, by how much was written
    *(os.strerror(number) for number in FULL),  # torch's older format, tensorboard
    *(f"os error {number}" for number in FULL),  # safetensors
)


def last_complete_checkpoint(folder: str | Path, prefix: str = "checkpoint-") -> str | None:
    """Return the folder of the latest step that is complete: all files of its manifest are there, and what they were.

    Checkpoints without a manifest, which neither `train_safely` nor `saving` wrote, don't count: name those yourself.
    """
    by_step = reversed(_checkpoints(folder, prefix))
    return next((str(checkpoint) for checkpoint in by_step if _is_complete(checkpoint)), None)


def check_complete(checkpoint: str | Path) -> None:
    """Raise ValueError if files of this folder are not what its manifest says; a folder without one passes."""
    if (Path(checkpoint) / MANIFEST).exists() and not _is_complete(Path(checkpoint)):
        raise ValueError(
            f"{checkpoint} is damaged, its files are not those of its {MANIFEST}: resume from another checkpoint, or "
            "from the last complete one, with resume_from_checkpoint=True."
        )


def train_safely(trainer: Trainer, resume: str | bool | None = None) -> TrainOutput:
    """Call `trainer.train()` so that it can be killed at any moment and resumed with the same final weights.

    Every checkpoint gets a manifest when it is complete, and only then are older ones removed (`save_total_limit`).
    On SIGTERM the step is finished and saved, and the process exits with 0. When a checkpoint can't be written because
    the disk is full, its folder is removed and OSError says what to do.

    Args:
        resume: the folder of a checkpoint; or True for the last complete one, if there is one.

    Raises:
        ValueError: the files of the checkpoint that was named are not those of its manifest.
    """
    args = trainer.args
    folder = str(args.output_dir)
    checkpoint = last_complete_checkpoint(folder) if resume is True else resume or None
    if checkpoint and resume is not True:
        check_complete(checkpoint)
    if checkpoint and (finished := finish(trainer, checkpoint)):
        return finished
    if resume is True and trainer.is_world_process_zero():
        print(f"Going on from {checkpoint}" if checkpoint else f"{folder} holds no complete checkpoint: starting anew")
    limit, args.save_total_limit = args.save_total_limit, None  # Trainer would remove them before the new one counts
    with closing(Sigterm()) as sigterm:
        callback = _CompleteCheckpoints(limit, sigterm)
        trainer.add_callback(callback)
        try:
            return trainer.train(resume_from_checkpoint=checkpoint)
        except Exception as error:
            unfinished = Path(folder, f"checkpoint-{trainer.state.global_step}")
            if not _is_full(error) or not unfinished.exists() or _is_complete(unfinished):
                raise
            raise _full(unfinished, trainer.is_world_process_zero()) from error
        finally:
            for each in trainer.callback_handler.callbacks:  # what ours would leave in the model after an interrupt
                getattr(each, "release", lambda: None)()
            trainer.remove_callback(callback)
            args.save_total_limit = limit


def finish(trainer: Trainer, checkpoint: str) -> TrainOutput | None:
    """Load the weights, or the best ones, where `checkpoint` is of the last step that is asked for.

    Trainer would make another step, so that each start of a finished run would end with other weights. It still does
    where FSDP or DeepSpeed holds the model, which can't be loaded before training.
    """
    saved = Path(checkpoint, TRAINER_STATE_NAME)
    if not saved.is_file() or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return None
    state = TrainerState.load_from_json(str(saved))
    args = trainer.args
    steps = args.max_steps if args.max_steps > 0 else state.max_steps
    longer = args.max_steps <= 0 and args.num_train_epochs > state.num_train_epochs
    if longer or not 0 < steps <= state.global_step:
        return None
    if trainer.is_world_process_zero():
        print(f"{checkpoint} is of the last step: nothing is left to train")
    trainer.state = state
    best = state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best if best and Path(best).is_dir() else checkpoint)
    for callback in trainer.callback_handler.callbacks:  # those that leave other weights at the end
        getattr(callback, "finished", lambda *_: None)(checkpoint, trainer.model)
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return TrainOutput(state.global_step, losses[-1] if losses else math.nan, {})


@contextmanager
def saving(checkpoint: str | Path) -> Iterator[None]:
    """Write a manifest at the end of a block that fills the folder `checkpoint`, on each process of a loop of yours.

    `with saving(folder): accelerator.save_state(folder)`. On a full disk the folder is removed, and OSError says so.
    """
    processes = PartialState()
    try:
        yield
        processes.wait_for_everyone()
        if processes.is_main_process:
            _write_manifest(Path(checkpoint))
    except Exception as error:
        if not _is_full(error):
            raise
        raise _full(Path(checkpoint), processes.is_main_process) from error


class Sigterm:
    """Hold SIGTERM back until `close()`: a loop asks `received()` after each step, saves and stops."""

    def __init__(self) -> None:
        self.came = False
        self.main = threading.current_thread() is threading.main_thread()  # no other one may set a handler
        if self.main:
            self.before = signal.signal(signal.SIGTERM, self.receive)

    def receive(self, *_: Any) -> None:
        self.came = True

    def received(self) -> bool:
        """Return whether SIGTERM came to any process; all processes have to ask together."""
        processes = PartialState()
        if processes.num_processes == 1:
            return self.came
        return bool(reduce(torch.tensor(float(self.came), device=processes.device)) > 0)

    def close(self) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.before)


class _CompleteCheckpoints(TrainerCallback):
    def __init__(self, limit: int | None, sigterm: Sigterm) -> None:
        self.limit, self.sigterm = limit, sigterm

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.sigterm.received():
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            checkpoint = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
            _write_manifest(checkpoint)
            _remove_older(checkpoint, self.limit, state.best_model_checkpoint)
        if self.sigterm.received():  # not before: Trainer saves its control too, and a resumed run would stop again
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_training_stop and self.sigterm.received():  # within an epoch, the end of which this is not
            control.should_evaluate = control.should_save = False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.sigterm.received():
            if state.is_world_process_zero:
                print(f"SIGTERM: saved {Path(str(args.output_dir), f'checkpoint-{state.global_step}')}")
            raise SystemExit(0)


def _checkpoints(folder: str | Path, prefix: str = "checkpoint-") -> list[Path]:
    """Return the checkpoints of a folder, sorted by step."""
    steps = {path: path.name.removeprefix(prefix) for path in Path(folder).glob(f"{prefix}*") if path.is_dir()}
    return sorted((path for path, step in steps.items() if step.isdigit()), key=lambda path: int(steps[path]))


def _is_complete(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())
        return all(_checksum(checkpoint / name) == checksum for name, checksum in files.items())
    except (OSError, ValueError):  # no manifest, or a file of it is missing; not JSON
        return False


def _write_manifest(checkpoint: Path) -> None:
    """Write the files' checksums; all files reach the disk itself before the manifest does, as the power may fail."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))
    checksums = {str(path.relative_to(checkpoint)): _checksum(path, sync=True) for path in files}
    temporary = checkpoint / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(checksums, indent=2) + "\n")
    _checksum(temporary, sync=True)
    temporary.replace(checkpoint / MANIFEST)
    if os.name == "posix":  # names of files are on the disk when their folder is
        for folder in (checkpoint, checkpoint.parent):
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _checksum(path: Path, sync: bool = False) -> int:
    value = 0
    with path.open("rb+" if sync else "rb") as file:
        while chunk := file.read(1 << 20):
            value = zlib.crc32(chunk, value)
        if sync:
            os.fsync(file.fileno())
    return value


def _remove_older(newest: Path, limit: int | None, best: str | None) -> None:
    """Remove all but `limit` checkpoints, as Trainer does: the newest and the best stay; unfinished ones go first."""
    if not limit or limit < 0:
        return
    present = _checkpoints(newest.parent)
    kept = [path for path in present if path in (newest, Path(best or newest))]

    def saved(path: Path) -> float:
        manifest = path / MANIFEST
        return manifest.stat().st_mtime if manifest.exists() else 0.0

    others = sorted((path for path in present if path not in kept), key=saved)
    for path in others[: max(0, len(present) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def _is_full(error: BaseException | None) -> bool:
    """Return whether an error, or what it came from, is a full disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        if any(message in str(error) for message in FULL_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def _full(unfinished: Path, remove: bool) -> OSError:
    if remove:
        shutil.rmtree(unfinished, ignore_errors=True)
    last = last_complete_checkpoint(unfinished.parent, unfinished.name.rstrip("0123456789"))
    return OSError(
        errno.ENOSPC,
        f"The disk is full, and {unfinished} was not saved: free some space, or keep fewer checkpoints, and "
        + (f"go on from {last}" if last else "start again, as no checkpoint was saved before"),
    )
