"""What a feedback network does, as pictures: every function returns a matplotlib Figure and can write it to a file.

Shapes: B batch, T positions, K feedback steps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display, no global state
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

COLORS = ("#0b6e99", "#d1495b", "#66a182", "#edae49", "#6c4f8c", "#8c8c8c")
INVISIBLE = {"\n": "↵", " ": "␣", "\t": "⇥"}


def loss_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | PathLike[str] | None = None
) -> Figure:
    """Training loss (faint) and validation loss (dots) over the steps of one or more runs.

    Args:
        histories: by the name of each run, its `trainer.state.log_history`.
        path: where to write the picture.
    """
    if not isinstance(histories, Mapping):
        raise ValueError("Give the histories by name, as in {'my run': trainer.state.log_history}.")
    figure, axes = _figure(7, 4.2)
    evaluated: list[float] = []
    for color, (name, history) in zip(_colors(len(histories)), histories.items(), strict=True):
        train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        evaluation = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
        if not train and not evaluation:
            raise ValueError(f"The history of {name!r} has neither 'loss' nor 'eval_loss': give state.log_history.")
        if train:
            axes.plot(*zip(*train, strict=True), color=color, alpha=0.35, linewidth=1, label=f"{name}, training")
        if evaluation:
            label = f"{name}, validation: {evaluation[-1][1]:.3f}"
            axes.plot(*zip(*evaluation, strict=True), color=color, linewidth=2, marker="o", markersize=4, label=label)
            evaluated += [loss for _, loss in evaluation if isfinite(loss)]
    if len(set(evaluated)) > 1:  # the first training losses are so high that they would flatten all the rest
        axes.set_ylim(top=max(evaluated) + 0.4 * (max(evaluated) - min(evaluated)))
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return _finish(figure, path)


def accuracy_per_step(accuracies: Mapping[str, Sequence[float]], path: str | PathLike[str] | None = None) -> Figure:
    """The accuracy [0, 1] after each feedback step, of one or more models or data sets by name."""
    if not any(len(values) for values in accuracies.values()):
        raise ValueError("There is no accuracy to show: give a list of them for each name.")
    figure, axes = _figure(5.5, 3.6)
    for color, (name, values) in zip(_colors(len(accuracies)), accuracies.items(), strict=True):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=color, linewidth=2, marker="o", label=name)
        for step, value in zip(steps, values, strict=True):
            axes.annotate(f"{value:.1%}", (step, value), (0, 7), textcoords="offset points", ha="center", color=color)
    axes.set_xlabel("feedback step")
    axes.set_ylabel("accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    every = [value for values in accuracies.values() for value in values if isfinite(value)] or [0.0]
    middle, half = (min(every) + max(every)) / 2, max(0.02, 0.7 * (max(every) - min(every)))  # no drama of 0.1 %
    axes.set_ylim(middle - half, middle + half)
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], nbins=5, min_n_ticks=1))
    axes.margins(x=0.1)
    if len(accuracies) > 1:
        axes.legend(frameon=False)
    return _finish(figure, path)


def predictions_over_steps(
    model: Any,
    tokenizer: Any,
    text: str,
    num_feedback_steps: int | None = None,
    last: int = 40,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """How a language model changes its mind: a row per feedback step, a column per token of `text`.

    The color is the probability of the token that comes next in `text`, the letters in a cell are the model's first
    choice, bold where right.

    Args:
        num_feedback_steps: how many steps to show; the config's by default.
        last: how many tokens to show, from the end; the model reads them all.
    """
    probabilities, choices, targets = step_predictions(model, tokenizer, text, num_feedback_steps)
    if len(probabilities) < 2:
        raise ValueError(
            "There is one step to show: give num_feedback_steps of 2 or more to a model in depth, or with "
            "config.solver='jacobi' along time."
        )
    probabilities, choices, targets = probabilities[:, -last:], choices[:, -last:], targets[-last:]
    rows, columns = probabilities.shape
    figure, axes = _figure(1.4 + 0.28 * columns, 1.3 + 0.34 * rows)
    image = axes.imshow(probabilities.numpy(), cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
    for row in range(rows):
        for column in range(columns):
            token, right = int(choices[row, column]), choices[row, column] == targets[column]
            axes.text(
                column,
                row,
                _visible(tokenizer, token),
                ha="center",
                va="center",
                fontsize=9,
                family="monospace",
                weight="bold" if right else "normal",
                color="white" if probabilities[row, column] > 0.55 else "#444444",
            )
    axes.set_xticks(range(columns), [_visible(tokenizer, token) for token in targets.tolist()], family="monospace")
    axes.set_yticks(range(rows), [str(step) for step in range(1, rows + 1)])
    axes.set_xlabel("the text: what comes next")
    axes.set_ylabel("feedback step")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.015, format=PercentFormatter(xmax=1))
    bar.set_label("probability")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return _finish(figure, path)


@torch.no_grad()
def step_predictions(
    model: Any, tokenizer: Any, text: str, num_feedback_steps: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each feedback step the probability [K, T-1] of the true next token, and the first choice [K, T-1]; and the
    true tokens [T-1]."""
    feedback = getattr(getattr(model, "config", None), "model_type", None) == "feedback"
    if not feedback or not hasattr(model, "lm_head"):  # it may be under an adapter, or of code that came with it
        raise ValueError(f"Give a FeedbackForCausalLM, not this {type(model).__name__}: its next tokens are shown.")
    ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
    if ids.shape[1] < 2:
        raise ValueError("Give a text of at least two tokens: each is predicted by those before it.")
    training = model.training
    model.eval()
    outputs = model(ids, num_feedback_steps=num_feedback_steps, output_feedback_states=True, use_cache=False)
    logits = model.predict(torch.cat(outputs.feedback_states)[:, :-1])
    model.train(training)
    targets = ids[0, 1:]
    probabilities = logits.float().softmax(-1)
    chosen = probabilities.gather(-1, targets.expand(len(logits), -1)[..., None])[..., 0]
    return chosen.cpu(), logits.argmax(-1).cpu(), targets.cpu()


def _visible(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token])
    shown = "".join(INVISIBLE.get(character, character) for character in text) if len(text) < 9 else text[:8] + "…"
    return shown.replace("$", r"\$")  # which would begin a formula


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure
