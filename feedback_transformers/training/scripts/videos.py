"""Read videos of one's own: GIFs, of which frames are evenly sampled, and arrays of frames.

Shapes: F frames, H height, W width, C channels.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .images import Look, eight_bits, image_paths, readable

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

FILES = ("Image", "Value")  # features of columns of files: what a folder of GIFs has, and paths in a table


def sampled(frames: int, count: int) -> list[int]:
    """Return the places of `count` evenly sampled frames, the first and the last among them; few are repeated."""
    return np.linspace(0, frames - 1, count).round().astype(int).tolist()


def frames_of(value: Any, count: int) -> np.ndarray:
    """Return `count` evenly sampled frames, uint8 [F, H, W, C].

    Args:
        value: an array [F, H, W] or [F, H, W, 3], or a list of images; or a GIF, `bytes` or the `path` of its file.

    Raises:
        ValueError, OSError: there are fewer than two frames, or they can't be read.
    """
    from PIL import Image

    if not isinstance(value, dict):
        array = np.stack([np.asarray(frame, dtype=np.uint8) for frame in value])
        several(len(array))
        array = array[sampled(len(array), count)]
        return array if array.ndim == 4 else array[..., None]
    read = value["bytes"] or Path(value["path"]).read_bytes()
    with Image.open(BytesIO(read)) as video:
        if video.format == "GIF" and not read.rstrip(b"\0").endswith(b";"):  # Pillow may read what is left
            raise ValueError("its end is missing")
        there = getattr(video, "n_frames", 1)
        several(there)
        made = []
        for place in sampled(there, count):
            video.seek(place)
            made.append(np.asarray(eight_bits(video)))
        return np.stack(made)


def several(frames: int) -> None:
    """Raise ValueError for fewer than two frames."""
    if frames < 2:
        raise ValueError(f"it has {frames} frame{'s' * (frames != 1)}; a video has at least two")


def look_at(value: Any) -> Look:
    """Decode every frame of a video, and return what it is; it is grey if no frame has colours."""
    if value is None:
        return Look(fault="there is no video")
    try:
        frames = frames_of(value, 2)
        if isinstance(value, dict):  # the last frame is made of those before it, so all were decoded
            frames = frames[[0, -1]]
    except Exception as error:  # of many kinds, by how a file is damaged
        return Look(fault=str(error).partition("\n")[0] or type(error).__name__)
    return Look(frames.shape[2], frames.shape[1], grey=bool((frames == frames[..., :1]).all()))


def readable_videos(
    dataset: DatasetDict, column: str, folders: dict[str, str], skip: bool
) -> tuple[DatasetDict, list[Look]]:
    """Return the data set without the videos that can't be read, and what the others are, as `readable` of images.

    Raises:
        ValueError: the column holds neither GIFs, nor their paths, nor arrays; or some can't be read, and `skip` is
            False; or none can.
    """
    from datasets import Image, List

    feature = next(iter(dataset.values())).features[column]
    if type(feature).__name__ in FILES:
        return readable(dataset, column, folders, skip, look_at, "videos")
    images = isinstance(feature, List) and isinstance(feature.feature, Image)
    if not images and not type(feature).__name__.startswith("Array"):
        raise ValueError(
            f"The column {column!r} holds {type(feature).__name__}: give GIFs, their paths, lists of images, or "
            "arrays of uint8 with the shape [frames, height, width]."
        )
    looks = []
    for split, rows in dataset.items():
        looks.append(look_at(rows[0][column]))  # all have one shape
        if looks[-1].fault:
            raise ValueError(f"The {split} data has no videos: {looks[-1].fault}.")
    return dataset, looks


def undecoded(rows: Dataset, column: str) -> Dataset:
    """Return rows whose videos are read as files, and not as pictures."""
    from datasets import Image

    return rows.cast_column(column, Image(decode=False)) if isinstance(rows.features[column], Image) else rows


def pixels(processor: Any, videos: list[Any], count: int) -> Tensor:
    """Return `count` frames of each video as a model reads them, [B, F, C, H, W]."""
    made = []
    for video in videos:
        frames = frames_of(video, count)
        given = {"input_data_format": "channels_last", "do_convert_rgb": frames.shape[-1] == 3}
        made.append(processor(list(frames), return_tensors="pt", **given)["pixel_values"])
    return torch.stack(made)


def video_paths(rows: Dataset, column: str) -> list[str]:
    """Return the path of each video, or "row 3" where it has none."""
    if type(rows.features[column]).__name__ in FILES:
        return image_paths(rows, column)
    return [f"row {row}" for row in range(len(rows))]
