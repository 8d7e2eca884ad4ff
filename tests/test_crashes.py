"""kill -9, SIGTERM, a full disk and NaN, in the middle of a training: what is left, and how it goes on."""

import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import crash_training
import pytest
import torch
from crash_training import BLOCKS, SAVE_STEPS, STEPS, make_model, make_trainer
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from feedback_transformers.training import (
    check_complete,
    checkpoints,
    first_non_finite,
    last_complete_checkpoint,
    train_safely,
)

FORKS = multiprocessing.get_context("forkserver")  # a process that has imported everything, and forks in no time
FORKS.set_forkserver_preload(["crash_training"])


@pytest.fixture(scope="module", autouse=True)
def forkserver() -> None:
    path = str(Path(__file__).parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path, prepend=os.pathsep)
        start(time.sleep, 0).join()


def start(function: Callable, *args, **kwargs) -> multiprocessing.Process:
    process = FORKS.Process(target=function, args=args, kwargs=kwargs)
    process.start()
    return process


def finish(function: Callable, *args, **kwargs) -> int:
    process = start(function, *args, **kwargs)
    process.join()
    return process.exitcode


TRAININGS = {"trainer": (crash_training.train, "checkpoint-"), "loop": (crash_training.train_in_a_loop, "step_")}
each_training = pytest.mark.parametrize("kind", list(TRAININGS))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """The uninterrupted runs; that of Trainer keeps all checkpoints."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in TRAININGS}
    assert finish(crash_training.train, folders["trainer"], save_total_limit=None) == 0
    assert finish(crash_training.train_in_a_loop, folders["loop"]) == 0
    return folders


def tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def contents(checkpoint: Path | str) -> list[Tensor]:
    """Weights, then the state of the optimizer."""
    optimizer = next(Path(checkpoint).glob("optimizer.*"))
    return [*load_file(Path(checkpoint, "model.safetensors")).values(), *tensors(torch.load(optimizer))]


def assert_same(checkpoint: Path | str, expected: Path | str) -> None:
    """To the bit."""
    actual, wanted = contents(checkpoint), contents(expected)
    assert len(actual) == len(wanted) > 40
    assert all(torch.equal(one, other) for one, other in zip(actual, wanted, strict=True))


# kill -9


def kill(process: multiprocessing.Process, folder: Path, prefix: str, chance: random.Random) -> None:
    """At a random moment: while it starts, while it trains, or while it saves, which is most often."""
    kind = chance.choice(["start", "train", "save", "save", "save"])
    before = set(folder.glob(f"{prefix}*"))
    while kind != "start" and process.is_alive() and before.issuperset(folder.glob(f"{prefix}*")):
        time.sleep(0.0005)
    time.sleep(10 ** chance.uniform(-3, -1) if kind == "save" else chance.uniform(0, 0.15))
    process.kill()
    process.join()


def kill_and_resume(kind: str, whole: Path, folder: Path, kills: int, steps: int) -> int:
    """How many kills left an unfinished checkpoint as the last one."""
    function, prefix = TRAININGS[kind]
    chance, unfinished = random.Random(0), 0
    for _ in range(kills):
        process = start(function, folder, max_steps=steps)
        kill(process, folder, prefix, chance)
        assert process.exitcode == -9, "it was still running"
        last = last_complete_checkpoint(folder, prefix)
        if last is not None:
            assert_same(last, whole / Path(last).name)
        begun = [int(path.name.removeprefix(prefix)) for path in folder.glob(f"{prefix}*")]
        unfinished += bool(begun) and last != str(folder / f"{prefix}{max(begun)}")
    assert finish(function, folder, max_steps=steps) == 0
    assert_same(folder / f"{prefix}{steps}", whole / f"{prefix}{steps}")
    return unfinished


@each_training
def test_killed_at_random_moments(kind, whole, tmp_path):
    """The final weights and the state of the optimizer are those of the uninterrupted run, to the bit."""
    kill_and_resume(kind, whole[kind], tmp_path / "new", 3, STEPS)


@pytest.mark.slow
@each_training
def test_killed_at_20_random_moments(kind, tmp_path):
    function, _ = TRAININGS[kind]
    whole, more = tmp_path / "whole", {"save_total_limit": None} if kind == "trainer" else {}
    assert finish(function, whole, max_steps=120, **more) == 0
    unfinished = kill_and_resume(kind, whole, tmp_path / "new", 20, 120)
    print(f"\n{kind}: 20 kills, after {unfinished} of which the newest checkpoint was unfinished")
    assert unfinished >= 3, "the kills were aimed at the saving"


def kill_at_operations(whole: Path, folder: Path, operations: range) -> tuple[int, int]:
    """With one checkpoint kept: how often the process was killed, and how often this left an unfinished checkpoint."""
    kills, unfinished = 0, 0
    for operation in operations:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole / "checkpoint-2", folder / "checkpoint-2")
        code = finish(crash_training.die_at, operation, folder, max_steps=4, save_total_limit=1)
        last = last_complete_checkpoint(folder)
        assert last is not None
        assert_same(last, whole / Path(last).name)
        if code == 0:
            assert last == str(folder / "checkpoint-4") and [*folder.glob("checkpoint-*")] == [Path(last)]
            break
        assert code == -9
        kills += 1
        unfinished += get_last_checkpoint(str(folder)) != last
    return kills, unfinished


def test_killed_within_a_save(whole, tmp_path):
    """Before some of the operations on files of which a save, and the removal of the checkpoint before, consist."""
    kills, unfinished = kill_at_operations(whole["trainer"], tmp_path / "new", range(0, 1000, 20))
    assert kills > unfinished > 0


@pytest.mark.slow
def test_killed_at_every_operation_of_a_save(whole, tmp_path):
    kills, unfinished = kill_at_operations(whole["trainer"], tmp_path / "new", range(1000))
    print(f"\n{kills} operations on files, {unfinished} of them before the checkpoint was complete")
    assert kills > unfinished > 0


def test_what_counts_as_complete(whole, tmp_path):
    shutil.copytree(whole["trainer"] / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(whole["trainer"] / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    last = tmp_path / "checkpoint-4"
    assert last_complete_checkpoint(tmp_path) == str(last)
    weights = (last / "model.safetensors").read_bytes()
    for damaged in (weights[:-1], weights[:-1] + bytes([weights[-1] ^ 1])):  # too short; another bit
        (last / "model.safetensors").write_bytes(damaged)
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
        with pytest.raises(ValueError, match="checkpoint-4 is damaged"):  # named, it is not taken either
            check_complete(last)
    (last / "model.safetensors").write_bytes(weights)
    check_complete(last)
    check_complete(tmp_path / "checkpoint-best")  # whatever wrote it, it was not this package
    (last / "notes.txt").write_text("whatever is added later does no harm")
    assert last_complete_checkpoint(tmp_path) == str(last)
    (last / "optimizer.pt").unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert last_complete_checkpoint(tmp_path / "nowhere") is None


def test_as_many_checkpoints_are_kept_as_asked(tmp_path):
    """The best one among them."""
    fields = {"save_total_limit": 2, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}

    class FirstIsBest(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    trainer = make_trainer(tmp_path, callbacks=(FirstIsBest(),), max_steps=4 * SAVE_STEPS, **fields)
    train_safely(trainer)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-8"]
    assert trainer.args.save_total_limit == 2


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 3.5 * 4 / len(BLOCKS)}])
def test_a_finished_run_is_not_trained_on(length, tmp_path):
    """Its rate is constant, so that another step would change the weights."""
    first = make_trainer(tmp_path, **length)
    train_safely(first)
    again = make_trainer(tmp_path, **length)
    output = train_safely(again, resume=True)
    assert output.global_step == again.state.global_step == 4
    assert output.training_loss == first.state.log_history[-2]["loss"]
    assert all(map(torch.equal, again.model.parameters(), first.model.parameters()))
    assert not list(tmp_path.glob("checkpoint-5"))


# SIGTERM


@each_training
def test_sigterm(kind, whole, tmp_path):
    """Saves and exits with 0, and what follows is as if nothing had been."""
    function, prefix = TRAININGS[kind]
    process = start(function, tmp_path)
    while not (tmp_path / f"{prefix}6").exists():
        time.sleep(0.001)
    process.terminate()
    process.join()
    assert process.exitcode == 0
    saved = last_complete_checkpoint(tmp_path, prefix)
    assert 6 <= int(Path(saved).name.removeprefix(prefix)) < STEPS
    assert finish(function, tmp_path) == 0
    assert_same(tmp_path / f"{prefix}{STEPS}", whole[kind] / f"{prefix}{STEPS}")


def test_sigterm_works_again_after_training(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train_safely(make_trainer(tmp_path, max_steps=1, save_strategy="no"))
    assert signal.getsignal(signal.SIGTERM) is before


# A full disk


def fill(kind: str, whole: Path, folder: Path, limit: int | None) -> None:
    """Trains until the disk is full, or so it seems by a limit on the size of files; then looks at what is left."""
    function, prefix = TRAININGS[kind]
    report = whole.parent / f"{folder.parent.name}.txt"
    assert finish(crash_training.fill_the_disk, folder, report, limit, kind) == 0
    (message,) = report.read_text().splitlines()
    last = last_complete_checkpoint(folder, prefix)
    assert_same(last, whole / Path(last).name)
    unfinished = folder / f"{prefix}{int(Path(last).name.removeprefix(prefix)) + SAVE_STEPS}"
    assert not unfinished.exists(), "what was begun is removed"
    assert f"The disk is full, and {unfinished} was not saved: free some space" in message
    assert message.endswith(f"go on from {last}")


@each_training
@pytest.mark.parametrize("limit", [300, 16_000, 40_000], ids=["config", "weights", "optimizer"])
def test_full_disk(kind, limit, whole, tmp_path):
    """A clear error, whatever file can't be written, and the last checkpoint as it was."""
    fill(kind, whole[kind], tmp_path / "run", limit)


