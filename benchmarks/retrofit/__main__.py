"""Compare retrofitted models with plain LoRA that has as many trained parameters and as much time.

    python -m benchmarks.retrofit               # every missing run, then the tables
    python -m benchmarks.retrofit --report
    python -m benchmarks.retrofit --experiments cups --models time --seeds 0

Each finished run is a line of results/retrofit.jsonl. A run that is there is not repeated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from benchmarks.timing import RESULTS, append

from . import adaptation, costs, reasoning
from .families import FAMILIES

FILE = RESULTS / "retrofit.jsonl"
Lines = dict[str, list[dict[str, Any]]]  # returns the finished runs of an experiment, by model


class Experiment(NamedTuple):
    models: tuple[str, ...]
    run: Callable[[str, int], dict[str, Any]]  # makes the run of a model and a seed
    report: Callable[[Lines], None]  # prints a table


EXPERIMENTS = {
    "costs": Experiment(costs.AXES, costs.costs, costs.report),
    **{
        name: Experiment(reasoning.models(name), partial(reasoning.run, name), partial(reasoning.report, name))
        for name in FAMILIES
    },
    "nothing-lost": Experiment(("original",), reasoning.untrained, reasoning.report_original),
    "domain": Experiment(("plain", "time", "depth"), adaptation.domain, adaptation.report_domain),
    "sentiment": Experiment(tuple(adaptation.CLASSIFIERS), adaptation.sentiment, adaptation.report_sentiment),
}


def finished() -> dict[str, Lines]:
    """Return the finished runs of an experiment; of reasoning, those with the present recipe only."""
    found: dict[str, Lines] = {name: {} for name in EXPERIMENTS}
    for line in map(json.loads, FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []):
        name, model = line["experiment"], line["model"]
        if name not in FAMILIES or line["recipe"] == reasoning.recipe(name, model):
            found[name].setdefault(model, []).append(line)
    return found


def report() -> bool:
    """Print the tables and the targets; return whether all targets were reached."""
    runs = finished()
    for name, experiment in EXPERIMENTS.items():
        if runs[name]:
            print(f"\n### {name}\n")
            experiment.report(runs[name])
    checks = {**costs.checks(runs["costs"]), **reasoning.checks(runs)}
    print()
    for sentence, reached in checks.items():
        print(f"{'pass' if reached else 'FAIL'}  {sentence}")
    return bool(checks) and all(checks.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--models", nargs="+", help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    for seed in [] if arguments.report else arguments.seeds:
        for name in arguments.experiments:
            for model in arguments.models or EXPERIMENTS[name].models:
                if model not in EXPERIMENTS[name].models:
                    raise SystemExit(f"{name} has no {model}: choose from {', '.join(EXPERIMENTS[name].models)}.")
                if any(line["seed"] == seed for line in finished()[name].get(model, [])):
                    continue
                line = {"experiment": name, "model": model, "seed": seed}
                command = f"python -m benchmarks.retrofit --experiments {name} --models {model} --seeds {seed}"
                append(FILE, {**line, **EXPERIMENTS[name].run(model, seed), "command": command})
    raise SystemExit(0 if report() else 1)


if __name__ == "__main__":
    main()
