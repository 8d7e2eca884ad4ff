"""Time the speed cases: two callables in turns in one run, a result in each line, and a registry of cases."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import feedback_transformers
from feedback_transformers.models.feedback_scan import kernel_available

RESULTS = Path(__file__).parent / "results"


class Result(NamedTuple):
    case: str
    against: str
    figure: str
    target: str
    passed: bool
    details: dict[str, Any]


Case = Callable[[], Result]
CASES: dict[str, tuple[Callable[[], None], Case]] = {}


def case(name: str, check: Callable[[], None]) -> Callable[[Case], Case]:
    """Register a case under `name`; it is timed only after `check` has run without an AssertionError."""

    def enter(function: Case) -> Case:
        CASES[name] = (check, function)
        return function

    return enter


def ratio(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int = 7) -> tuple[float, dict[str, Any]]:
    """Return how many times as long theirs takes: the median of their times over that of ours, in calls by turns.

    The details hold all times in milliseconds, and the load of the machine before and after.
    """
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    load = [*os.getloadavg()]
    for i in range(rounds + 2):
        for name, function in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            function()
            if i >= 2:  # the first calls compile, and fill the caches
                times[name].append(round(1e3 * (time.perf_counter() - start), 3))
    load += os.getloadavg()
    details = {**times, "threads": torch.get_num_threads(), "load": [round(value, 2) for value in load]}
    return statistics.median(times["theirs"]) / statistics.median(times["ours"]), details


def peak_bytes(step: Callable[[], Any]) -> int:
    """Return the most bytes that torch has allocated at a time during the call, beyond those before it."""
    with profile(profile_memory=True, activities=[ProfilerActivity.CPU]) as events:
        step()
    current = peak = 0
    for event in events.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def append(file: Path, line: dict[str, Any]) -> None:
    """Append a finished run to a file with one run in each line."""
    file.parent.mkdir(exist_ok=True)
    with file.open("a", encoding="utf-8") as results:
        results.write(json.dumps({**line, "load": os.getloadavg(), "versions": versions()}) + "\n")


def at_least(name: str, against: str, target: float, measured: tuple[float, dict[str, Any]]) -> Result:
    """Return a result that passes if ours is `target` times as fast."""
    figure, details = measured
    return Result(name, against, f"{figure:.2f}x faster", f">= {target:g}x", figure >= target, details)


def at_most(name: str, against: str, target: float, measured: tuple[float, dict[str, Any]]) -> Result:
    """Return a result that passes if ours takes at most `target` times as long."""
    figure, details = measured
    return Result(name, against, f"{1 / figure:.2f}x its time", f"<= {target:g}x", 1 / figure <= target, details)


def run(names: list[str], threads: int = 2, kind: str = "speed") -> list[Result]:
    """Run the cases, print a table in markdown, and append to results/<kind>-<machine>-<date>.jsonl."""
    results = []
    path = RESULTS / f"{kind}-{machine()}-{date.today().isoformat()}.jsonl"
    print("| case | against | measured | target | |\n|---|---|---|---|---|")
    for name in names:
        check, function = CASES[name]
        try:
            torch.set_num_threads(1)  # the reference makes many small steps
            check()
            torch.set_num_threads(threads)
            result = function()
        except AssertionError as error:
            result = Result(name, "its reference", "wrong", "equal", False, {"error": str(error)})
        print("|", " | ".join([*result[:4], "pass" if result.passed else "FAIL"]), "|", flush=True)
        append(path, result._asdict())
        results.append(result)
    return results


def machine() -> str:
    """Return the kind of processor and how many there are, without the name of the host."""
    return f"{platform.machine()}-{os.cpu_count()}cpu".lower()


def versions() -> dict[str, Any]:
    modules = {"feedback_transformers": feedback_transformers, "torch": torch, "transformers": transformers}
    found: dict[str, Any] = {name: str(module.__version__) for name, module in modules.items()}
    return {**found, "python": platform.python_version(), "kernels": kernel_available()}
