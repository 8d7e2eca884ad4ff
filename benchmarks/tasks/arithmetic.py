"""Compute modulo 5, without and with brackets: the value of an expression is asked at its "=".

Models train on 3 to 40 tokens and are tested on 40 to 256, by scaled accuracy, as in table 3 of Grazzi et al. 2024
(arXiv:2411.12537). Both tasks are written from the definitions that it cites. Without brackets that is xLSTM (Beck et
al. 2024, arXiv:2405.04517): digits with +, - and * between them, where * comes first. With brackets it is Delétang et
al. 2022 (arXiv:2207.02098) with its default operators + and -: an expression of n tokens is d, -d, (d) or (-d) for n
up to 4, and above that (left op right) for any split of the n - 3 other tokens. As in these sources, a length counts
the "=" and the answer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .models import WINDOW, Settings
from .runner import IGNORED, Batch, Runs, Score, Task, accuracy, draw_length, growing, scaled, test_batches

MODULUS, SHORTEST, LONGEST = 5, 3, 40
TEST_LENGTHS = [*range(40, 257, 8)]
TOKENS = [str(digit) for digit in range(MODULUS)] + list("+-*()=")
PLUS, MINUS, TIMES, OPEN, CLOSE, EQUALS = range(MODULUS, len(TOKENS))
Generate = Callable[[torch.Generator, int, int], Batch]


def flat(generator: torch.Generator, size: int, length: int) -> Batch:
    """Draw expressions without brackets [B, T], digit (operator digit)* =, the longest that fit into `length` with the
    answer."""
    digits = torch.randint(MODULUS, (size, (length - 1) // 2), generator=generator)
    operators = torch.randint(PLUS, TIMES + 1, (size, digits.shape[1] - 1), generator=generator)
    total, product = torch.zeros(size, dtype=torch.long), digits[:, 0]
    for operator, digit in zip(operators.T, digits[:, 1:].T, strict=True):
        times = operator == TIMES
        total = torch.where(times, total, total + product)
        product = torch.where(times, product * digit, torch.where(operator == MINUS, -digit, digit)) % MODULUS
    inputs = torch.full((size, 2 * digits.shape[1]), EQUALS)
    inputs[:, 0:-1:2], inputs[:, 1:-1:2] = digits, operators
    return Batch(inputs, asked_last(inputs, (total + product) % MODULUS))


def bracketed(generator: torch.Generator, size: int, length: int) -> Batch:
    """Draw expressions with brackets [B, T]. Eight rows share their brackets; each has its digits and operators."""
    parts = []
    for rows in torch.empty(size).split(8):
        tokens, values = expression(generator, len(rows), length - 2)
        inputs = torch.stack([*tokens, torch.full((len(rows),), EQUALS)], dim=1)
        parts.append(Batch(inputs, asked_last(inputs, values)))
    return Batch(torch.cat([p.inputs for p in parts]), torch.cat([p.labels for p in parts]))


def expression(generator: torch.Generator, size: int, length: int) -> tuple[list[Tensor], Tensor]:
    """Draw `length` columns of tokens, each [B], and the values [B]."""

    def column(token: int) -> Tensor:
        return torch.full((size,), token)

    if length < 5:
        digits = torch.randint(MODULUS, (size,), generator=generator)
        tokens = [column(MINUS), digits] if length in (2, 4) else [digits]
        if length in (3, 4):
            tokens = [column(OPEN), *tokens, column(CLOSE)]
        return tokens, -digits % MODULUS if length in (2, 4) else digits
    left = int(torch.randint(1, length - 3, (), generator=generator))
    a, a_values = expression(generator, size, left)
    b, b_values = expression(generator, size, length - 3 - left)
    operator = torch.randint(PLUS, MINUS + 1, (size,), generator=generator)
    values = torch.where(operator == PLUS, a_values + b_values, a_values - b_values) % MODULUS
    return [column(OPEN), *a, operator, *b, column(CLOSE)], values


def asked_last(inputs: Tensor, values: Tensor) -> Tensor:
    labels = torch.full_like(inputs, IGNORED)
    labels[:, -1] = values
    return labels


def scaled_by_length(generate: Generate) -> Callable[[nn.Module, Settings], Score]:
    def evaluate(network: nn.Module, settings: Settings) -> Score:
        curve = {
            str(length): scaled(accuracy(network(input_ids=batch.inputs).logits, batch.labels), 1 / MODULUS)
            for length, batch in test_batches(generate, settings)
        }
        return Score({"scaled accuracy": sum(curve.values()) / len(curve)}, curve)

    return evaluate


def growing_lengths(generate: Generate) -> Callable[[torch.Generator, int, float], Batch]:
    def train(generator: torch.Generator, size: int, level: float) -> Batch:
        longest = growing(level, SHORTEST + 2, LONGEST)
        return generate(generator, size, draw_length(generator, SHORTEST, longest))

    return train


def reaching(least: float) -> Callable[[Runs], dict[str, bool]]:
    def checks(runs: Runs) -> dict[str, bool]:
        return {
            f"{model}: scaled accuracy at least {least}, mean": runs.mean(model, "scaled accuracy") >= least
            for model in ("feedback", "feedback-window", "feedback-mlp", "feedback-lstm", "feedback-gru")
        }

    return checks


INIT: Settings = {"initializer_range": 0.125}
SHAPE: Settings = {**INIT, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
FEEDBACK: Settings = {**SHAPE, "preset": "token-loop", "num_encoder_layers": 0, "num_feedback_layers": 1}
LSTM: Settings = {**INIT, "preset": "lstm", "feedback_signal": "state", "hidden_size": 64}
GRU: Settings = {**INIT, "preset": "gru", "feedback_signal": "state", "num_feedback_layers": 2, "hidden_size": 56}
MODELS: dict[str, Settings] = {
    "feedback": {"kind": "feedback", "fields": FEEDBACK, "training": {"steps": 4000}},
    "feedback-window": {"kind": "feedback", "fields": {**FEEDBACK, **WINDOW}, "training": {"steps": 4000}},
    "feedback-mlp": {"kind": "feedback", "fields": {**FEEDBACK, "feedback_type": "mlp", "num_feedback_layers": 2}},
    "feedback-lstm": {"kind": "feedback", "fields": LSTM},
    "feedback-gru": {"kind": "feedback", "fields": GRU},
    "control": {"kind": "feedback", "fields": {**FEEDBACK, "feedback_signal": "none"}},
    "gru": {"kind": "gru", "fields": {"hidden_size": 64, "num_layers": 2}},
    "lstm": {"kind": "lstm", "fields": {"hidden_size": 64, "num_layers": 2}},
    "llama": {"kind": "llama", "fields": {**SHAPE, "hidden_size": 48, "num_hidden_layers": 2}},
}


def task(
    name: str, title: str, generate: Generate, least: float, published: dict[str, float], **training: object
) -> Task:
    return Task(
        name=name,
        title=f"{title}: trained on 3 to 40 tokens, tested on 40 to 256",
        num_tokens=len(TOKENS),
        num_labels=MODULUS,
        num_positions=max(TEST_LENGTHS),
        train=growing_lengths(generate),
        evaluate=scaled_by_length(generate),
        models=MODELS,
        checks=reaching(least),
        evaluation={"lengths": TEST_LENGTHS, "sequences": 128},
        smoke={"lengths": [40], "sequences": 2},
        training={"steps": 8000, "batch": 128, "easy": 0.2, "hard": 1.0, "stride": 0.01, **training},
        columns=("scaled accuracy",),
        published={f"{model} (Grazzi et al. 2024, best of 3)": (value,) for model, value in published.items()},
        x_label="tokens",
        y_label="scaled accuracy",
    )


TASKS = (
    task(
        "mod5",
        "Arithmetic modulo 5 without brackets",
        flat,
        0.971,
        {"Transformer": 0.031, "sLSTM": 0.787, "DeltaNet, eigenvalues in [-1, 1]": 0.971},
    ),
    task(
        "mod5-brackets",
        "Arithmetic modulo 5 with brackets",
        bracketed,
        0.26,
        {"Transformer": 0.067, "sLSTM": 0.178, "DeltaNet, eigenvalues in [-1, 1]": 0.26},
        lr=3e-3,  # with 1e-3, half of the seeds had not learned the trained lengths in their time
    ),
)
