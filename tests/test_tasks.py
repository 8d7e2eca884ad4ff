"""The data of benchmarks/tasks against brute force, and that every task runs."""

import json
import random
from itertools import permutations, product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.tasks import arithmetic, parity, pondering, prefix_sums, programs, runner, sudoku, swaps
from benchmarks.tasks.__main__ import TASKS
from benchmarks.tasks.runner import IGNORED, Runs


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def asked_at_the_end(labels: torch.Tensor) -> list[int]:
    """The answers, where nothing but the last position is asked."""
    assert (labels[:, :-1] == IGNORED).all()
    return labels[:, -1].tolist()


@pytest.mark.parametrize("make", [parity.generate, swaps.generate, arithmetic.flat, arithmetic.bracketed])
def test_data_are_seeded(make):
    one, same, other = (make(generator(seed), 16, 21) for seed in (3, 3, 4))
    assert torch.equal(one.inputs, same.inputs) and torch.equal(one.labels, same.labels)
    assert not torch.equal(one.inputs, other.inputs)


@pytest.mark.parametrize("length", [3, 40])
def test_parity(length):
    inputs, labels = parity.generate(generator(), 64, length)
    assert inputs.shape == (64, length) and set(inputs.unique().tolist()) == {0, 1}
    assert asked_at_the_end(labels) == ["".join(map(str, row)).count("1") % 2 for row in inputs.tolist()]


def test_swaps():
    inputs, labels = swaps.generate(generator(), 64, 12)
    orders = list(permutations("abcde"))
    for operations, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        items = list("abcde")
        for operation, answer in zip(operations, answers, strict=True):
            a, b = swaps.SWAPS[operation]
            items[a], items[b] = items[b], items[a]
            assert orders[answer] == tuple(items)
    assert len(set(inputs.flatten().tolist())) == 11 and len(set(labels.flatten().tolist())) > 100


@pytest.mark.parametrize("make", [arithmetic.flat, arithmetic.bracketed])
@pytest.mark.parametrize("length", [3, 4, 5, 6, 7, 9, 40, 90])
def test_arithmetic(make, length):
    inputs, labels = make(generator(length), 40, length)
    assert length - 2 <= inputs.shape[1] <= length - 1  # and the answer
    texts = ["".join(arithmetic.TOKENS[token] for token in row) for row in inputs.tolist()]
    assert all(text[-1] == "=" for text in texts)
    assert asked_at_the_end(labels) == [eval(text[:-1]) % 5 for text in texts]
    if make is arithmetic.flat:
        assert all(text[::2][:-1].isdigit() if len(text) % 2 else text[::2].isdigit() for text in texts)


def test_prefix_sums():
    inputs, labels = prefix_sums.train(generator(), 32, 1.0)
    assert inputs.shape == (32, 32)
    for bits, sums in zip(inputs.tolist(), labels.tolist(), strict=True):
        assert sums == [sum(bits[: i + 1]) % 2 for i in range(32)]
    assert prefix_sums.train(generator(), 4, 0.0).inputs.shape == (4, 8)


@pytest.mark.parametrize("filled", [1, 48, 96])
def test_pondering(filled):
    inputs, labels = pondering.generate(generator(), 32, filled)
    for row, answer in zip(inputs.tolist(), asked_at_the_end(labels), strict=True):
        values = [(0, 1, -1)[token] for token in row]
        assert len(values) == 96 and values.count(0) == 96 - filled
        assert answer == values.count(1) % 2
    trained, parities = pondering.train(generator(), 200, 1.0)
    counts = (trained != pondering.ZERO).sum(1)
    assert trained.shape == parities.shape and counts.min() >= 1 and counts.max() <= trained.shape[1] <= 48
    for row, after in zip(trained.tolist(), parities.tolist(), strict=True):
        assert after == [row[: i + 1].count(pondering.ONE) % 2 for i in range(len(row))]


