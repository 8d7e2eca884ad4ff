"""Tell the permutation of five items after every prefix of swaps (Swaps-S5).

From the identity, each operation is the identity or one of the 10 transpositions; the answer is one of the 120
permutations. Models train on 32 operations and are tested on 64 and 256, where the final permutation is scored, as in
the Recurrent Looped Transformer (Zhang 2026). The word problem of S5 is complete for NC1: no network of fixed depth
solves it at all lengths (cf. Merrill, Petty & Sabharwal 2024, arXiv:2404.08819).
"""

from __future__ import annotations

from itertools import combinations, permutations

import torch
from torch import Tensor, nn

from .models import WINDOW, Settings
from .runner import Batch, Runs, Score, Task, growing, test_batches

ITEMS, LONGEST, TEST_LENGTHS = 5, 32, [32, 64, 128, 256]
ORDERS = list(permutations(range(ITEMS)))  # 120
SWAPS = [(0, 0), *combinations(range(ITEMS), 2)]  # 11 operations, where the first one changes nothing


def tables() -> Tensor:
    """Return the number of the permutation that an operation, a swap of two places, makes of another: [120, 11]."""
    numbers = {order: i for i, order in enumerate(ORDERS)}
    rows = []
    for order in ORDERS:
        row = []
        for a, b in SWAPS:
            swapped = list(order)
            swapped[a], swapped[b] = swapped[b], swapped[a]
            row.append(numbers[tuple(swapped)])
        rows.append(row)
    return torch.tensor(rows)


TABLE = tables()


def generate(generator: torch.Generator, size: int, length: int) -> Batch:
    """Draw operations [B, T] and the permutation after each."""
    operations = torch.randint(len(SWAPS), (size, length), generator=generator)
    state, labels = torch.zeros(size, dtype=torch.long), []
    for operation in operations.T:
        state = TABLE[state, operation]
        labels.append(state)
    return Batch(operations, torch.stack(labels, dim=1))


def train(generator: torch.Generator, size: int, level: float) -> Batch:
    return generate(generator, size, growing(level, 4, LONGEST))


def evaluate(network: nn.Module, settings: Settings) -> Score:
    """Return the percentage of right final permutations."""
    curve = {}
    for length, batch in test_batches(generate, settings):
        final = torch.cat([network(input_ids=part).logits[:, -1] for part in batch.inputs.split(128)])
        right = final.argmax(-1) == batch.labels[:, -1]
        curve[str(length)] = 100 * right.float().mean().item()
    return Score({f"{length} operations": value for length, value in curve.items()}, curve)


def checks(runs: Runs) -> dict[str, bool]:
    every, fourth, none = (runs.mean(model, "64 operations") for model in ("feedback", "feedback-every-4", "control"))
    reached = {}
    for model in ("feedback", "feedback-window", "feedback-mlp", "feedback-lstm"):
        reached[f"{model}: 100 at 64 operations, each seed"] = runs.reached(model, "64 operations", 100.0)
        reached[f"{model}: at least 97.3 at 256 operations, mean"] = runs.mean(model, "256 operations") >= 97.3
    return reached | {
        "at 64 operations: every token > every 4th > none": every > fourth > none,
        "at 64 operations: every 4th below 50, none below 5": fourth < 50 and none < 5,
    }


SHAPE: Settings = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "initializer_range": 0.09,
}
FEEDBACK: Settings = {**SHAPE, "preset": "token-loop", "num_encoder_layers": 0, "num_feedback_layers": 1}
LSTM: Settings = {"preset": "lstm", "feedback_signal": "state", "hidden_size": 128}
MODELS: dict[str, Settings] = {
    "feedback": {"kind": "feedback", "fields": FEEDBACK, "training": {"steps": 3000}},
    "feedback-window": {"kind": "feedback", "fields": {**FEEDBACK, **WINDOW}, "training": {"steps": 3000}},
    "feedback-every-4": {
        "kind": "feedback",
        "fields": {**FEEDBACK, "feedback_interval": 4},
        "training": {"steps": 3000},
    },
    "control": {"kind": "feedback", "fields": {**FEEDBACK, "feedback_signal": "none"}},
    "feedback-mlp": {"kind": "feedback", "fields": {**FEEDBACK, "feedback_type": "mlp"}},
    "feedback-lstm": {"kind": "feedback", "fields": LSTM},
    "gru": {"kind": "gru", "fields": {"hidden_size": 128, "num_layers": 2}},
    "lstm": {"kind": "lstm", "fields": {"hidden_size": 128, "num_layers": 2}},
    "llama": {"kind": "llama", "fields": {**SHAPE, "hidden_size": 96, "num_hidden_layers": 2}},
}

TASK = Task(
    name="swaps",
    title="Swaps-S5: trained on 32 operations, per cent of final states right",
    num_tokens=len(SWAPS),
    num_labels=len(ORDERS),
    num_positions=max(TEST_LENGTHS),
    train=train,
    evaluate=evaluate,
    models=MODELS,
    checks=checks,
    training={"steps": 5000, "easy": 0.3, "hard": 2.0},
    evaluation={"lengths": TEST_LENGTHS, "sequences": 512},
    smoke={"sequences": 1},
    columns=tuple(f"{length} operations" for length in TEST_LENGTHS),
    published={
        "Recurrent Looped Transformer (Zhang 2026)": ("", 100.0, "", 97.3),
        "the same, feedback every 4th token": ("", 19.6, "", ""),
        "Transformer": ("", "", "", 0.85),
    },
    x_label="operations",
    y_label="final states right, %",
)
