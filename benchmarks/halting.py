"""Measure how many passes halting saves on Shakespeare, and what that costs in perplexity.

    python -m benchmarks.halting             # every missing run, then the table and the plot
    python -m benchmarks.halting --report

One model with feedback in depth is trained with 2 to 8 passes, drawn anew at each step. It is evaluated with all 8,
and with `halting="converged"` at growing thresholds. Two more models learn when to stop. The reported threshold is
chosen on one half of the held-out texts, as the largest that costs less than 0.5 % there, and measured on the other.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import append
from benchmarks.training import build, evaluate, held_out, train

RESULTS = Path(__file__).parent / "results" / "halting.jsonl"
PASSES, STEPS, LENGTH = 8, 1500, 128
SHAPE: dict[str, Any] = {"feedback_axis": "depth", "num_feedback_steps": PASSES}
THRESHOLDS = {
    "state": [0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3],
    "prediction": [1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 5e-2],
}
RULES = ("converged", "learned", "act")


def run(rule: str, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    choose, measure = held_out(LENGTH, 512).unflatten(0, (-1, 2)).unbind(1)
    if rule == "converged":
        model = build(seed, **SHAPE)
        train(model, STEPS, LENGTH, sampled=(2, PASSES), seed=seed)
        full = [evaluate(model, rows)[0] for rows in (choose, measure)]
        fewer = [evaluate(model, measure, num_feedback_steps=number)[0] for number in range(1, PASSES + 1)]
        points = []
        for kind, thresholds in THRESHOLDS.items():
            for threshold in thresholds:
                halted = build(seed, **SHAPE, halting=rule, halting_measure=kind, halting_threshold=threshold).eval()
                halted.load_state_dict(model.state_dict())
                points.append([kind, threshold, *evaluate(halted, choose), *evaluate(halted, measure)])
        return {"full": full, "every position k passes": fewer, "points": points}
    model = build(seed, **SHAPE, halting=rule, halting_weight=0.01)
    train(model, STEPS, LENGTH, seed=seed)
    loss, steps = evaluate(model, measure)
    return {"loss": loss, "passes": steps}


def finished() -> dict[tuple[str, int], dict[str, Any]]:
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return {(line["rule"], line["seed"]): line for line in map(json.loads, lines)}


def report() -> bool:
    known, passed = finished(), []
    print("| rule | seed | threshold | passes | loss, nats | perplexity | |\n|---|---|---|---|---|---|---|")
    for (rule, seed), line in sorted(known.items()):
        if rule != "converged":
            cost = (
                math.exp(line["loss"] - known["converged", seed]["full"][1]) - 1
                if ("converged", seed) in known
                else 0.0
            )
            print(f"| {rule} | {seed} | | {line['passes']:.2f} of {PASSES} | {line['loss']:.4f} | {cost:+.2%} | |")
            continue
        print(f"| fixed | {seed} | | {PASSES} | {line['full'][1]:.4f} | | |")
        for kind in THRESHOLDS:
            cheap = [p for p in line["points"] if p[0] == kind and math.exp(p[2] - line["full"][0]) < 1.005]
            if not cheap:
                continue
            _, threshold, _, _, loss, steps = max(cheap, key=lambda p: p[1])
            cost = math.exp(loss - line["full"][1]) - 1
            reached = steps <= 0.7 * PASSES and cost < 0.005
            if kind == "state":
                passed.append(reached)
            print(
                f"| converged, {kind} | {seed} | {threshold:g} | {steps:.2f} of {PASSES} | {loss:.4f} | {cost:+.2%} "
                f"| {'pass' if reached else 'FAIL'} |"
            )
    if any(rule == "converged" for rule, _ in known):
        plot(next(line for (rule, _), line in sorted(known.items()) if rule == "converged"))
    return bool(passed) and all(passed)


def plot(line: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, PASSES + 1), line["every position k passes"], marker="s", label="all positions alike")
    for kind in THRESHOLDS:
        points = [p for p in line["points"] if p[0] == kind]
        axes.plot([p[5] for p in points], [p[4] for p in points], marker="o", label=f"converged, by {kind}")
    low = min(line["every position k passes"])
    axes.set(
        xlabel="passes, mean over positions", ylabel="loss, nats", ylim=(low - 0.01, low + 0.15), xlim=(1, PASSES)
    )
    axes.set_title("What halting saves")
    axes.legend()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    for seed in [] if arguments.report else arguments.seeds:
        for rule in arguments.rules:
            if (rule, seed) not in finished():
                append(RESULTS, {"rule": rule, "seed": seed, **run(rule, seed)})
    raise SystemExit(0 if report() else 1)


if __name__ == "__main__":
    main()
