"""Train, evaluate and report the tasks; the results are lines of JSON.

A run is one model on one seed, in one process on one thread. Shapes: B batch, T positions, L labels.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

import feedback_transformers
from feedback_transformers.models.feedback_presets import RENAMED
from feedback_transformers.training import AverageWeights, CarryState, MuonAdamW

from .models import Settings, build

RESULTS = Path(__file__).parents[1] / "results" / "tasks"
SEEDS = (0, 1, 2)
TEST_SEED = 10_000  # of the test data, the same for all models and seeds
IGNORED = -100  # the label of a position where nothing is asked
TRAINING: Settings = {
    "steps": 2000,
    "batch": 64,
    "optimizer": "adamw",  # or muon, for the matrices inside
    "lr": 1e-3,  # of AdamW; that of Muon is muon_lr
    "betas": (0.9, 0.999),
    "weight_decay": 0.01,
    "warmup": 0.05,  # as a share of the steps
    "clip": 1.0,
    "sampled": None,  # (fewest, most) feedback steps, drawn anew at every training step
    "growth": 0.3,  # share of training over which the answers of a row grow from 1 to that number
    "answers": None,  # with a number, deep supervision: a training step makes one answer and goes on from the last
    "average": None,  # decay of an average of the weights, which is evaluated
    "easy": 0.1,  # a batch with a smaller loss raises the level of difficulty by the stride,
    "hard": 0.5,  # and one with a larger loss lowers it;
    "stride": 0.02,
    "forced": (0.4, 0.7),  # between these shares of the steps it rises to 1 in any case
}

Curve = dict[str, float]


class Batch(NamedTuple):
    inputs: Tensor  # [B, T]
    labels: Tensor  # [B, T], IGNORED where nothing is asked


class Score(NamedTuple):
    metrics: dict[str, float]
    curve: Curve  # what the plot shows: the task's `x_label` -> its `y_label`


class Runs:
    """Hold the finished runs of a task, by model."""

    def __init__(self, lines: list[dict[str, Any]]) -> None:
        self.lines = sorted(lines, key=lambda line: line["seed"])

    def of(self, model: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["model"] == model]

    def values(self, model: str, metric: str) -> list[float]:
        """Return the metric by seed, of the runs that have it."""
        return [line["metrics"][metric] for line in self.of(model) if metric in line["metrics"]]

    def reached(self, model: str, metric: str, least: float, seeds: int = len(SEEDS)) -> bool:
        """Return whether that many seeds have run, and each reached the target."""
        values = self.values(model, metric)
        return len(values) >= seeds and min(values) >= least

    def mean(self, model: str, metric: str) -> float:
        values = self.values(model, metric)
        return mean(values) if values else math.nan  # every comparison with it is false


@dataclass(frozen=True)
class Task:
    """Describe a task: its data, its score, the models that are compared on it, and their targets."""

    name: str
    title: str
    num_tokens: int
    num_labels: int
    num_positions: int
    train: Callable[[torch.Generator, int, float], Batch]  # takes batch size and level of difficulty, from 0 to 1
    evaluate: Callable[[nn.Module, Settings], Score]
    models: dict[str, Settings]  # name -> kind, fields of its config, training, evaluation
    checks: Callable[[Runs], dict[str, bool]]  # the targets
    training: Settings = field(default_factory=dict)  # where training differs from TRAINING
    evaluation: Settings = field(default_factory=dict)  # the arguments of `evaluate`
    smoke: Settings = field(default_factory=dict)  # those of a run of seconds, to see that everything works
    columns: tuple[str, ...] = ()  # metrics of the table
    published: dict[str, tuple[float | str, ...]] = field(default_factory=dict)  # results of others, by column
    x_label: str = "length"
    y_label: str = "accuracy"

    def settings(self, model: str, steps: int | None = None, smoke: bool = False) -> Settings:
        """Return everything that a run depends on beside the code and the seed."""
        own = self.models[model]
        training = {**TRAINING, **self.training, **own.get("training", {})}
        if steps is not None:
            training["steps"] = steps
        evaluation = {**self.evaluation, **own.get("evaluation", {}), **(self.smoke if smoke else {})}
        return {"kind": own["kind"], "fields": own["fields"], "training": training, "evaluation": evaluation}

    def build(self, model: str) -> nn.Module:
        own = self.models[model]
        return build(own["kind"], own["fields"], self.num_tokens, self.num_labels, self.num_positions)

    def run(self, model: str, seed: int, steps: int | None = None, smoke: bool = False) -> dict[str, Any]:
        """Train and evaluate one model; return its line of the results."""
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        network, settings, start = self.build(model), self.settings(model, steps, smoke), time.time()
        cpu = time.process_time()
        self.fit(network, settings["training"], seed, f"{self.name}, {model}, seed {seed}")
        trained, cpu = time.time(), time.process_time() - cpu
        with torch.no_grad():
            score = self.evaluate(network.eval(), settings["evaluation"])
        return {
            "task": self.name,
            "model": model,
            "seed": seed,
            "parameters": sum(p.numel() for p in network.parameters()),
            "metrics": score.metrics,
            "curve": score.curve,
            "seconds": round(time.time() - start),
            "seconds_of_training": round(trained - start),
            "cpu_seconds_of_training": round(cpu),
            "load": os.getloadavg()[0],
            "threads": 1,
            "machine": platform.machine(),
            "versions": {p.__name__: p.__version__ for p in (torch, transformers, feedback_transformers)},
            "settings": settings,
            "command": f"python -m benchmarks.tasks --task {self.name} --models {model} --seeds {seed}"
            + ("" if steps is None else f" --steps {steps}"),
        }

    def fit(self, network: nn.Module, training: Settings, seed: int, title: str) -> None:
        network.train()
        generator = torch.Generator().manual_seed(1000 + seed)
        optimizer, total = make_optimizer(network, training), training["steps"]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total, training["warmup"]))
        carry, average = None, None
        if training["answers"]:
            carry = CarryState(training["answers"])
            carry.attach(network)
        if training["average"]:
            average = AverageWeights(training["average"])
            average.attach(network)
        progress, level = tqdm(range(total), desc=title, mininterval=10), 0.0
        for step in progress:
            start, end = training["forced"]
            level = max(level, min(1.0, (step / total - start) / (end - start)))
            if carry is not None:  # one answer of each puzzle at first: few rows for long are learned by heart
                grown = min(1.0, step / (training["growth"] * total))
                carry.max_answers = 1 + round(grown * (training["answers"] - 1))
            inputs, labels = self.train(generator, training["batch"], level)
            sampled = training["sampled"]
            steps = {"num_feedback_steps": draw_length(generator, *sampled)} if sampled else {}
            loss = network(input_ids=inputs, labels=labels, **steps).loss
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), training["clip"], error_if_nonfinite=True)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if average is not None:
                average.update()
            level += training["stride"] * ((loss.item() < training["easy"]) - (loss.item() > training["hard"]))
            level = min(1.0, max(0.0, level))
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.4f}", level=f"{level:.2f}", refresh=False)
        if carry is not None:
            carry.release()
        if average is not None:
            average.swap_in()

    # Results

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.jsonl"

    def finished(self) -> Runs:
        """Return the runs with the present settings; those with others, and of fewer steps, do not count."""
        lines = [*map(json.loads, self.file.read_text().splitlines() if self.file.exists() else [])]
        for line in lines:  # of before there were these, and with names of before
            settings = line["settings"]
            settings["training"] = {"growth": 0.3, "answers": None, "average": None, **settings["training"]}
            if (preset := settings["fields"].get("preset")) in RENAMED:
                settings["fields"]["preset"] = RENAMED[preset]
        now = {model: json.loads(json.dumps(self.settings(model))) for model in self.models}
        return Runs([line for line in lines if line["settings"] == now.get(line["model"])])

    def run_missing(self, models: list[str], seeds: list[int], steps: int | None = None) -> None:
        """Make the missing runs. Each is appended when it has finished, so an interrupted table can go on."""
        for seed in seeds:
            for model in models:
                if all(line["seed"] != seed for line in self.finished().of(model)):
                    line = self.run(model, seed, steps)
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                    with self.file.open("a") as file:
                        file.write(json.dumps(line) + "\n")

    def report(self) -> bool:
        """Print the table and the targets; return whether all were reached."""
        runs = self.finished()
        print(f"\n### {self.title}\n\n| model | parameters | {' | '.join(self.columns)} | seconds |")
        print("|---|---|" + "---|" * len(self.columns) + "---|")
        for model in self.models:
            lines = runs.of(model)
            if lines:
                cells = [by_seed(runs.values(model, column)) for column in self.columns]
                seconds = ", ".join(str(line["seconds"]) for line in lines)
                print(f"| {model} | {lines[0]['parameters']:,} | {' | '.join(cells)} | {seconds} |")
        for source, row in self.published.items():
            print(f"| *{source}* | | {' | '.join(str(value) for value in row)} | |")
        print()
        checks = self.checks(runs)
        for sentence, reached in checks.items():
            print(f"- {'pass' if reached else 'FAIL'}  {sentence}")
        return all(checks.values())

    def plot(self) -> None:
        """Draw a line for each seed, in a colour for each model."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes, runs = figure.add_subplot(), self.finished()
        for i, model in enumerate(self.models):
            for k, line in enumerate(runs.of(model)):
                x = [float(at) for at in line["curve"]]
                label = model if k == 0 else None
                axes.plot(x, list(line["curve"].values()), marker=".", color=f"C{i}", alpha=0.7, label=label)
        axes.set(xlabel=self.x_label, ylabel=self.y_label, title=self.title.partition(":")[0])
        if runs.lines:
            axes.legend(fontsize="small")
            figure.savefig(self.file.with_suffix(".png"), dpi=120)


