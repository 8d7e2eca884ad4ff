"""What the benchmarks share, and that their reports read the recorded runs."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import claims, exactness, growth, halting, scaling, small_beats_large, timing, training
from benchmarks.retrofit import __main__ as retrofit
from benchmarks.tasks import __main__ as tasks


@pytest.mark.slow
def test_train_and_evaluate():
    model, rows = training.build(), training.held_out(16, 4)
    before, steps = training.evaluate(model.eval(), rows)
    assert steps is None and abs(before - math.log(model.config.vocab_size)) < 0.5
    training.train(model, 30, 16, sampled=(1, 3))
    after, _ = training.evaluate(model, rows)
    assert after < before - 0.5
    halted = training.build(halting="converged", halting_threshold=1000).eval()
    assert training.evaluate(halted, rows)[1] == 2.0


def test_ratio_is_theirs_over_ours(monkeypatch):
    clock = [0.0]

    def takes(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    measured = timing.ratio(lambda: takes(0.002), lambda: takes(0.02), rounds=5)
    assert measured[0] == pytest.approx(10)
    assert timing.at_least("case", "peer", 2.0, measured).passed
    assert not timing.at_most("case", "peer", 0.01, measured).passed
    assert len(measured[1]["ours"]) == 5


@pytest.mark.parametrize("module", [claims, exactness, halting])
def test_reports(module, monkeypatch, capsys):
    monkeypatch.setattr(module, "plot", lambda line: None)
    module.report()
    printed = capsys.readouterr().out
    assert printed.count("|") > 20


def test_report_of_retrofits(capsys):
    reached = retrofit.report()
    printed = capsys.readouterr().out
    assert printed.count("|") > 20
    assert reached == ("FAIL  " not in printed) and "pass  " in printed


def page(name: str) -> str:
    return (Path(__file__).parents[1] / "docs" / name).read_text(encoding="utf-8")


def test_the_page_of_tasks_shows_the_recorded_runs():
    text = page("results/tasks.md")
    rows = [row for columns in tasks.OVERVIEWS for row in tasks.overview(columns)]
    for row in [*rows, *(row for heading in tasks.SEEDS_OF for row in tasks.by_seed(heading))]:
        assert row in text


def test_the_page_of_language_shows_the_recorded_runs(capsys):
    text = page("results/language.md")
    small_beats_large.report()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == 5 and all(row in text for row in printed)
    runs, names = claims.finished(), ("feedback", "control", "equal compute")
    for width in claims.WIDTHS:
        lines = [runs["language", name, width][0] for name in names]
        losses = " | ".join(f"{line['loss']:.4f}" for line in lines)
        assert f"| {lines[0]['parameters']:,} | {losses} |" in text
    for size in claims.EXAMPLES:
        found = [runs["classification", name, size].values() for name in names[:2]]
        means = [sum(line["test accuracy"] for line in lines) / len(lines) for lines in found]
        assert f"| {size:,} | {means[0]:.3f} | {means[1]:.3f} |" in text


def test_the_page_of_speed_shows_the_last_recorded_runs():
    text, newest = page("results/speed.md"), sorted(timing.RESULTS.glob("speed-*.jsonl"))[-1]
    cases = {line["case"]: line for line in map(json.loads, newest.read_text(encoding="utf-8").splitlines())}
    assert len(cases) > 20
    for line in cases.values():
        assert f"| {line['figure']} | {line['target']} | {'pass' if line['passed'] else 'FAIL'} |" in text


def test_the_page_of_machines_shows_the_check_and_the_plan(capsys):
    lines = scaling.FILE.read_text(encoding="utf-8").splitlines()
    scaling.check([json.loads(line) for line in lines][-len(scaling.WIDTHS) :])
    scaling.plan()
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(printed) > 30 and all(row in page("guides/machines.md") for row in printed)


@pytest.mark.slow
def test_noise_hides_what_a_model_knows():
    model, rows = training.build(), training.held_out(16, 64)
    training.train(model, 40, 16, sampled=(1, 3))
    clean = (model(rows[:, :-1]).logits.argmax(-1) == rows[:, 1:]).float().mean().item()
    assert claims.noisy_accuracy(model, rows, 0.0) == pytest.approx(clean)
    assert claims.noisy_accuracy(model, rows, 1.0) < clean - 0.02


@pytest.mark.slow
def test_learning_curve(monkeypatch):
    monkeypatch.setitem(claims.CLASSIFIER, "hidden_size", 16)
    monkeypatch.setattr(claims, "STEPS_OF_A_CURVE", 10)
    line = claims.classification("feedback", 64, 0)
    assert 0.3 < line["validation accuracy"] <= 1 and 0.3 < line["test accuracy"] <= 1


def test_equal_compute():
    """One encoder layer and 4 passes of 3, with 3 passes back at twice the cost, against 4 layers."""
    assert claims.layer_calls(4) == 1 + 4 * 3 + 2 * (1 + 3 * 3)
    assert claims.layer_calls(4) / (4 + 2 * 4) == claims.EQUAL_COMPUTE


def test_growth_measures():
    torch.set_num_threads(1)
    points = [[batch, *growth.measure("depth, transformer", batch, 32, 2, 32)] for batch in (1, 8)]
    assert 0 < growth.slope(points, 1) < 1.5
