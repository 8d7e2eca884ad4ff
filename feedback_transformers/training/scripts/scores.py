"""Score predictions of classes and numbers, report on each class, and write predictions to a file."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .targets import MULTI, NUMBERS, SINGLE, Targets

UNBALANCED = 2  # how many times larger the largest class is than the smallest, from where f1_macro is watched
MOST_CLASSES = 40  # that a picture of a confusion matrix can show


def best_metric(targets: Targets, labels: Sequence[Any]) -> str:
    """Return the metric by which the best checkpoint is chosen: f1_macro where classes are unbalanced."""
    if targets.problem == NUMBERS:
        return "mae"
    if targets.problem == MULTI:
        return "f1_macro"
    counts = Counter(labels).values()
    return "f1_macro" if max(counts) > UNBALANCED * min(counts) else "accuracy"


def decide(problem: str, logits: np.ndarray) -> np.ndarray:
    """Return what logits [N, L] say: a class [N], 0 or 1 for each class [N, L], or the numbers themselves [N, L]."""
    if problem == SINGLE:
        return logits.argmax(-1)
    return (logits > 0).astype(int) if problem == MULTI else logits


def score(problem: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the metrics of a problem: accuracy and f1, or the errors of numbers.

    `f1` is that of the second of two classes, and the mean over the classes otherwise, as is `f1_macro`.
    """
    from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score, root_mean_squared_error

    answers = decide(problem, logits)
    if problem == NUMBERS:
        labels, answers = labels.reshape(len(labels), -1), answers.reshape(len(labels), -1)
        found = {"mae": mean_absolute_error(labels, answers), "rmse": root_mean_squared_error(labels, answers)}
        if len(labels) > 1:
            found["r2"] = r2_score(labels, answers)
    else:
        binary = problem == SINGLE and logits.shape[-1] == 2
        found = {
            "accuracy": accuracy_score(labels, answers),
            "f1": f1_score(labels, answers, average="binary" if binary else "macro", zero_division=0.0),
            "f1_macro": f1_score(labels, answers, average="macro", zero_division=0.0),
        }
    return {name: float(value) for name, value in found.items()}


def report(targets: Targets, logits: np.ndarray, labels: np.ndarray, folder: str | Path) -> list[Path]:
    """Print precision and recall of each class and draw the confusion matrix; return the files that were written.

    They are classification_report.txt and confusion_matrix.png in `folder`. Numbers have neither.
    """
    from sklearn.metrics import classification_report

    if targets.problem == NUMBERS:
        return []
    answers, numbers = decide(targets.problem, logits), list(range(len(targets.names)))
    text = classification_report(labels, answers, labels=numbers, target_names=targets.names, zero_division=0.0)
    print(f"\n{text}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classification_report.txt").write_text(text, encoding="utf-8")
    if targets.problem == MULTI or len(numbers) > MOST_CLASSES:
        return []
    return [draw_confusion(targets.names, answers, labels, folder / "confusion_matrix.png")]


def draw_confusion(names: list[str], answers: np.ndarray, labels: np.ndarray, path: Path) -> Path:
    """Draw how often each class was taken for each other one."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix

    size = 2.5 + 0.5 * len(names)
    axes = (figure := Figure(figsize=(size + 1, size), layout="constrained")).add_subplot()
    matrix = confusion_matrix(labels, answers, labels=range(len(names)))
    display = ConfusionMatrixDisplay(matrix, display_labels=names)
    display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation="vertical" if len(names) > 4 else "horizontal")
    figure.savefig(path, dpi=150)
    return path


def write_predictions(
    targets: Targets, logits: np.ndarray, texts: Sequence[str], path: Path, kind: str = "text"
) -> None:
    """Write a csv file with a row for each text: the text, the prediction, and its probability.

    `kind` is the header of the first column, such as image where paths stand in it.

    Several classes of a row are joined by |. Numbers have a column each, and no probability.
    """
    answers, names = decide(targets.problem, logits), targets.names
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if targets.problem == NUMBERS:
            writer.writerow([kind, *names])
            writer.writerows([text, *row] for text, row in zip(texts, answers.reshape(len(texts), -1), strict=True))
        elif targets.problem == SINGLE:
            exponents = np.exp(logits - logits.max(-1, keepdims=True))
            sure = exponents.max(-1) / exponents.sum(-1)
            writer.writerow([kind, "prediction", "probability"])
            writer.writerows(
                [text, names[answer], f"{p:.4f}"] for text, answer, p in zip(texts, answers, sure, strict=True)
            )
        else:
            writer.writerow([kind, "prediction"])
            chosen = ["|".join(name for name, there in zip(names, row, strict=True) if there) for row in answers]
            writer.writerows(zip(texts, chosen, strict=True))
    print(f"{len(texts):,} predictions are in {path}")
