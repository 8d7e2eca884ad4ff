"""The inputs of images and of videos.

Shapes: B batch, C channels, F frames, H height, W width, T cells, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .feedback_inputs import Embedded, Fields, GridInput, at_least_one, one_of

BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue, as ITU-R BT.601 and Pillow's grey have it


@dataclass(kw_only=True)
class ImageFields(Fields):
    """Fields of an input of images.

    Args:
        patch_size: height and width of a patch in pixels, a position each.
        num_channels: channels of an image; a model of 1 reads the brightness of colours.
        positions: what is added of a patch's place: `"grid"`, a learned map of waves over rows and columns, for images
            of any size; or `"none"`.
    """

    type: str = "images"
    patch_size: int = 4
    num_channels: int = 3
    positions: str = "grid"

    def check(self) -> None:
        at_least_one(self, "patch_size", "num_channels")
        one_of(self, "positions", ("grid", "none"))


@dataclass(kw_only=True)
class VideoFields(ImageFields):
    """Fields of an input of videos: those of images, and one more.

    Args:
        tubelet_size: frames of a position.
    """

    type: str = "videos"
    tubelet_size: int = 2

    def check(self) -> None:
        super().check()
        at_least_one(self, "tubelet_size")


class ImageInput(GridInput):
    """Map images [B, C, H, W] of any size to [B, T, D], a position per patch, row by row.

    A grey model (one channel) reads the brightness of colours [B, 3, H, W]: transformers' pipelines open every image
    file in colour.
    """

    Fields = ImageFields
    takes = ("pixel_values", "pixel_mask")
    axes = 2

    def __init__(self, config: Any, fields: ImageFields) -> None:
        super().__init__(config, fields, fields.num_channels, (fields.patch_size,) * 2)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Embedded:
        """Cut pixel_values [B, C, H, W], of which pixel_mask [B, H, W] tells the real pixels of a padded batch."""
        return self.cut(self.coloured(pixel_values, 1), pixel_mask)

    def coloured(self, pixels: Tensor, axis: int) -> Tensor:
        """Return pixels with this model's channels on `axis`; raise ValueError for other numbers or shapes of them."""
        pixels, count = pixels.to(self.projection.weight.dtype), self.channels
        if count == 1 and pixels.ndim == self.axes + 2 and pixels.shape[axis] == 3:
            shape = [3 if number == axis else 1 for number in range(pixels.ndim)]
            pixels = (pixels.new_tensor(BRIGHTNESS).view(shape) * pixels).sum(dim=axis, keepdim=True)
        if pixels.ndim != self.axes + 2 or pixels.shape[axis] != count:
            form = "[batch, channels, height, width]"
            form = form if self.axes == 2 else "[batch, frames, channels, height, width]"
            raise ValueError(
                f"pixel_values have the shape {[*pixels.shape]}; this model takes {form} with {count} channels."
            )
        return pixels


class VideoInput(ImageInput):
    """Map videos [B, F, C, H, W] to [B, T, D], a position per patch of `tubelet_size` frames, frame by frame."""

    Fields = VideoFields
    axes = 3

    def __init__(self, config: Any, fields: VideoFields) -> None:
        boxes = (fields.tubelet_size, fields.patch_size, fields.patch_size)
        GridInput.__init__(self, config, fields, fields.num_channels, boxes)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Embedded:
        """Cut pixel_values [B, F, C, H, W], of which pixel_mask [B, F, H, W] tells the real pixels."""
        return self.cut(self.coloured(pixel_values, 2).transpose(1, 2), pixel_mask)
