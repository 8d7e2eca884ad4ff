"""Measure what the solvers and gradient modes cost in exactness, on Shakespeare.

    python -m benchmarks.exactness                  # all parts; a finished one is not repeated
    python -m benchmarks.exactness --parts passes

`passes`: how many passes each solver makes until a tolerance, for a trained and an untrained model.
`sequential`, `parallel`: training position by position, and with a few parallel passes.
`gradients`: memory and error of the gradient modes, against the full gradient.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import append, peak_bytes
from benchmarks.training import build, evaluate, held_out, train
from feedback_transformers import FeedbackForCausalLM

RESULTS = Path(__file__).parent / "results" / "exactness.jsonl"
TIME: dict[str, Any] = {"feedback_axis": "time", "feedback_type": "transformer"}
LENGTH, STEPS = 256, 300
TOLERANCES = [10.0**-i for i in range(1, 7)]


def trained(steps: int = 600) -> FeedbackForCausalLM:
    """Return a model trained with 3 to 5 parallel passes over 128 characters."""
    model = build(**TIME, solver="jacobi", gradient_steps=3)
    train(model, steps, 128, sampled=(3, 5))
    return model


def passes() -> dict[str, Any]:
    """Count passes over 128 positions until no signal changes by more than the tolerance, for 4 texts at a time."""
    rows, counts = held_out(128, 4)[:, :-1], {}
    for name, model in (("untrained", build(**TIME, solver="jacobi").eval()), ("trained", trained())):
        for solver, block in (("jacobi", 0), ("gauss_seidel", 32), ("gauss_seidel", 8)):
            config = model.config
            config.solver, config.solver_block_size, config.solver_steps = solver, block or 16, 200
            numbers = []
            for tolerance in TOLERANCES:
                config.solver_tolerance = tolerance
                with torch.no_grad():
                    numbers.append(int(model(rows, use_cache=False).num_feedback_steps.max()))
            counts[f"{name}, {solver}" + (f", blocks of {block}" if block else "")] = numbers
    return {"tolerances": TOLERANCES, "passes": counts}


def sequential() -> dict[str, Any]:
    """Train position by position over 256 characters."""
    model = build(**TIME)
    return {"seconds": train(model, STEPS, LENGTH), "loss": evaluate(model, held_out(LENGTH, 64))[0]}


def parallel() -> dict[str, Any]:
    """Train the same model on the same data with 4 to 6 parallel passes; evaluate it position by position too."""
    model, rows = build(**TIME, solver="jacobi"), held_out(LENGTH, 64)
    found = {"seconds": train(model, STEPS, LENGTH, sampled=(4, 6))}
    found["loss in passes"] = evaluate(model, rows, num_feedback_steps=6)[0]
    model.config.solver = "sequential"
    return {**found, "loss": evaluate(model, rows)[0]}


def gradients() -> dict[str, Any]:
    """Compare the gradient modes of a trained model, with 8 passes in depth and one batch of 8 x 128 characters.

    They differ in the peak of what torch allocates, and in the gradient g of all weights: its relative error
    |g - full| / |full|, and its cosine with the full gradient.
    """
    full = build(feedback_axis="depth", num_feedback_steps=8)
    train(full, 300, 128, sampled=(2, 8))
    rows, reference = held_out(128, 8), None
    found: dict[str, Any] = {}
    modes: dict[str, dict[str, Any]] = {
        "full": {},
        "last 4": {"gradient_steps": 4},
        "last 2": {"gradient_steps": 2},
        "one step": {"gradient_steps": 1},
        "deep supervision": {"supervision": "all"},
        "full, checkpointed": {},
    }
    for name, fields in modes.items():
        model = copy.deepcopy(full).train()
        for field, value in fields.items():
            setattr(model.config, field, value)
        if "checkpointed" in name:
            model.activation_checkpointing_enable()

        def step(model: FeedbackForCausalLM = model) -> None:
            model(rows[:, :-1], labels=rows[:, :-1], use_cache=False).loss.backward()

        peak = peak_bytes(step)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        reference = gradient if reference is None else reference
        error = ((gradient - reference).norm() / reference.norm()).item()
        cosine = torch.cosine_similarity(gradient, reference, dim=0).item()
        found[name] = {"peak MB": round(peak / 2**20, 1), "error": round(error, 4), "cosine": round(cosine, 4)}
    return found


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "passes": passes,
    "gradients": gradients,
    "sequential": sequential,
    "parallel": parallel,
}


def finished() -> dict[str, dict[str, Any]]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {line["part"]: line for line in map(json.loads, lines)}


def report() -> bool:
    """Print the tables and draw passes against tolerance; return whether every check passed."""
    known = finished()
    if "passes" in known:
        print("| passes until a tolerance of |", " | ".join(f"{t:.0e}" for t in TOLERANCES), "|")
        print("|---" * (len(TOLERANCES) + 1) + "|")
        for name, numbers in known["passes"]["passes"].items():
            print("|", name, "|", " | ".join(map(str, numbers)), "|")
        plot(known["passes"])
    if "gradients" in known:
        print("\n| gradient | peak MB | error | cosine |\n|---|---|---|---|")
        for name, row in known["gradients"].items():
            if isinstance(row, dict) and "cosine" in row:
                print("|", name, "|", " | ".join(map(str, row.values())), "|")
    checks = {}
    if "parallel" in known and "sequential" in known:
        one, other = known["sequential"], known["parallel"]
        print("\n| training | seconds | loss in order, nats | in passes |\n|---|---|---|---|")
        print(f"| position by position | {one['seconds']:.0f} | {one['loss']:.4f} | |")
        print(f"| parallel passes | {other['seconds']:.0f} | {other['loss']:.4f} | {other['loss in passes']:.4f} |\n")
        gap = math.exp(abs(other["loss"] - other["loss in passes"])) - 1
        checks = {
            f"loss within 1 % ({other['loss'] / one['loss'] - 1:+.2%})": other["loss"] <= 1.01 * one["loss"],
            f"5 times the speed ({one['seconds'] / other['seconds']:.1f})": one["seconds"] >= 5 * other["seconds"],
            f"in order as in passes, perplexity within 1 % ({gap:.2%})": gap < 0.01,
        }
        for sentence, reached in checks.items():
            print(f"{'pass' if reached else 'FAIL'}  {sentence}")
    return len(known) == len(PARTS) and all(checks.values())


def plot(line: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, numbers in line["passes"].items():
        axes.plot(
            line["tolerances"], numbers, marker="o", linestyle="--" if name.startswith("un") else "-", label=name
        )
    axes.set(xscale="log", xlabel="tolerance", ylabel="passes over 128 positions", title="Solving feedback in time")
    axes.invert_xaxis()
    axes.legend()
    figure.savefig(RESULTS.with_name("passes.png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    for part in [] if arguments.report else arguments.parts:
        if part not in finished():
            append(RESULTS, {"part": part, **PARTS[part](), "threads": torch.get_num_threads()})
    raise SystemExit(0 if report() else 1)


if __name__ == "__main__":
    main()
