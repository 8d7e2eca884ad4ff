"""Tell the parity of every prefix of a bit string, by more passes where the string is longer.

Models train on 10,000 strings of 32 bits and are tested on 512. A string counts if all its parities are right, as in
Bansal et al. 2022 (arXiv:2202.05826), whose networks repeat one block of convolutions that sees the input anew at
every pass. Their best figure takes the best of all passes; both the last pass and the best one are reported here.
"""

from __future__ import annotations

import torch
from torch import nn

from .models import Settings
from .runner import TEST_SEED, Batch, Runs, Score, Task, growing

SHORT, LONG = 32, 512
STRINGS = torch.randint(2, (10_000, SHORT), generator=torch.Generator().manual_seed(TEST_SEED + 1))


def label(bits: torch.Tensor) -> Batch:
    """Return bits [B, T] and the parity of each prefix."""
    return Batch(bits, bits.cumsum(1) % 2)


def train(generator: torch.Generator, size: int, level: float) -> Batch:
    """Draw rows of the fixed set, cut to their first bits while the level is low."""
    rows = torch.randint(len(STRINGS), (size,), generator=generator)
    return label(STRINGS[rows, : growing(level, 8, SHORT)])


def test(length: int, strings: int) -> Batch:
    generator = torch.Generator().manual_seed(TEST_SEED + length)
    return label(torch.randint(2, (strings, length), generator=generator))


def evaluate(network: nn.Module, settings: Settings) -> Score:
    """Return the percentage of whole strings. `passes`: how many passes a feedback model makes on 512 bits."""
    batch, passes = test(settings["length"], settings["strings"]), settings.get("passes")
    rights = []
    for inputs, labels in zip(batch.inputs.split(8), batch.labels.split(8), strict=True):
        if passes is None:
            logits = [network(input_ids=inputs).logits]
        else:
            output = network(input_ids=inputs, num_feedback_steps=passes, output_feedback_states=True)
            logits = [network.classifier(state) for state in output.feedback_states]
        rights.append(torch.stack([(step.argmax(-1) == labels).all(1) for step in logits]))  # [passes, 8]
    shares = 100 * torch.cat(rights, dim=1).float().mean(1)
    curve = {str(i): share for i, share in enumerate(shares.tolist(), start=1)}
    return Score({"last pass": shares[-1].item(), "best pass": shares.max().item()}, curve)


def checks(runs: Runs) -> dict[str, bool]:
    values = runs.values("feedback", "last pass")
    return {
        "at least 97.1 % of whole strings at the last pass, mean": runs.mean("feedback", "last pass") >= 97.1,
        "no failed seed (each at least 90 %)": runs.reached("feedback", "last pass", 90.0),
        f"the last pass is within 1 point of the best: {values}": all(
            last >= best - 1 for last, best in zip(values, runs.values("feedback", "best pass"), strict=True)
        )
        and bool(values),
    }


SHAPE: Settings = {"hidden_size": 48, "initializer_range": 0.1}
FEEDBACK: Settings = {
    **SHAPE,
    "feedback_axis": "depth",
    "feedback_type": "conv",
    "feedback_connection": "concat",
    "is_causal": False,
    "encoder_type": "cnn",
    "num_encoder_layers": 1,
    "num_feedback_layers": 4,
    "decoder_type": "mlp",
    "num_decoder_layers": 0,
}
TRANSFORMER: Settings = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 2}
MODELS: dict[str, Settings] = {
    "feedback": {
        "kind": "feedback",
        "fields": FEEDBACK,
        "training": {"sampled": (8, 20)},
        "evaluation": {"passes": 256},
    },
    "control": {"kind": "feedback", "fields": {**FEEDBACK, "feedback_signal": "none"}},
    "gru": {"kind": "gru", "fields": {"hidden_size": 48, "num_layers": 2}},
    "lstm": {"kind": "lstm", "fields": {"hidden_size": 48, "num_layers": 2}},
    "llama": {"kind": "llama", "fields": {**TRANSFORMER, "num_hidden_layers": 2}},
}

TASK = Task(
    name="prefix-sums",
    title="Prefix sums: trained on 32 bits, per cent of whole strings of 512 right",
    num_tokens=2,
    num_labels=2,
    num_positions=LONG,
    train=train,
    evaluate=evaluate,
    models=MODELS,
    checks=checks,
    training={"steps": 2000, "batch": 64},
    evaluation={"length": LONG, "strings": 256},
    smoke={"length": 40, "strings": 8},
    columns=("last pass", "best pass"),
    published={"Bansal et al. 2022, best of all passes": ("", "97.12 ± 1.88")},
    x_label="passes",
    y_label="whole strings right, %",
)
