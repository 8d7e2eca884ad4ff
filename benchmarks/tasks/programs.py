"""Tell what each print statement shows, in programs over three variables.

Statements are v=c, v++, v--, print v and if v<c or if v>c before one of the others, with values from 1 to 10, as in
the Feedback Transformer (Fan et al. 2020, arXiv:2002.09402), cut to 20 statements. Some choices are ours: the first
statements give every variable a value, ++ and -- stop at 10 and 1, a print that an `if` skips asks nothing, and the
tokens are `v=`, `v++`, `v--`, `print v`, `if v<`, `if v>` and numbers. The value is asked at the print, and is no part
of the input.

Shapes: B programs, S statements, T tokens, V variables.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .models import Settings
from .runner import IGNORED, Batch, Runs, Score, Task, accuracy, growing, test_batches

VARIABLES, VALUES, STATEMENTS = 3, 10, 20
TEST_STATEMENTS = [5, 10, 15, 20]
SET, INCREMENT, DECREMENT, PRINT, IF_LESS, IF_MORE = range(6)  # token: kind * VARIABLES + variable
NUMBER = 6 * VARIABLES  # token of the number 1
PAD = NUMBER + VALUES
COLUMN = f"{STATEMENTS} statements"
NAMES = "xyzuvw"[:VARIABLES]
TOKENS = [form.format(v) for form in ("{}=", "{}++", "{}--", "print {}", "if {}<", "if {}>") for v in NAMES]
TOKENS += [*map(str, range(1, VALUES + 1)), ""]


def generate(generator: torch.Generator, size: int, statements: int) -> Batch:
    """Draw tokens [B, T] with the padding behind, and the printed value less 1 at every print that is reached."""

    def draw(least: int, most: int) -> Tensor:
        return torch.randint(least, most + 1, (size, statements), generator=generator)

    kind, variable, number = draw(SET, PRINT), draw(0, VARIABLES - 1), draw(1, VALUES)
    tested, bound, less = draw(0, VARIABLES - 1), draw(1, VALUES), draw(0, 1)
    conditional = draw(0, 4) == 0
    kind[:, :VARIABLES], conditional[:, :VARIABLES] = SET, False
    variable[:, :VARIABLES] = torch.arange(VARIABLES)[: min(VARIABLES, statements)]

    absent = torch.full_like(kind, -1)
    tokens = torch.stack(
        [
            torch.where(conditional, torch.where(less == 1, IF_LESS, IF_MORE) * VARIABLES + tested, absent),
            torch.where(conditional, NUMBER + bound - 1, absent),
            kind * VARIABLES + variable,
            torch.where(kind == SET, NUMBER + number - 1, absent),
        ],
        dim=-1,
    )  # [B, S, 4]
    labels = torch.full_like(tokens, IGNORED)
    values = torch.ones(size, VARIABLES, dtype=torch.long)
    rows = torch.arange(size)
    for s in range(statements):
        seen, now = values[rows, tested[:, s]], values[rows, variable[:, s]]
        holds = torch.where(less[:, s] == 1, seen < bound[:, s], seen > bound[:, s]) | ~conditional[:, s]
        outcomes = torch.stack([number[:, s], (now + 1).clamp(max=VALUES), (now - 1).clamp(min=1), now])
        values[rows, variable[:, s]] = torch.where(holds, outcomes[kind[:, s], rows], now)
        labels[:, s, 2] = torch.where(holds & (kind[:, s] == PRINT), now - 1, IGNORED)

    tokens, labels = tokens.flatten(1), labels.flatten(1)
    order = (tokens < 0).long().argsort(dim=1, stable=True)[:, : int((tokens >= 0).sum(1).max())]
    tokens, labels = tokens.gather(1, order), labels.gather(1, order)
    return Batch(torch.where(tokens < 0, PAD, tokens), labels)


def train(generator: torch.Generator, size: int, level: float) -> Batch:
    return generate(generator, size, growing(level, 5, STATEMENTS))


def evaluate(network: nn.Module, settings: Settings) -> Score:
    """Return the percentage of the prints that are reached."""
    curve = {}
    for statements, batch in test_batches(generate, settings):
        logits = torch.cat([network(input_ids=part).logits for part in batch.inputs.split(128)])
        curve[str(statements)] = 100 * accuracy(logits, batch.labels)
    return Score({COLUMN: curve[str(STATEMENTS)]}, curve)


def checks(runs: Runs) -> dict[str, bool]:
    llama, control = runs.mean("llama", COLUMN), runs.mean("control", COLUMN)
    reached = {}
    for model in ("feedback", "feedback-lstm"):
        ours = runs.mean(model, COLUMN)
        reached[f"{model} above Llama and control"] = ours > max(llama, control)
        reached[f"{model} at least 99 %, mean"] = ours >= 99
        reached[f"{model} at least 65 points above Llama (published: 99.1 against 33.7)"] = ours - llama >= 65
    return reached


SHAPE: Settings = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "initializer_range": 0.125,
}
MEMORY: Settings = {**SHAPE, "preset": "shared-memory", "num_feedback_layers": 2}
LOOPED: Settings = {**SHAPE, "preset": "token-loop", "num_encoder_layers": 0, "num_feedback_layers": 2}
LSTM: Settings = {"preset": "lstm", "feedback_signal": "state", "hidden_size": 96, "initializer_range": 0.1}
FEWER: Settings = {"steps": 2500}  # which take these models longer than 8,000 steps take the others
MODELS: dict[str, Settings] = {
    "feedback": {"kind": "feedback", "fields": MEMORY, "training": FEWER},
    "recurrent-looped": {"kind": "feedback", "fields": LOOPED, "training": FEWER},
    "feedback-lstm": {"kind": "feedback", "fields": LSTM},
    "control": {"kind": "feedback", "fields": {**MEMORY, "feedback_signal": "none"}},
    "gru": {"kind": "gru", "fields": {"hidden_size": 96, "num_layers": 2}},
    "lstm": {"kind": "lstm", "fields": {"hidden_size": 80, "num_layers": 2}},
    "llama": {"kind": "llama", "fields": {**SHAPE, "num_hidden_layers": 2}},
}

TASK = Task(
    name="programs",
    title="Programs with 3 variables and 20 statements: per cent of printed values right",
    num_tokens=len(TOKENS),
    num_labels=VALUES,
    num_positions=4 * STATEMENTS,
    train=train,
    evaluate=evaluate,
    models=MODELS,
    checks=checks,
    training={"steps": 8000, "lr": 3e-3, "easy": 0.4, "hard": 1.0, "stride": 0.02},
    evaluation={"lengths": TEST_STATEMENTS, "sequences": 512},
    smoke={"lengths": [STATEMENTS], "sequences": 8},
    columns=(COLUMN,),
    published={"Feedback Transformer (Fan et al. 2020, longer programs)": (99.1,), "Transformer": (33.7,)},
    x_label="statements",
    y_label="printed values right, %",
)
