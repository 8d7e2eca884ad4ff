"""Measure what feedback buys, on published tasks with three seeds.

    python -m benchmarks.tasks                                    # every missing run of every task, then the report
    python -m benchmarks.tasks --task parity --models feedback gru --seeds 0
    python -m benchmarks.tasks --report                           # tables and plots of the runs that are there
    python -m benchmarks.tasks --smoke                            # a few steps of everything, nothing is written

Each run is appended to results/tasks/<task>.jsonl when it has finished. A run that is there is not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from . import arithmetic, parity, pondering, prefix_sums, programs, sudoku, swaps
from .runner import SEEDS, Task

ALL = (
    parity.TASK,
    swaps.TASK,
    *arithmetic.TASKS,
    prefix_sums.TASK,
    pondering.TASK,
    programs.TASK,
    *sudoku.TASKS,
)
TASKS: dict[str, Task] = {task.name: task for task in ALL}


# Two tables of means: what each task is asked, and the name of its column.
OVERVIEWS = (
    {
        "parity": ("scaled accuracy", "parity"),
        "mod5": ("scaled accuracy", "mod 5"),
        "mod5-brackets": ("scaled accuracy", "mod 5 with brackets"),
        "swaps": ("256 operations", "swaps, 256 operations, %"),
    },
    {
        "prefix-sums": ("last pass", "prefix sums, %"),
        "pondering": ("extrapolation", "pondering, %"),
        "programs": ("20 statements", "programs, %"),
    },
)


TITLES = {
    "feedback": "feedback, transformer cell",
    "feedback-window": "the same with a window of 4 tokens",
    "feedback-mlp": "feedback, MLP cell",
    "feedback-lstm": "feedback, LSTM cell",
    "feedback-gru": "feedback, GRU cell",
    "recurrent-looped": "recurrent-looped",
    "act": "feedback, halting by ACT",
    "fixed": "feedback, all passes",
    "our-gru": "our GRU, its own state alone",
    "control": "control without feedback",
    "llama": "Llama",
    "gru": "nn.GRU",
    "lstm": "nn.LSTM",
}


def overview(columns: dict[str, tuple[str, str]]) -> list[str]:
    """Return the rows of a table: the mean of each model on each task, and the number of its seeds."""
    runs, rows = {name: TASKS[name].finished() for name in columns}, []
    for model, title in TITLES.items():
        cells = []
        for name, (metric, _) in columns.items():
            values, digits = runs[name].values(model, metric), 3 if metric == "scaled accuracy" else 1
            cells.append(f"{runs[name].mean(model, metric):.{digits}f} ({len(values)})" if values else "")
        if any(cells):
            rows.append(f"| {title} | {' | '.join(cells)} |")
    return rows


SEEDS_OF = {  # heading -> the tasks and metrics of its columns, and the models that have another title there
    "swaps-S5, % of final states, by seed": (
        {
            "32 operations": ("swaps", "32 operations"),
            "64": ("swaps", "64 operations"),
            "256": ("swaps", "256 operations"),
        },
        {"feedback-every-4": "feedback every 4th token"},
    ),
    "Sudoku, % of whole grids, by seed": (
        {"6×6": ("sudoku-6x6", "grids"), "4×4": ("sudoku-4x4", "grids"), "9×9": ("sudoku-9x9", "grids")},
        {
            "feedback": "feedback, the last 4 of 6 to 10 passes in the gradient",
            "full-recursion": "the last 8 of 8 to 16 passes in the gradient",
            "last-4": "the last 4",
            "one-step": "the last one",
            "all-passes": "all of them",
            "8-layers": "8 layers without feedback, 3.8 times the parameters",
        },
    ),
    "Sudoku 9×9 with TRM's recipe, % by seed": (
        {
            "cells": ("sudoku-trm", "cells"),
            "grids, 8 answers": ("sudoku-trm", "grids"),
            "32 answers": ("sudoku-trm", "grids, 32 answers"),
            "a random start": ("sudoku-trm", "grids, a random start"),
            "the surest of 8": ("sudoku-trm", "grids, surest of 8"),
        },
        {
            "trm": "two latents",
            "trm-singlez": "a single latent",
            "8-layers": "8 layers without feedback, 4.0 times the parameters",
        },
    ),
}


def by_seed(heading: str) -> list[str]:
    """Return the rows of a table of single runs."""
    columns, titles = SEEDS_OF[heading]
    runs = {column: (TASKS[name].finished(), metric) for column, (name, metric) in columns.items()}
    rows = []
    for model in dict.fromkeys(model for name, _ in columns.values() for model in TASKS[name].models):
        cells = [", ".join(f"{x:.1f}" for x in found.values(model, metric)) for found, metric in runs.values()]
        if any(cells):
            rows.append(f"| {titles.get(model, TITLES.get(model))} | {' | '.join(cells)} |")
    return rows


def print_table(columns: Iterable[str], rows: list[str]) -> None:
    names = list(columns)
    print(f"\n| {' | '.join(names)} |", f"|{'---|' * len(names)}", *rows, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--models", nargs="+", help="all of the task by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, help="train so many steps instead of the task's own number")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each model, nothing is written")
    arguments = parser.parse_args()
    tasks = [TASKS[name] for name in arguments.task]
    for task in tasks:
        models = arguments.models or list(task.models)
        unknown = set(models) - set(task.models)
        if unknown:
            parser.error(
                f"{task.name} has no model {', '.join(sorted(unknown))}: choose from {', '.join(task.models)}."
            )
        if arguments.smoke:
            for model in models:
                line = task.run(model, arguments.seeds[0], arguments.steps or 2, smoke=True)
                print(task.name, model, f"{line['parameters']:,}", line["metrics"], f"{line['seconds']} s", flush=True)
        elif not arguments.report:
            task.run_missing(models, arguments.seeds, arguments.steps)
    if arguments.smoke:
        return
    reached = [task.report() for task in tasks]
    for columns in OVERVIEWS:
        print_table(["model", *(title for _, title in columns.values())], overview(columns))
    for heading, (columns, _) in SEEDS_OF.items():
        print_table([heading, *columns], by_seed(heading))
    for task in tasks:
        task.plot()
    raise SystemExit(0 if all(reached) else 1)


if __name__ == "__main__":
    main()
