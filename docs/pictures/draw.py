"""Draws the pictures of the README and of the documentation: `python docs/pictures/draw.py`.

The prediction that sharpens over the passes is that of the model which docs/notebooks/what-feedback-does.md trains:
its Python cells are run here, which takes about a minute.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PICTURES = Path(__file__).parent
NOTEBOOK = PICTURES.parent / "notebooks" / "what-feedback-does.md"
BLUE, RED, GREY, INK = "#0b6e99", "#d1495b", "#e9eef2", "#22313f"


def run_notebook(path: Path) -> dict[str, Any]:
    """Run the Python cells of a notebook kept as Markdown, and return its variables."""
    variables: dict[str, Any] = {}
    for cell in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(cell, str(path), "exec"), variables)
    return variables


def box(axes: Axes, x: float, y: float, text: str, width: float = 1.5, color: str = GREY, height: float = 0.8) -> None:
    """Draw a rounded box with its centre at (x, y)."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02,rounding_size=0.12", facecolor=color
    )
    shape.set_edgecolor(INK)
    shape.set_linewidth(1.2)
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=11, color="white" if color == BLUE else INK)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, curve: float = 0
) -> None:
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 14}
    axes.annotate("", end, start, arrowprops={**style, "connectionstyle": f"arc3,rad={curve}"})


def blank(axes: Axes, width: float, height: float, bottom: float = 0) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(bottom, height)
    axes.set_aspect("equal")
    axes.axis("off")


def draw_loop(axes: Axes) -> None:
    """Encoder, connection, cell and decoder, and the feedback from one step to the next."""
    blank(axes, 10.4, 3.15)
    for x, name, letter in ((2.3, "encoder", ""), (4.6, "connection", "c"), (6.6, "cell", "f"), (8.6, "decoder", "g")):
        box(axes, x, 1.2, f"{name}\n{letter}".strip(), 1.45, "#fbe3e6" if name in ("connection", "cell") else GREY)
    axes.text(0.45, 1.2, "input", ha="center", va="center", fontsize=11, color=INK)
    axes.text(10.05, 1.2, "output", ha="center", va="center", fontsize=11, color=INK)
    for start, end, label in (
        (0.95, 1.55, ""),
        (3.05, 3.85, "e"),
        (5.35, 5.85, ""),
        (7.35, 7.85, ""),
        (9.35, 9.6, ""),
    ):
        arrow(axes, (start, 1.2), (end, 1.2))
        axes.text((start + end) / 2, 1.32, label, ha="center", va="bottom", fontsize=11, color=INK)
    axes.plot([7.6, 7.6, 4.6], [1.2, 2.6, 2.6], color=RED, linewidth=2.2, solid_capstyle="round")
    arrow(axes, (4.6, 2.6), (4.6, 1.64), RED)
    axes.text(7.6, 1.02, "h", ha="center", va="top", fontsize=11, color=INK)
    axes.text(6.1, 2.72, "feedback φ: what the last step found", ha="center", va="bottom", fontsize=11, color=RED)
    axes.text(5.6, 0.3, "runs several times with the same weights", ha="center", va="center", fontsize=10, color=RED)


def draw_passes(figure: Figure, axes: Axes, right: Any, bits: list[int]) -> None:
    """How sure a model is of the right answer: `right` [passes, positions]."""
    image = axes.imshow(right, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(bits)), [str(bit) for bit in bits], fontsize=8)
    axes.set_yticks(range(0, len(right), 3), [str(1 + i) for i in range(0, len(right), 3)])
    axes.set_xlabel("input: 32 bits (16 at most in training). Question: is the number of ones so far odd?", fontsize=9)
    axes.set_ylabel("pass")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, label="probability of the right answer")


def draw_axes(axes: Axes, kind: str) -> None:
    """Unroll a loop over four positions: `depth` in three passes, or `time`."""
    blank(axes, 9.2, 5.2, -0.9)
    words = ("the", "cat", "sat", "down")
    rows = 3 if kind == "depth" else 1
    for column, word in enumerate(words):
        x = 1.6 + 2 * column
        axes.text(x, -0.55, word, ha="center", fontsize=11, color=INK)
        for row in range(rows):
            y = (0.6 + 1.5 * row) if kind == "depth" else 1.8
            box(axes, x, y, "cell", 1.1, "#fbe3e6", 0.7)
            if row:
                arrow(axes, (x, y - 1.13), (x, y - 0.38), RED)
            elif kind == "depth":
                arrow(axes, (x, -0.25), (x, 0.22))
            else:
                arrow(axes, (x, -0.25), (x, 1.42))
            if kind == "time" and column < len(words) - 1:
                arrow(axes, (x + 0.58, y), (x + 1.42, y), RED)
        if kind == "time":
            arrow(axes, (x, 2.18), (x, 3.3))
    if kind == "depth":
        for row in range(rows):
            axes.text(0.1, 0.6 + 1.5 * row, f"pass {row + 1}", va="center", fontsize=10, color=RED)
        title = "depth: all positions are looked at again"
    else:
        axes.text(8, 3.4, "output", ha="center", fontsize=10, color=INK)
        title = "time: a position starts from the one before"
    axes.set_title(title, fontsize=12, color=INK)


def draw_solvers(axes: Axes, kind: str) -> None:
    """Number the cells of six positions in the order of their computation; equal numbers are computed together."""
    blank(axes, 7.4, 3.4, -0.6)
    shades = ("#d9ecf3", "#9ccbdd", "#4f9fbe")
    for column in range(6):
        x = 0.9 + 1.1 * column
        axes.text(x, -0.35, f"t={column + 1}", ha="center", fontsize=9, color=INK)
        for row in range(1 if kind == "sequential" else 3):
            order = {"sequential": column, "jacobi": row, "gauss_seidel": 2 * row + column // 3}[kind]
            box(axes, x, 0.5 + row, str(order + 1), 0.8, shades[row], 0.6)
    axes.set_title(f'solver="{kind}"', fontsize=11, color=INK, family="monospace")


def main() -> None:
    variables = run_notebook(NOTEBOOK)
    right, bits = variables["right"].numpy(), variables["bits"][0].tolist()

    figure = Figure(figsize=(9, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 1.15))
    draw_loop(top)
    draw_passes(figure, bottom, right, bits)
    figure.savefig(PICTURES / "feedback.png", dpi=110)

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    draw_loop(figure.subplots())
    figure.savefig(PICTURES / "loop.png", dpi=110)

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    draw_passes(figure, figure.subplots(), right, bits)
    figure.savefig(PICTURES / "passes.png", dpi=110)

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("depth", "time"), strict=True):
        draw_axes(axes, kind)
    figure.savefig(PICTURES / "axes.png", dpi=110)

    figure = Figure(figsize=(12, 2.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 3), ("sequential", "jacobi", "gauss_seidel"), strict=True):
        draw_solvers(axes, kind)
    figure.savefig(PICTURES / "solvers.png", dpi=110)


if __name__ == "__main__":
    main()
