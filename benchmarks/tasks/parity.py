"""Tell whether the number of ones is odd, asked at the last bit.

Models train on 3 to 40 bits and are tested on 40 to 256, by scaled accuracy, as in table 3 of Grazzi et al. 2024
(arXiv:2411.12537).
"""

from __future__ import annotations

import torch
from torch import nn

from .models import WINDOW, Settings
from .runner import IGNORED, Batch, Runs, Score, Task, accuracy, draw_length, growing, scaled, test_batches

SHORTEST, LONGEST = 3, 40
TEST_LENGTHS = [*range(40, 257, 8)]


def generate(generator: torch.Generator, size: int, length: int) -> Batch:
    """Draw random bits [B, T]; the label stands at the last one."""
    bits = torch.randint(2, (size, length), generator=generator)
    labels = torch.full_like(bits, IGNORED)
    labels[:, -1] = bits.sum(1) % 2
    return Batch(bits, labels)


def train(generator: torch.Generator, size: int, level: float) -> Batch:
    longest = growing(level, SHORTEST + 1, LONGEST)
    return generate(generator, size, draw_length(generator, SHORTEST, longest))


def evaluate(network: nn.Module, settings: Settings) -> Score:
    curve = {
        str(length): scaled(accuracy(network(input_ids=batch.inputs).logits, batch.labels), 1 / 2)
        for length, batch in test_batches(generate, settings)
    }
    return Score({"scaled accuracy": sum(curve.values()) / len(curve)}, curve)


def checks(runs: Runs) -> dict[str, bool]:
    return {
        "scaled accuracy 1.00 in 3 of 3 seeds": runs.reached("feedback", "scaled accuracy", 1.0),
        "the same with a window of 4 tokens": runs.reached("feedback-window", "scaled accuracy", 1.0),
        "the same with an MLP as the cell": runs.reached("feedback-mlp", "scaled accuracy", 1.0),
    }


SHAPE: Settings = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "initializer_range": 0.125,
}
FEEDBACK: Settings = {
    **SHAPE,
    "preset": "token-loop",
    "num_encoder_layers": 0,
    "num_feedback_layers": 1,
}
MODELS: dict[str, Settings] = {
    "feedback": {"kind": "feedback", "fields": FEEDBACK},
    "feedback-window": {"kind": "feedback", "fields": {**FEEDBACK, **WINDOW}},
    "feedback-mlp": {"kind": "feedback", "fields": {**FEEDBACK, "feedback_type": "mlp"}},
    "control": {"kind": "feedback", "fields": {**FEEDBACK, "feedback_signal": "none"}},
    "our-gru": {"kind": "feedback", "fields": {"hidden_size": 64, "preset": "gru"}},
    "gru": {"kind": "gru", "fields": {"hidden_size": 64, "num_layers": 2}},
    "lstm": {"kind": "lstm", "fields": {"hidden_size": 64, "num_layers": 2}},
    "llama": {"kind": "llama", "fields": {**SHAPE, "hidden_size": 48, "num_hidden_layers": 2}},
}

TASK = Task(
    name="parity",
    title="Parity: trained on 3 to 40 bits, tested on 40 to 256",
    num_tokens=2,
    num_labels=2,
    num_positions=max(TEST_LENGTHS),
    train=train,
    evaluate=evaluate,
    models=MODELS,
    checks=checks,
    training={"steps": 3000},
    evaluation={"lengths": TEST_LENGTHS, "sequences": 128},
    smoke={"lengths": [40], "sequences": 2},
    columns=("scaled accuracy",),
    published={
        "Transformer (Grazzi et al. 2024, best of 3)": (0.022,),
        "sLSTM": (1.0,),
        "DeltaNet, eigenvalues in [-1, 1]": (1.0,),
        "Recurrent Looped Transformer (Zhang 2026), accuracy at 256": (1.0,),
    },
    x_label="bits",
    y_label="scaled accuracy",
)
