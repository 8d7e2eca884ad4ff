"""Tell the parity of a vector, by as many passes as the network itself finds necessary.

Vectors are of -1, 0 and 1; the answer is whether the number of ones is odd (Graves 2016, arXiv:1603.08983). Models
extrapolate as in PonderNet (Banino et al. 2021, arXiv:2107.05407): they train on 1 to 48 entries that are not zero,
and are tested on 49 to 96 of 96. In three things the task differs from PonderNet's. An entry is a token. Vectors are
shorter in training, where the parity is asked after each of their entries. And a test may take more passes than
training did.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .models import Settings
from .runner import IGNORED, Batch, Runs, Score, Task, draw_length, growing, test_batches

ENTRIES, MOST = 96, 48  # entries of a vector; those in training that are not zero
ZERO, ONE, MINUS_ONE = range(3)  # tokens


def generate(generator: torch.Generator, size: int, filled: Tensor | int, entries: int = ENTRIES) -> Batch:
    """Draw vectors [B, T] with `filled` entries, or so many in each row [B], that are 1 or -1, in random places."""
    places = torch.rand(size, entries, generator=generator).argsort(1)  # a random order in each row
    signs = torch.randint(ONE, MINUS_ONE + 1, (size, entries), generator=generator)
    inputs = torch.where(places < torch.as_tensor(filled).reshape(-1, 1), signs, ZERO)
    labels = torch.full_like(inputs, IGNORED)
    labels[:, -1] = (inputs == ONE).sum(1) % 2
    return Batch(inputs, labels)


def train(generator: torch.Generator, size: int, level: float) -> Batch:
    """Draw vectors of 1 to 48 entries, shorter ones while the level is low, with the parity after each entry."""
    entries = draw_length(generator, 1, growing(level, 8, MOST))
    filled = torch.randint(1, entries + 1, (size,), generator=generator)
    inputs = generate(generator, size, filled, entries).inputs
    return Batch(inputs, (inputs == ONE).cumsum(1) % 2)


def evaluate(network: nn.Module, settings: Settings) -> Score:
    """Return the accuracy in extrapolation; the curve shows passes where the model chooses them, or else accuracy."""
    rights, steps, passes = {}, {}, settings.get("passes")
    for filled, (inputs, labels) in test_batches(generate, settings):
        output = network(input_ids=inputs, **{"num_feedback_steps": passes} if passes else {})
        rights[filled] = 100 * (output.logits[:, -1].argmax(-1) == labels[:, -1]).float().mean().item()
        made = getattr(output, "num_feedback_steps", None)
        if made is not None:
            steps[filled] = made[:, -1].float().mean().item()
    beyond = [right for filled, right in rights.items() if filled > MOST]
    metrics = {"extrapolation": sum(beyond) / len(beyond)}
    if steps:
        few, many = min(steps), max(steps)
        metrics |= {"passes for the fewest": steps[few], "passes for the most": steps[many]}
    return Score(metrics, {str(filled): value for filled, value in (steps or rights).items()})


def checks(runs: Runs) -> dict[str, bool]:
    few, many = runs.mean("feedback", "passes for the fewest"), runs.mean("feedback", "passes for the most")
    return {
        "extrapolation at least 99 %, mean": runs.mean("feedback", "extrapolation") >= 99,
        f"passes grow with difficulty, {few:.1f} to {many:.1f}": many > few,
    }


SHAPE: Settings = {"hidden_size": 48, "initializer_range": 0.1}
DEPTH: Settings = {
    **SHAPE,
    "feedback_axis": "depth",
    "feedback_type": "conv",
    "feedback_connection": "concat",
    "conv_kernel_size": 5,
    "is_causal": False,
    "num_encoder_layers": 0,
    "num_feedback_layers": 3,
    "decoder_type": "mlp",
    "num_decoder_layers": 0,
}
PASSES: Settings = {"training": {"sampled": (8, 16)}, "evaluation": {"passes": 32}}
PONDER: Settings = {**DEPTH, "halting": "learned", "halting_prior": 0.05, "halting_weight": 0.01}
MODELS: dict[str, Settings] = {
    "feedback": {"kind": "feedback", "fields": PONDER, **PASSES},
    "act": {"kind": "feedback", "fields": {**DEPTH, "halting": "act", "halting_weight": 0.001}, **PASSES},
    "fixed": {"kind": "feedback", "fields": DEPTH, **PASSES},
    "control": {"kind": "feedback", "fields": {**DEPTH, "feedback_signal": "none"}},
    "gru": {"kind": "gru", "fields": {"hidden_size": 56, "num_layers": 2}},
    "lstm": {"kind": "lstm", "fields": {"hidden_size": 48, "num_layers": 2}},
    "llama": {
        "kind": "llama",
        "fields": {**SHAPE, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 2},
    },
}

TASK = Task(
    name="pondering",
    title="Parity of vectors: trained on 1 to 48 entries that are not zero, per cent right on 49 to 96",
    num_tokens=3,
    num_labels=2,
    num_positions=ENTRIES,
    train=train,
    evaluate=evaluate,
    models=MODELS,
    checks=checks,
    training={"batch": 32, "easy": 0.05, "hard": 0.3},
    evaluation={"lengths": [1, 12, 24, 36, 48, *range(52, 97, 4)], "sequences": 128},
    smoke={"lengths": [48, 96], "sequences": 2},
    columns=("extrapolation", "passes for the fewest", "passes for the most"),
    published={"PonderNet (Banino et al. 2021)": ("almost perfect", "", ""), "ACT, as reported there": (50, "", "")},
    x_label="entries that are not zero",
    y_label="passes, where the model chooses them, else % right",
)
