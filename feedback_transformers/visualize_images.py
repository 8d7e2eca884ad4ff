"""Draw what a model makes of an image at each feedback step: boxes that it refines, an image that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from textwrap import fill
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .visualize import _finish, _several

LETTERS = 28  # of a line of text below an image


@torch.no_grad()
def boxes_over_steps(
    model: Any, processor: Any, image: Any, path: str | PathLike[str] | None = None, threshold: float = 0.5
) -> Figure:
    """Draw the objects that a detector finds after each feedback step, a picture each.

    Args:
        image: a PIL image.
        threshold: the least score of an object that is drawn.
    """
    pixels = processor(image, do_pad=False, return_tensors="pt")["pixel_values"].to(model.device)
    outputs = model.eval()(pixels, output_feedback_states=True)
    steps = list(zip(model.step_logits(outputs), model.step_boxes(outputs), strict=True))
    figure, (axes,) = _row(len(steps))
    for number, (axis, (logits, boxes)) in enumerate(zip(axes, steps, strict=True), start=1):
        _show(axis, image, f"step {number}")
        outputs.logits, outputs.pred_boxes = logits, boxes
        (found,) = processor.post_process_object_detection(outputs, threshold, [image.size[::-1]])
        for score, label, (left, top, right, bottom) in zip(
            *(found[key].tolist() for key in ("scores", "labels", "boxes")), strict=True
        ):
            frame = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color="tab:orange")
            axis.add_patch(frame)
            name = f"{model.config.id2label[label]} {score:.0%}"
            axis.text(left, top - 1, name, color="tab:orange", fontsize=7, va="bottom")
    return _finish(figure, path)


@torch.no_grad()
def images_over_steps(
    model: Any, pixels: torch.Tensor, target: torch.Tensor | None = None, path: str | PathLike[str] | None = None
) -> Figure:
    """Draw what an image-to-image model is given, its image after each feedback step, and the wanted one if known.

    Args:
        pixels: [C, H, W] from 0 to 1.
        target: [C, s H, s W] from 0 to 1.
    """
    outputs = model.eval()(pixels[None].to(model.device), output_feedback_states=True)
    made = [step[0] for step in model.step_logits(outputs)]
    shown = [("given", pixels), *((f"step {number}", step) for number, step in enumerate(made, start=1))]
    shown += [] if target is None else [("wanted", target)]
    figure, (axes,) = _row(len(shown))
    for axis, (name, picture) in zip(axes, shown, strict=True):
        array = np.asarray(picture.detach().cpu().clamp(0, 1).movedim(0, -1))
        _show(axis, array[..., 0] if array.shape[-1] == 1 else array, name)
    return _finish(figure, path)


@torch.no_grad()
def captions_over_steps(
    model: Any,
    processor: Any,
    images: Sequence[Any],
    path: str | PathLike[str] | None = None,
    questions: Sequence[str] | None = None,
    num_feedback_steps: int | None = None,
) -> Figure:
    """Draw images side by side, and under each the texts that a model writes about it with 1 to K feedback steps.

    Args:
        processor: has an `image_processor` and a `tokenizer`.
        images: PIL images.
        questions: what each text begins with, shown above its image.
        num_feedback_steps: K, that of the config by default.

    Raises:
        ValueError: for a model that goes position by position, and makes no passes.
    """
    config, tokenizer = model.config, processor.tokenizer
    if not config.in_passes:
        _several(None)
    own = config.num_feedback_steps if config.feedback_axis == "depth" else config.solver_steps
    figure, (axes,) = _row(len(images), 3.2)
    for number, (axis, image) in enumerate(zip(axes, images, strict=True)):
        question = "" if questions is None else questions[number]
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        begun = [config.decoder_start_token_id, *tokenizer(question)["input_ids"]]
        given = {"pixel_values": pixels, "decoder_input_ids": torch.tensor([begun])}
        given, lines = {name: tensor.to(model.device) for name, tensor in given.items()}, []
        for step in range(1, (num_feedback_steps or own) + 1):
            ids = model.eval().generate(**given, num_feedback_steps=step)[0, len(begun) :]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            text = "".join(sign if sign.isprintable() else "□" for sign in text)
            lines.append(fill(f"{step}: {text}", LETTERS, subsequent_indent="   "))
        _show(axis, image, fill(question, LETTERS).replace("$", r"\$"))
        below = "\n".join(lines).replace("$", r"\$")  # which would begin a formula
        axis.annotate(below, (0, 0), (0, -6), "axes fraction", "offset points", va="top", fontsize=8)
    return _finish(figure, path)


def _row(count: int, height: float = 2.5) -> tuple[Any, Any]:
    """Return a figure and its axes [1, count], side by side."""
    figure = Figure(figsize=(2.2 * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)


def _show(axis: Any, image: Any, title: str) -> None:
    axis.imshow(image, cmap="gray")
    axis.set_title(title, fontsize=9)
    axis.axis("off")
