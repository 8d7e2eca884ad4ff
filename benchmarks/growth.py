"""Measure how the cost of a training step grows with length, passes, width and batch, and print the slope in theory.

python -m benchmarks.growth             # measures, appends to results/growth-<machine>-<date>.jsonl, and draws
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from datetime import date
from typing import Any

import torch

from benchmarks.timing import RESULTS, append, machine, peak_bytes
from feedback_transformers import FeedbackConfig, FeedbackForCausalLM

BASE = {"batch": 2, "length": 128, "passes": 4, "width": 64}
TIME, BARE = {"feedback_axis": "time"}, {"num_encoder_layers": 0, "num_decoder_layers": 0}
MODELS: dict[str, dict[str, Any]] = {
    "depth, transformer": {"feedback_axis": "depth"},
    "time, transformer, jacobi": {**TIME, "solver": "jacobi"},
    "time, transformer, sequential": TIME,
    "time, gru, sequential": {**TIME, "feedback_type": "gru"},
    "time, gru, its own state alone": {**TIME, "feedback_type": "gru", "feedback_signal": "none"},
    "time, diagonal_gru, its own state alone": {**TIME, "feedback_type": "diagonal_gru", "feedback_signal": "none"},
}
SWEEPS = {
    "length": [64, 128, 256, 512, 1024, 2048, 4096, 8192],
    "passes": [1, 2, 4, 8, 16, 32, 64],
    "width": [32, 64, 128, 256, 512],
    "batch": [1, 2, 4, 8, 16, 32],
}
# The exponent by which the work grows once it exceeds the cost of the calls. Attention is quadratic in length.
SLOPES = {"length": {"transformer": 2, "gru": 1}, "passes": 1, "width": 2, "batch": 1}
LONGEST = 512  # of models that go position by position, with a graph for each


def applies(name: str, what: str, value: int) -> bool:
    walks = "sequential" in name
    if what == "passes":
        return "depth" in name or "jacobi" in name
    return what != "length" or not walks or value <= LONGEST


def measure(name: str, batch: int, length: int, passes: int, width: int) -> tuple[float, int]:
    """Return seconds (the median of 3) and peak bytes that torch allocates, of a forward and backward."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": width, "intermediate_size": 2 * width, "max_position_embeddings": 8192}
    steps = {"num_feedback_steps": passes, "solver_steps": passes}
    model = FeedbackForCausalLM(FeedbackConfig(**{**sizes, **steps, **BARE, **MODELS[name]})).train()
    ids = torch.randint(0, 64, (batch, length))

    def step() -> None:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    step()
    peak = peak_bytes(step)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), peak


def slope(points: list[list[float]], column: int) -> float:
    """Return the exponent between the last two values."""
    (x0, *y0), (x1, *y1) = points[-2:]
    return math.log(y1[column] / y0[column]) / math.log(x1 / x0)


def plot(line: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 8), layout="constrained")
    grid = figure.subplots(2, len(SWEEPS))
    for column, what in enumerate(SWEEPS):
        for row, unit in enumerate(("seconds", "bytes")):
            axes = grid[row][column]
            for name, points in line["sweeps"][what].items():
                axes.plot([p[0] for p in points], [p[1 + row] for p in points], marker="o", label=name)
            shown = [p for points in line["sweeps"][what].values() for p in points]
            x, low = sorted({p[0] for p in shown}), min(p[1 + row] for p in shown)
            for exponent in (1, 2):
                axes.plot(x, [low * (value / x[0]) ** exponent for value in x], color="gray", linestyle=":")
            axes.set(xscale="log", yscale="log", xlabel=what, ylabel=unit if column == 0 else "")
    grid[0][0].legend(fontsize=7)
    figure.suptitle("Cost of a training step; dotted: linear and quadratic")
    figure.savefig(RESULTS / "growth.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    sweeps: dict[str, dict[str, list]] = {}
    print("| grows with | model | exponent of time | of memory | in theory |\n|---|---|---|---|---|")
    for what, values in SWEEPS.items():
        sweeps[what] = {}
        for name in MODELS:
            points: list[list[float]] = []
            for value in values:
                if applies(name, what, value):
                    points.append([value, *measure(name, **{**BASE, what: value})])
            if points:
                sweeps[what][name] = points
                theory: Any = SLOPES[what]
                theory = theory if isinstance(theory, int) else theory["gru" if "gru" in name else "transformer"]
                found = [slope(points, column) for column in (0, 1)]
                print(f"| {what} | {name} | {found[0]:.2f} | {found[1]:.2f} | {theory} |", flush=True)
    line = {"sweeps": sweeps, "base": BASE, "threads": torch.get_num_threads()}
    append(RESULTS / f"growth-{machine()}-{date.today().isoformat()}.jsonl", line)
    plot(line)


if __name__ == "__main__":
    main()
