"""Make pairs of images for image-to-image models: the one that is given, and the real one that is wanted of it.

Pixels are numbers from 0 to 1. Shapes: C channels, H height, W width, s upscale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .images import SHOWN, eight_bits
from .objects import padded

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

TASKS = ("super-resolution", "denoising", "inpainting")
UPSCALES = (2, 4)
LEAST_ERROR = 1e-10  # an image without any error counts as 100 dB
AREA = 32 * 32  # pixels for each hole
SIDES = (4, 12)  # the smallest and the largest side of a hole, in pixels
GREY = 0.5


@dataclass
class Pairs:
    """Make the given image of a real one: a smaller one, one with noise, or one with holes.

    Args:
        task: one of TASKS.
        upscale: how many times as large as the given image the real one is, on each side.
        noise: the standard deviation of the noise, in 8-bit steps.
        channels: 1 for grey, 3 for colours.
    """

    task: str
    upscale: int = 1
    noise: float = 0.0
    channels: int = 3

    def __str__(self) -> str:
        told = {
            "super-resolution": f", {self.upscale} times as large a side",
            "denoising": f", noise of {self.noise:g} 8-bit steps",
        }
        return self.task + told.get(self.task, "")

    def pixels(self, image: Picture) -> Tensor:
        """Return a PIL image of any mode as [C, H, W]."""
        array = np.array(eight_bits(image).convert("L" if self.channels == 1 else "RGB"), dtype=np.float32)
        return torch.from_numpy(array.reshape(*array.shape[:2], self.channels)).permute(2, 0, 1) / 255

    def pair(self, image: Picture, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Return `pixel_values` [C, H, W], the given image, and `labels` [C, s H, s W], the real one."""
        image = eight_bits(image)
        real = self.pixels(image)
        if self.task == "super-resolution":
            from PIL.Image import Resampling

            width, height = image.size
            small = image.resize((width // self.upscale, height // self.upscale), Resampling.BICUBIC)
            return {"pixel_values": self.pixels(small), "labels": real}
        if self.task == "denoising":
            noise = torch.randn(real.shape, generator=generator)
            return {"pixel_values": (real + self.noise / 255 * noise).clamp(0, 1), "labels": real}
        return {"pixel_values": with_holes(real, generator), "labels": real}

    def baseline(self, given: Tensor) -> Tensor:
        """Return what is made without a model: the bicubic enlargement of [C, H, W], or the given image itself."""
        if self.upscale == 1:
            return given
        return F.interpolate(given[None], scale_factor=self.upscale, mode="bicubic", align_corners=False)[0]


def maker(task: str, upscale: int | None = None, noise: float | None = None, trained: int | None = None) -> Pairs:
    """Return what makes the pairs of a task; an upscale of 2 and a noise of 25 unless told otherwise.

    Args:
        trained: the upscale of the checkpoint that is used, which is the default then.

    Raises:
        ValueError: the task is unknown, does not read one of the numbers, or is not one of the checkpoint.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}: choose one of {', '.join(TASKS)}.")
    if upscale is not None and task != "super-resolution":
        raise ValueError(f"--upscale is of super-resolution: leave it out with --task {task}.")
    if noise is not None and task != "denoising":
        raise ValueError(f"--noise is of denoising: leave it out with --task {task}.")
    if upscale not in (None, *UPSCALES):
        raise ValueError(f"--upscale is {upscale}: give {' or '.join(map(str, UPSCALES))}.")
    if noise is not None and not 0 < noise <= 255:
        raise ValueError(f"--noise is {noise:g}: give a number above 0, at most 255.")
    larger = 1
    if task == "super-resolution":
        larger = upscale or (trained if trained in UPSCALES else UPSCALES[0])
    if trained not in (None, larger):
        raise ValueError(
            f"The upscale of the checkpoint is {trained} and that of the task is {larger}: give another --task or "
            "--upscale."
        )
    return Pairs(task, larger, 25.0 if noise is None else noise)


def with_holes(image: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return the image [C, H, W] with grey rectangles, one for each AREA of it."""

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, max(low, high) + 1, (), generator=generator))

    image, (height, width) = image.clone(), image.shape[-2:]
    for _ in range(max(1, height * width // AREA)):
        tall, wide = drawn(*SIDES), drawn(*SIDES)
        top, left = drawn(0, height - tall), drawn(0, width - wide)
        image[:, top : top + tall, left : left + wide] = GREY
    return image


def random_crop(image: Picture, side: int) -> Picture:
    """Return a square of an image from a random place, perhaps mirrored and upside down."""
    from PIL.Image import Transpose

    left, top = (int(torch.randint(size - side + 1, ())) for size in image.size)
    image = image.crop((left, top, left + side, top + side))
    for flip in (Transpose.FLIP_LEFT_RIGHT, Transpose.FLIP_TOP_BOTTOM):
        image = image.transpose(flip) if torch.rand(()) < 0.5 else image
    return image


def center(image: Picture, most: int, multiple: int = 1) -> Picture:
    """Return the center of an image: at most so many pixels a side, and a multiple of `multiple` of them."""
    width, height = (min(size, most) // multiple * multiple for size in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def large_enough(sizes: list[tuple[int, int]], names: list[str], least: int, skip: bool) -> list[int]:
    """Return the numbers of the images whose sides have at least so many pixels.

    Args:
        sizes: width and height of each image.
        names: what an error calls them.
        skip: leave the others out and print their number, instead of an error.

    Raises:
        ValueError: some are smaller and `skip` is False, or all are.
    """
    small = [row for row, size in enumerate(sizes) if min(size) < least]
    if not small:
        return list(range(len(sizes)))
    shown = [f"{names[row]}: {sizes[row][0]} x {sizes[row][1]}" for row in small[:SHOWN]]
    which = f"{len(small):,} of {len(sizes):,} images are smaller than {least} x {least} pixels ({'; '.join(shown)})"
    if len(small) == len(sizes):
        raise ValueError(f"{which}: give larger ones, or a smaller --crop.")
    if not skip:
        raise ValueError(f"{which}: give larger ones or a smaller --crop, or leave them out with --skip_small_images.")
    print(f"Left out {which}")
    return sorted(set(range(len(sizes))) - set(small))


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return a padded batch of pairs: `pixel_values`, `pixel_mask` and `labels`."""
    pixels, mask = padded([row["pixel_values"] for row in rows])
    labels, _ = padded([row["labels"] for row in rows])
    return {"pixel_values": pixels, "pixel_mask": mask, "labels": labels}


def psnr(made: Tensor, real: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of an image [C, H, W] that was made, cut to pixels from 0 to 1."""
    error = (made.clamp(0, 1) - real).square().mean().clamp(min=LEAST_ERROR)
    return 10 * torch.log10(1 / error).item()


def mean_psnr(predictions: Any, references: Any, pairs: Pairs) -> dict[str, float]:
    """Return `psnr` of the images that a model made and that of the baseline, each a mean over the images.

    Args:
        predictions: of each batch, images [B, C, s H, s W].
        references: of each batch, the real images, the mask of the given ones, and the given ones.
    """
    found, without = list[float](), list[float]()
    for outputs, (labels, mask, given) in zip(predictions, references, strict=True):
        made = outputs[0] if isinstance(outputs, tuple) else outputs  # the number of passes made may follow
        for one, real, rows, start in zip(*map(torch.as_tensor, (made, labels, mask, given)), strict=True):
            height, width = int(rows.any(1).sum()), int(rows.any(0).sum())
            cut = (slice(None), slice(pairs.upscale * height), slice(pairs.upscale * width))
            found.append(psnr(one[cut].float(), real[cut]))
            without.append(psnr(pairs.baseline(start[:, :height, :width]), real[cut]))
    name = "psnr_bicubic" if pairs.upscale > 1 else "psnr_given"
    return {"psnr": float(np.mean(found)), name: float(np.mean(without))}


def pixel_processor(checkpoint: str | None = None, **options: Any) -> Any:
    """Return the image processor of a checkpoint, or a new one: colours from 0 to 1 in the size of the image."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    if checkpoint is not None:
        try:
            return ViTImageProcessorPil.from_pretrained(checkpoint, **options)
        except OSError:  # it was saved without one
            pass
    return ViTImageProcessorPil(do_resize=False, do_normalize=False, do_convert_rgb=True)