def run_program(tokens: list[int]) -> list[int]:
    """The printed values, by translation to Python."""
    lines, words = [], [programs.TOKENS[token] for token in tokens if token != programs.PAD]
    while words:
        word, condition = words.pop(0), ""
        if word.startswith("if "):
            condition = f"{word}{words.pop(0)}: "
            word = words.pop(0)
        name = word.removeprefix("print ")[0]
        if word.startswith("print "):
            statement = f"out.append({name})"
        elif word.endswith("="):
            statement = word + words.pop(0)
        else:
            statement = f"{name} = min({name} + 1, 10)" if word.endswith("++") else f"{name} = max({name} - 1, 1)"
        lines.append(condition + statement)
    scope: dict = {"out": []}
    exec("\n".join(lines), scope)
    return scope["out"]


def test_programs():
    inputs, labels = programs.generate(generator(), 128, 20)
    for tokens, answers in zip(inputs.tolist(), labels.tolist(), strict=True):
        assert run_program(tokens) == [answer + 1 for answer in answers if answer != IGNORED]
    used = {programs.TOKENS[token] for token in inputs.flatten().tolist()}
    assert used == set(programs.TOKENS)
    same = programs.generate(generator(), 128, 20)
    assert torch.equal(inputs, same.inputs) and torch.equal(labels, same.labels)
    assert inputs.shape[1] <= programs.TASK.num_positions


def allowed(board: list[int], side: int) -> bool:
    """Whether no digit stands twice in a row, a column or a box."""
    high, wide = sudoku.BOXES[side]
    rows = [board[i * side : (i + 1) * side] for i in range(side)]
    boxes = [
        [rows[r + i][c + j] for i in range(high) for j in range(wide)]
        for r in range(0, side, high)
        for c in range(0, side, wide)
    ]
    for group in [*rows, *map(list, zip(*rows, strict=True)), *boxes]:
        digits = [digit for digit in group if digit]
        if len(digits) != len(set(digits)):
            return False
    return True


def test_solver_finds_all_solutions():
    """Against every way to fill the empty cells of small boards."""
    rng = random.Random(0)
    for _ in range(5):
        solution = sudoku.make_puzzle(4, rng)[1]
        empty = rng.sample(range(16), 6)
        board = [0 if cell in empty else digit for cell, digit in enumerate(solution)]
        expected = []
        for digits in product(range(1, 5), repeat=len(empty)):
            filled = list(board)
            for cell, digit in zip(empty, digits, strict=True):
                filled[cell] = digit
            if allowed(filled, 4):
                expected.append(filled)
        assert sorted(sudoku.solutions(board, limit=1000)) == sorted(expected)


@pytest.mark.parametrize("side", [4, 6])
def test_made_puzzles_have_one_solution(side):
    rng = random.Random(1)
    for _ in range(5):
        board, solution = sudoku.make_puzzle(side, rng)
        assert sudoku.solutions(board) == [solution]
        assert allowed(solution, side) and set(solution) == set(range(1, side + 1))
        assert all(given in (0, digit) for given, digit in zip(board, solution, strict=True))
        assert 0 in board


def test_puzzles_of_the_test_are_not_trained_on():
    train, test = sudoku.puzzles(4)
    assert not {tuple(row) for row in train.inputs.tolist()} & {tuple(row) for row in test.inputs.tolist()}


@pytest.mark.parametrize("side", [4, 6, 9])
def test_symmetries_of_sudoku(side):
    rng = random.Random(2)
    solution = sudoku.solutions([0] * side**2, 1, rng)[0]
    board = [digit if rng.random() < 0.5 else 0 for digit in solution]
    repeated = runner.Batch(torch.tensor([board] * 20), torch.tensor([solution] * 20))
    shown = sudoku.symmetry(repeated, generator())
    assert len({tuple(row) for row in shown.inputs.tolist()}) == 20
    for inputs, labels in zip(shown.inputs.tolist(), shown.labels.tolist(), strict=True):
        assert allowed(labels, side) and 0 not in labels
        assert all(given in (0, digit) for given, digit in zip(inputs, labels, strict=True))
        assert inputs.count(0) == board.count(0)
    asked = sudoku.ask(shown).labels
    assert torch.equal(asked != IGNORED, shown.inputs == 0)
    assert torch.equal(asked[asked != IGNORED], shown.labels[shown.inputs == 0] - 1)