@pytest.mark.parametrize("limit", [0, 500, 5_000, 70_000, 400_000, 428_000])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_says_in_many_ways_that_a_disk_is_full(limit, zipped, tmp_path):
    """Where the file ends decides which of its errors PyTorch raises."""
    state, before = [torch.ones(n) for n in (10, 100_000, 7_000, 3)], resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises((RuntimeError, OSError)) as raised:
            torch.save(state, tmp_path / "optimizer.pt", _use_new_zipfile_serialization=zipped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints._is_full(raised.value), str(raised.value)
    assert not checkpoints._is_full(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder on a disk of 1 MB, where it may be mounted."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path / "disk"]).returncode == 0
    yield tmp_path / "disk"
    if mounted:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


@pytest.mark.slow
@each_training
def test_full_tmpfs(kind, whole, small_disk):
    """A disk that really is full; and the run goes on when there is room again."""
    mounted = os.path.ismount(small_disk)
    print(f"\n{'a tmpfs of 1 MB' if mounted else 'mounting is not permitted: a limit on the size of files'}")
    fill(kind, whole[kind], small_disk / "run", None if mounted else 40_000)
    if mounted:
        subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    function, prefix = TRAININGS[kind]
    assert finish(function, small_disk / "run") == 0
    assert_same(small_disk / "run" / f"{prefix}{STEPS}", whole[kind] / f"{prefix}{STEPS}")


# NaN


class BreakRow(TrainerCallback):
    """A row of the data for which a layer gives NaN, at the given call, in the forward or the backward pass."""

    def __init__(self, row: int, layer: str, call: int = 1, backward: bool = False) -> None:
        self.row, self.layer, self.call, self.backward = torch.tensor(BLOCKS[row]["input_ids"]), layer, call, backward
        self.present, self.calls, self.handles = False, 0, []

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        self.handles = [
            model.register_forward_pre_hook(self.look, with_kwargs=True),
            model.get_submodule(self.layer).register_forward_hook(self.spoil),
        ]

    def look(self, model, args, inputs) -> None:
        self.present, self.calls = (inputs["input_ids"] == self.row).all(-1).any().item(), 0

    def spoil(self, layer, args, output):
        self.calls += 1
        if self.present and self.calls == self.call:
            if not self.backward:
                return output * math.nan
            output.register_hook(lambda gradient: gradient * math.nan)
        return output


@pytest.mark.parametrize(
    ("axis", "layer", "call"),
    [
        ("depth", "model.encoder.layers.0.mlp.down_proj", 1),
        ("depth", "model.loop.cell.layers.0.self_attn.v_proj", 2),
        ("jacobi", "model.loop.cell.layers.0.mlp.gate_proj", 2),
        ("time", "model.loop.connection.signal_proj", 7),
        ("time", "model.norm", 1),
    ],
)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_nan_names_step_layer_and_batch(axis, layer, call, backward, tmp_path):
    breaking = BreakRow(40, layer, call, backward)
    trainer = make_trainer(tmp_path, axis, (breaking,), max_steps=19, gradient_accumulation_steps=2, save_steps=1)
    with pytest.raises(FloatingPointError) as raised:
        train_safely(trainer)
    step, message = trainer.state.global_step, str(raised.value)
    kept = torch.load(tmp_path / "non_finite_batch_0.pt")
    assert kept["step"] == step and (kept["inputs"]["input_ids"] == breaking.row).all(-1).any()
    assert f"at step {step}; the last good checkpoint is {tmp_path / f'checkpoint-{step}'}." in message
    where = f"the gradient at the output of {layer}" if backward else f"the output of {layer}"
    assert f"It began in {where} (call {call})" in message
    number, rows = re.search(r"with batch (\d+) of epoch 0 \(rows ([\d, ]+) of the data\)", message).groups()
    assert int(number) // 2 == step and "40" in rows.split(", ")
    given = [BLOCKS[int(row)]["input_ids"] for row in rows.split(", ")]
    assert kept["inputs"]["input_ids"].tolist() == given


def test_nan_in_a_stream(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=(BreakRow(18, "model.norm"),))
    trainer.train_dataset = BLOCKS.to_iterable_dataset()
    with pytest.raises(FloatingPointError, match="at step 4; .* with batch 4 of the stream, which is kept in"):
        train_safely(trainer)


def test_nan_and_on(tmp_path):
    """The last good checkpoint is that of an undisturbed run, and so is what comes of it."""
    layer = "model.loop.cell.layers.0.mlp.up_proj"
    make = partial(make_trainer, max_steps=19, save_steps=2, save_total_limit=None)
    train_safely(make(tmp_path / "whole"))
    breaking = BreakRow(40, layer)
    with pytest.raises(FloatingPointError):
        train_safely(make(tmp_path / "again", callbacks=(breaking,)))
    last = last_complete_checkpoint(tmp_path / "again")
    assert_same(last, tmp_path / "whole" / Path(last).name)
    train_safely(make(tmp_path / "again"), resume=True)
    assert_same(tmp_path / "again" / "checkpoint-19", tmp_path / "whole" / "checkpoint-19")


def test_nan_of_the_loss_and_of_a_weight(tmp_path):
    class Ignore(TrainerCallback):
        """A batch without a label: the mean of nothing."""

        def on_step_begin(self, args, state, control, model, **kwargs):
            model.register_forward_pre_hook(self.ignore, with_kwargs=True)

        def ignore(self, model, args, inputs):
            return args, {**inputs, "labels": torch.full_like(inputs["labels"], -100), "num_items_in_batch": None}

    with pytest.raises(FloatingPointError, match="The loss is nan at step 0.* It began in the loss, with batch 0"):
        train_safely(make_trainer(tmp_path, callbacks=(Ignore(),)))

    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                model.model.norm.weight.data[0] = math.inf

    with pytest.raises(
        FloatingPointError, match=r"weight model.norm.weight is not finite at step 4; .*checkpoint-2\."
    ):
        train_safely(make_trainer(tmp_path, callbacks=(Overflow(),)))
    assert not (tmp_path / "checkpoint-4").exists(), "such weights are not saved"


def test_nan_without_trainer():
    model = make_model("depth").train()
    batch = {name: torch.tensor(BLOCKS[:4][name]) for name in ("input_ids", "labels")}
    assert first_non_finite(model, batch) is None
    model.lm_head.weight.data[0, 0] = math.nan
    assert first_non_finite(model, batch) == "the output of lm_head (call 1), whose weight is not finite"
