"""Draw what a feedback network does. Every function returns a matplotlib Figure and can write it to a file.

Shapes: B batch, T positions, K feedback steps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no display, no global state
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

COLORS = ("#0b6e99", "#d1495b", "#66a182", "#edae49", "#6c4f8c", "#8c8c8c")
CLASSIFIERS = ("FeedbackForSequenceClassification", "FeedbackForImageClassification")
LONGEST = 12  # letters of a token; longer ones are cut
LINE = 96  # letters in a row of boxes
MOST_CLASSES = 12
TOKENS = (
    "FeedbackForCausalLM",
    "FeedbackForMaskedLM",
    "FeedbackForTokenClassification",
    "FeedbackForQuestionAnswering",
    "FeedbackForConditionalGeneration",
)
INVISIBLE = {"\n": "↵", " ": "␣", "\t": "⇥"}


def loss_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | PathLike[str] | None = None
) -> Figure:
    """Draw the training loss (faint) and the validation loss (dots) of one or more runs.

    Args:
        histories: the `trainer.state.log_history` of each run, by its name.
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
    """Draw the accuracy [0, 1] after each feedback step, for one or more models or data sets by name."""
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
    processor: Any,
    example: Any,
    num_feedback_steps: int | None = None,
    last: int | None = None,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw how a model changes its mind: what it predicts for one example after each feedback step.

    For tokens there is a row per step and a column per token: the letters are the first choice of the model, the color
    is the probability of the right token, or of the first choice where no right one is known, and right choices are
    bold. Long texts go on in further rows of boxes. For classes there is a row per step and a column per class; for
    series a line per step.

    Args:
        model: a FeedbackFor... model, also one with adapters.
        processor: its tokenizer or image processor; None for series.
        example: what the head reads: a text; (question, text); (source, target) of sequence to sequence; an image;
            or a series [T] or [T, C].
        num_feedback_steps: how many steps to show; those of the config by default.
        last: how many tokens to show, from the end; the model reads them all. All by default.
        path: where to write the picture.

    Raises:
        ValueError: for another model, an example without tokens, or a model of one step.
    """
    kind = _head(model)
    if kind == "FeedbackForTimeSeriesPrediction":
        return _draw_forecasts(model, example, num_feedback_steps, path)
    if kind in CLASSIFIERS:
        logits, _ = step_logits(model, processor, example, num_feedback_steps)
        return _draw_classes(logits[:, 0], model.config, path)
    if kind == "FeedbackForQuestionAnswering":
        logits, ids = step_logits(model, processor, example, num_feedback_steps)
        words = [_visible(processor, token) for token in ids.tolist()]
        boxes = [Box(words, [words] * len(logits), logits[..., i].softmax(-1), None) for i in range(2)]
        titles = ["where the answer begins", "where the answer ends"]
        return _draw_boxes([box.last(last) for box in boxes], "probability", path, titles)
    if kind == "FeedbackForTokenClassification":
        logits, ids = step_logits(model, processor, example, num_feedback_steps)
        best, choices = logits.softmax(-1).max(-1)
        names = [[str(model.config.id2label[label])[:LONGEST] for label in row] for row in choices.tolist()]
        box = Box([_visible(processor, token) for token in ids.tolist()], names, best, None)
        return _draw_boxes([box.last(last)], "probability of the class shown", path)
    probabilities, choices, targets = step_predictions(model, processor, example, num_feedback_steps)
    shown = [[_visible(processor, token) for token in row] for row in choices.tolist()]
    words, right = [_visible(processor, token) for token in targets.tolist()], choices == targets
    return _draw_boxes([Box(words, shown, probabilities, right).last(last)], "probability of the right token", path)


def states_over_steps(
    model: Any,
    processor: Any,
    example: Any,
    num_feedback_steps: int | None = None,
    path: str | PathLike[str] | None = None,
) -> Figure:
    """Draw where a model still works: how much each feedback step changes the output y of each position.

    There is a row per step and a column per position. The color is |y_k - y_{k-1}| / |y_k|; it fades where the output
    has settled. The arguments are those of `predictions_over_steps`.
    """
    outputs, ids = run_steps(model, processor, example, num_feedback_steps)
    y = torch.stack([state[0] for state in _several(outputs.feedback_states)]).float()  # [K, T, D]
    change = ((y[1:] - y[:-1]).norm(dim=-1) / y[1:].norm(dim=-1).clamp(min=1e-12)).cpu()
    words = [""] * y.shape[1] if ids is None else [_visible(processor, token) for token in ids.tolist()]
    if len(words) != y.shape[1]:
        words = [""] * y.shape[1]
    figure, axes = _figure(max(4.0, min(14.0, 1.6 + 0.16 * len(words))), 1.6 + 0.3 * len(change))
    image = axes.imshow(change.numpy(), cmap="magma_r", vmin=0, aspect="auto")
    axes.set_yticks(range(len(change)), [str(step) for step in range(2, len(change) + 2)])
    axes.set_ylabel("feedback step")
    every = -(-len(words) // 80)
    places = range(0, len(words), every)
    if any(words):
        axes.set_xticks(places, [words[i] for i in places], rotation=90, family="monospace", fontsize=7)
    axes.set_xlabel("position")
    _plain(figure, axes, image, "relative change")
    return _finish(figure, path)


@torch.no_grad()
def run_steps(model: Any, processor: Any, example: Any, num_feedback_steps: int | None = None) -> tuple[Any, Any]:
    """Return what the model gives for one example, with the output of every step, and the tokens [T] that it read."""
    kind, ids = _head(model), None
    inputs: dict[str, Any] = {}
    if kind == "FeedbackForTimeSeriesPrediction":
        inputs["past_values"] = torch.as_tensor(example, dtype=torch.float32)[None]
    elif kind == "FeedbackForImageClassification":
        inputs["pixel_values"] = processor(example, return_tensors="pt").pixel_values
    elif kind == "FeedbackForConditionalGeneration":
        source, target = example
        inputs["input_ids"] = torch.tensor([processor(source)["input_ids"]])
        inputs["labels"] = torch.tensor([processor(text_target=target)["input_ids"]])
        ids = inputs["labels"][0]
    else:
        texts = example if isinstance(example, tuple) else (example,)
        encoded = processor(*texts)
        inputs["input_ids"] = torch.tensor([encoded["input_ids"]])
        if "token_type_ids" in encoded and getattr(_base(model).model, "token_types", None) is not None:
            inputs["token_type_ids"] = torch.tensor([encoded["token_type_ids"]])
        ids = inputs["input_ids"][0]
        least = 2 if kind == "FeedbackForCausalLM" else 1
        if len(ids) < least:
            why = ": each is predicted by those before it" if least == 2 else ""
            raise ValueError(f"Give a text of at least {('one token', 'two tokens')[least - 1]}{why}.")
    if kind not in (*CLASSIFIERS, "FeedbackForTimeSeriesPrediction", *TOKENS):
        raise ValueError(f"This picture is of a model with a head; a {kind} has none: load a FeedbackFor... class.")
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    training = model.training
    model.eval()
    outputs = model(**inputs, num_feedback_steps=num_feedback_steps, output_feedback_states=True)
    model.train(training)
    return outputs, ids


def step_logits(model: Any, processor: Any, example: Any, num_feedback_steps: int | None = None) -> tuple[Tensor, Any]:
    """Return the logits of one example after each step, [K, T, V] or [K, 1, L], and the tokens [T] that it read."""
    outputs, ids = run_steps(model, processor, example, num_feedback_steps)
    _several(outputs.feedback_states)
    with torch.no_grad():
        logits = torch.stack(_base(model).step_logits(outputs)).float().cpu()  # [K, 1, T, V] or [K, 1, L]
    return logits if logits.ndim == 3 else logits[:, 0], ids


def step_predictions(
    model: Any, tokenizer: Any, example: Any, num_feedback_steps: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a model of tokens predicts after each of K steps, for the T tokens of `example` that it predicts.

    Returns:
        the probability of the right token [K, T], the first choice [K, T], and the right tokens [T].
    """
    kind = _head(model)
    if kind not in ("FeedbackForCausalLM", "FeedbackForMaskedLM", "FeedbackForConditionalGeneration"):
        raise ValueError(f"Give a model that predicts tokens, such as a FeedbackForCausalLM, not this {kind}.")
    logits, targets = step_logits(model, tokenizer, example, num_feedback_steps)
    if kind == "FeedbackForCausalLM":
        logits, targets = logits[:, :-1], targets[1:]
    chosen = logits.softmax(-1).gather(-1, targets.cpu().expand(len(logits), -1)[..., None])[..., 0]
    return chosen, logits.argmax(-1), targets.cpu()