class Oracle(nn.Module):
    """Answers with the labels that it is shown, as far as the evaluation asks for them."""

    def __init__(self, answer, labels: int) -> None:
        super().__init__()
        self.answer, self.labels = answer, labels

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=nn.functional.one_hot(self.answer(input_ids), self.labels))


def test_scores_of_a_perfect_and_a_constant_answer():
    settings = {"lengths": [40, 64], "sequences": 256}
    right = parity.evaluate(Oracle(lambda bits: bits.cumsum(1) % 2, 2), settings)
    assert right.metrics["scaled accuracy"] == 1.0 and right.curve == {"40": 1.0, "64": 1.0}
    constant = parity.evaluate(Oracle(torch.zeros_like, 2), settings)
    assert abs(constant.metrics["scaled accuracy"]) < 0.15
    sums = prefix_sums.evaluate(Oracle(lambda bits: bits.cumsum(1) % 2, 2), {"length": 64, "strings": 16})
    assert sums.metrics == {"last pass": 100.0, "best pass": 100.0}


# Larger Sudokus are the same code as 4×4, and making or solving their puzzles takes a while.
@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("sudoku-6x6", "sudoku-9x9")])
def test_every_task_runs(name, monkeypatch):
    if name == "sudoku-trm":  # whose puzzles are of a package
        row = torch.arange(9)
        solved = ((3 * (row % 3) + row // 3)[:, None] + row) % 9 + 1
        solved = solved.flatten().expand(8, -1)
        boards = sudoku.Batch(torch.where(torch.rand(8, 81) < 0.5, solved, 0), solved)
        monkeypatch.setattr(sudoku, "puzzles", lambda side: (boards, boards))
    task = TASKS[name]
    for model in list(task.models)[:2]:
        line = task.run(model, 0, steps=1, smoke=True)
        assert task.columns[0] in line["metrics"]
        assert line["curve"] and line["parameters"] > 0
        assert f"--task {name} --models {model} --seeds 0" in line["command"]


def test_results_continue_and_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    task = TASKS["parity"]
    monkeypatch.setattr(
        type(task),
        "run",
        lambda self, model, seed, steps: {
            "model": model,
            "seed": seed,
            "parameters": 1000,
            "seconds": 1,
            "metrics": {"scaled accuracy": 1.0 if model == "feedback" else 0.5},
            "curve": {"40": 1.0},
            "settings": self.settings(model),
        },
    )
    other = {**task.run("feedback", 0, None), "settings": task.settings("feedback", steps=10)}
    task.file.write_text(json.dumps(other) + "\n")  # which doesn't count
    task.run_missing(["feedback"], [0])
    task.run_missing(["feedback", "gru"], [0, 1, 2])
    task.run_missing(["feedback", "gru"], [0, 1, 2])
    assert len(task.file.read_text().splitlines()) == 7 and len(task.finished().lines) == 6
    assert not task.report()  # a model is missing
    shown = capsys.readouterr().out
    assert "| feedback | 1,000 | **1.000** (1.000, 1.000, 1.000) | 1, 1, 1 |" in shown
    assert "pass  scaled accuracy 1.00 in 3 of 3 seeds" in shown and "FAIL" in shown
    task.plot()
    assert task.file.with_suffix(".png").exists()


def test_no_result_never_counts_as_reached():
    for task in TASKS.values():
        assert not any(task.checks(Runs([])).values()), task.name