def make_optimizer(network: nn.Module, training: Settings) -> torch.optim.Optimizer:
    rest = {"weight_decay": training["weight_decay"], "betas": tuple(training["betas"])}
    if training["optimizer"] == "muon":
        return MuonAdamW(network, lr=training["lr"], muon_lr=training["muon_lr"], **rest)
    return torch.optim.AdamW(network.parameters(), lr=training["lr"], **rest)


def rate(step: int, total: int, warmup: float) -> float:
    """Return the learning rate's share: a linear warm-up, then a cosine to zero."""
    first = max(1, int(warmup * total))
    if step < first:
        return (step + 1) / first
    return 0.5 + 0.5 * math.cos(math.pi * (step - first) / max(1, total - first))


def by_seed(values: list[float]) -> str:
    if not values:
        return ""
    return f"**{mean(values):.3f}** ({', '.join(f'{value:.3f}' for value in values)})"


# Sequences of different lengths. All of a batch have one length, as in Delétang et al. 2022 (arXiv:2207.02098), so
# that nothing is padded.


def draw_length(generator: torch.Generator, least: int, most: int) -> int:
    """Draw a length uniformly, both ends included."""
    return int(torch.randint(least, most + 1, (), generator=generator))


def growing(level: float, least: int, most: int) -> int:
    """Return the longest length at this level of difficulty."""
    return round(least + (most - least) * level)


def test_batches(
    generate: Callable[[torch.Generator, int, int], Batch], settings: Settings
) -> Iterator[tuple[int, Batch]]:
    """Yield settings["sequences"] of each of settings["lengths"], the same ones at every call."""
    for length in settings["lengths"]:
        yield length, generate(torch.Generator().manual_seed(TEST_SEED + length), settings["sequences"], length)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the accuracy at the positions where something is asked."""
    asked = labels != IGNORED
    return (logits.argmax(-1) == labels)[asked].float().mean().item()


def scaled(value: float, chance: float) -> float:
    """Scale an accuracy to 0 at chance and 1 where all is right."""
    return (value - chance) / (1 - chance)