def _base(model: Any) -> Any:
    """Return the model under adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head(model: Any) -> str:
    base = _base(model)
    if getattr(getattr(base, "config", None), "model_type", None) != "feedback":
        raise ValueError(f"Give a feedback model, such as a FeedbackForCausalLM, not this {type(model).__name__}.")
    return type(base).__name__


def _several(states: Any) -> Any:
    if states is None or len(states) < 2:
        raise ValueError(
            "There is one step to show: give num_feedback_steps of 2 or more to a model in depth, or with "
            "config.solver='jacobi' along time."
        )
    return states


class Box(NamedTuple):
    """A grid of K rows and T columns: words above it, and in it letters, numbers from 0 to 1, and what is right."""

    words: list[str]
    letters: list[list[str]]
    values: Tensor  # [K, T]
    right: Tensor | None  # [K, T]

    def part(self, start: int, stop: int) -> Box:
        right = None if self.right is None else self.right[:, start:stop]
        letters = [row[start:stop] for row in self.letters]
        return Box(self.words[start:stop], letters, self.values[:, start:stop], right)

    def last(self, number: int | None) -> Box:
        return self if number is None else self.part(max(0, len(self.words) - number), len(self.words))

    def widths(self) -> list[int]:
        """Return the letters that each column needs."""
        columns = zip(self.words, *self.letters, strict=True)
        return [max(2, *(len(text.replace("\\", "")) + 1 for text in column)) for column in columns]

    def lines(self) -> Iterator[Box]:
        """Split the columns so that each line of boxes has at most LINE letters."""
        start = used = 0
        for column, width in enumerate(self.widths()):
            if used + width > LINE and column > start:
                yield self.part(start, column)
                start, used = column, 0
            used += width
        yield self.part(start, len(self.words))


def _draw_boxes(
    boxes: Sequence[Box], label: str, path: str | PathLike[str] | None, titles: Sequence[str] = ("",)
) -> Figure:
    lines = [
        (line, title if i == 0 else "")
        for box, title in zip(boxes, titles, strict=True)
        for i, line in enumerate(box.lines())
    ]
    widest = max(sum(line.widths()) for line, _ in lines)
    rows = len(lines[0][0].values)
    figure = Figure(
        figsize=(max(5.0, 1.3 + 0.105 * widest), len(lines) * (0.75 + 0.24 * rows) + 0.5), layout="constrained"
    )
    grid = figure.subplots(len(lines), 1, squeeze=False)[:, 0]
    image: Any = None
    for axes, (line, title) in zip(grid, lines, strict=True):
        edges = [0, *accumulate(line.widths())]
        image = axes.pcolormesh(edges, range(rows + 1), line.values.numpy(), cmap="YlGnBu", vmin=0, vmax=1)
        for row in range(rows):
            for column, letters in enumerate(line.letters[row]):
                right = line.right is not None and bool(line.right[row, column])
                axes.text(
                    (edges[column] + edges[column + 1]) / 2,
                    row + 0.5,
                    letters,
                    ha="center",
                    va="center",
                    fontsize=8,
                    family="monospace",
                    weight="bold" if right else "normal",
                    color="white" if line.values[row, column] > 0.55 else "#444444",
                )
        middles = [(left + right) / 2 for left, right in pairwise(edges)]
        axes.set_xticks(middles, line.words, family="monospace", fontsize=8)
        axes.xaxis.tick_top()
        axes.set_yticks([row + 0.5 for row in range(rows)], [str(step) for step in range(1, rows + 1)], fontsize=8)
        axes.set_xlim(0, widest)
        axes.set_ylim(rows, 0)
        axes.set_ylabel("step")
        axes.set_title(title, fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=list(grid), fraction=0.025, pad=0.015, format=PercentFormatter(xmax=1))
    bar.set_label(label)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return _finish(figure, path)


def _draw_classes(logits: Tensor, config: Any, path: str | PathLike[str] | None) -> Figure:
    """Draw the probabilities of the classes after each step, logits [K, L]; of many classes, the most probable."""
    if config.problem_type == "regression" or logits.shape[-1] == 1:
        figure, axes = _figure(5.5, 3.6)
        for color, column in zip(_colors(logits.shape[1]), logits.T, strict=True):
            axes.plot(range(1, len(logits) + 1), column, color=color, linewidth=2, marker="o")
        axes.set(xlabel="feedback step", ylabel="prediction")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _finish(figure, path)
    several = config.problem_type == "multi_label_classification"
    probabilities = logits.sigmoid() if several else logits.softmax(-1)
    kept = sorted(probabilities.amax(0).topk(min(MOST_CLASSES, logits.shape[-1])).indices.tolist())
    names = [str(config.id2label[label]) for label in kept]
    shown = probabilities[:, kept]
    letters = [[f"{value:.0%}" for value in row] for row in shown.tolist()]
    best = shown.amax(-1, keepdim=True) == shown
    return _draw_boxes([Box([_short(name) for name in names], letters, shown, best)], "probability", path)


def _draw_forecasts(
    model: Any, example: Any, num_feedback_steps: int | None, path: str | PathLike[str] | None
) -> Figure:
    """Draw the forecast of the first channel that a series model makes with 1 to K passes."""
    config, past = model.config, torch.as_tensor(example, dtype=torch.float32)
    if not config.in_passes:
        _several(None)
    steps = num_feedback_steps or (
        config.num_feedback_steps if config.feedback_axis == "depth" else config.solver_steps
    )
    figure, axes = _figure(7, 3.6)
    line = past if past.ndim == 1 else past[:, 0]
    axes.plot(range(len(line)), line, color="#444444", linewidth=1.5, label="past")
    training = model.training
    model.eval()
    for step in range(1, steps + 1):
        with torch.no_grad():
            made = model(past_values=past[None].to(model.device), num_feedback_steps=step).prediction_outputs[0].cpu()
        made = made if made.ndim == 1 else made[:, 0]
        there = range(len(line), len(line) + len(made))
        label = f"after {step} step" + ("s" if step > 1 else "")
        axes.plot(there, made, color=COLORS[0], alpha=1 - 0.8 * (steps - step) / steps, linewidth=1.8, label=label)
    model.train(training)
    axes.set(xlabel="time step", ylabel="value")
    axes.legend(frameon=False, fontsize=8)
    return _finish(figure, path)


def _visible(tokenizer: Any, token: int) -> str:
    """Return a token as it is drawn: spaces and line ends as signs, long words cut."""
    text = tokenizer.decode([token]) if token >= 0 else ""
    signs = (INVISIBLE.get(character, character) for character in text)
    return _short("".join(sign if sign.isprintable() else "□" for sign in signs))


def _short(text: str) -> str:
    text = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return text.replace("$", r"\$")  # which would begin a formula


def _plain(figure: Figure, axes: Axes, image: Any, label: str) -> None:
    """Draw a color bar for `image`, without frames and grid."""
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.015)
    bar.set_label(label)
    bar.outline.set_visible(False)  # type: ignore[operator]


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
