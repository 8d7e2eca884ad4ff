"""Read images of one's own: find their classes and splits, the files that are damaged, their sizes and channels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from PIL.Image import Image as Picture

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # the label of each file in one table
SHOWN = 5  # files that an error names
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")  # the modes of PIL with 16 bits a pixel
GREY = ("1", "L", "LA", "La", *DEEP)
LARGEST = 128  # pixels a side that photographs are reduced to, without --image_size
PATCHES = 7  # the fewest a side


def image_splits(files: dict[str, str]) -> dict[str, str]:
    """Return the folder of each split: those given, and the `validation` and `test` folders that lie beside `train`.

    A train folder that holds the folders of splits stands for these: photos/train, photos/validation, photos/test.
    """
    root = Path(files.get("train", ""))
    if "train" not in files or not root.is_dir():
        return files
    inside = {split: folder for split in SPLITS if (folder := _named(root, SPLITS[split]))}
    if "train" in inside and len(inside) == len(_folders(root)):
        beside = inside
    elif root.name.lower() in SPLITS["train"]:
        beside = {split: folder for split in ("validation", "test") if (folder := _named(root.parent, SPLITS[split]))}
    else:
        return files
    found = {split: str(path) for split, path in beside.items() if split not in files or split == "train"}
    return {**files, **found}


def _named(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((inside for inside in _folders(folder) if inside.name.lower() in names), None)


def _folders(folder: Path) -> list[Path]:
    hidden = (".", "__MACOSX")
    return sorted(inside for inside in folder.iterdir() if inside.is_dir() and not inside.name.startswith(hidden))


def _files(folder: Path, deep: bool = True) -> list[Path]:
    inside = folder.rglob("*") if deep else folder.iterdir()
    return sorted(file for file in inside if file.is_file() and not file.name.startswith("."))


def read_images(folder: str, unlabelled: bool = False) -> Dataset:
    """Read a folder that holds a folder of images for each class; return the columns `image` and `label`.

    Args:
        unlabelled: accept images without class folders too, as data to predict; they have no column `label`.

    Raises:
        ValueError: there are no class folders, a class folder is empty, or images lie outside of them.
    """
    from datasets import ClassLabel, Dataset, Features, Image, load_dataset

    root = Path(folder)
    if any((root / name).exists() for name in METADATA):
        return load_dataset("imagefolder", data_dir=folder, split="train")
    loose, classes = _images(_files(root, deep=False)), _folders(root)
    if unlabelled and loose and not classes:
        return Dataset.from_dict({"image": list(map(str, loose))}, Features(image=Image()))
    example = f"such as {root / 'cat'} and {root / 'dog'}"
    if not classes:
        what = f"{len(loose):,} images and no folders" if loose else "no images"
        raise ValueError(f"{folder} holds {what}: put the images of each class in a folder of its own, {example}.")
    if loose:
        raise ValueError(
            f"{len(loose):,} images lie in {folder} itself, the first {loose[0].name}: move them into the folder of "
            "their class."
        )
    paths, labels, others = list[str](), list[int](), Counter[str]()
    for number, inside in enumerate(classes):
        files = _files(inside)
        images = _images(files)
        if not images:
            there = f"{len(files):,} files of other kinds ({_endings(files)})" if files else "no files"
            raise ValueError(f"The class folder {inside} holds no images, but {there}: fill it or delete it.")
        others.update(file.suffix.lower() for file in set(files) - set(images))
        paths += map(str, images)
        labels += [number] * len(images)
    _print_left_out(folder, others)
    features = Features(image=Image(), label=ClassLabel(names=[inside.name for inside in classes]))
    return Dataset.from_dict({"image": paths, "label": labels}, features)


def read_plain_images(folder: str) -> Dataset:
    """Read all images of a folder, and of the folders in it, whatever those mean; return the column `image`.

    Raises:
        ValueError: there are none.
    """
    from datasets import Dataset, Features, Image

    files = _files(Path(folder))
    images = _images(files)
    if not images:
        there = f"but {len(files):,} files of other kinds ({_endings(files)})" if files else "and no other files"
        raise ValueError(f"{folder} holds no images that Pillow reads, {there}: give a folder of images.")
    _print_left_out(folder, Counter(file.suffix.lower() for file in set(files) - set(images)))
    return Dataset.from_dict({"image": list(map(str, images))}, Features(image=Image()))


def _print_left_out(folder: str, others: Counter[str]) -> None:
    """Print how many files are no images, by their endings."""
    if others:
        kinds = ", ".join(f"{ending or 'no ending'}: {number:,}" for ending, number in others.most_common(SHOWN))
        print(f"Left out {others.total():,} files of {folder} that are no images that Pillow reads ({kinds})")


def _images(files: list[Path]) -> list[Path]:
    """Return the files whose endings are those of images."""
    from PIL import Image

    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return [file for file in files if file.suffix.lower() in endings]


def _endings(files: list[Path]) -> str:
    return ", ".join(sorted({file.suffix.lower() or "no ending" for file in files})[:SHOWN])


@dataclass
class Look:
    """What one image is: its sizes in pixels, whether it is grey, and its bits a channel; or why it can't be read."""

    width: int = 0
    height: int = 0
    grey: bool = False
    deep: bool = False
    fault: str | None = None


def look_at(value: Any) -> Look:
    """Decode an image as a whole, since the end of a file may be missing, and return what it is."""
    from datasets import Image
    from PIL.Image import DecompressionBombError

    if value is None:
        return Look(fault="there is no image")
    try:
        if value["bytes"] is None and os.path.isfile(value["path"] or ""):  # Pillow leaves a damaged file open
            value = {**value, "bytes": Path(value["path"]).read_bytes()}
        image = Image().decode_example(value)
        eight_bits(image)
    except (OSError, ValueError, SyntaxError, RuntimeError, EOFError, DecompressionBombError) as error:
        return Look(fault=str(error).partition("\n")[0] or type(error).__name__)
    width, height = image.size
    return Look(width, height, image.mode in GREY, image.mode in DEEP)


def eight_bits(image: Picture) -> Picture:
    """Return a PIL image of any mode in the mode "RGB".

    Transparency is dropped, as in the pipelines of transformers. 16 bits are scaled to 8, where Pillow's own `convert`
    cuts everything above 255.

    Raises:
        ValueError: the pixels are floating-point numbers, whose range a file does not tell.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of an unknown range; 8 or 16 bits can be read")
    if image.mode in DEEP:
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    return (image.convert("RGBA") if image.mode in ("P", "PA") else image).convert("RGB")


def readable(
    dataset: DatasetDict,
    column: str,
    folders: dict[str, str],
    skip: bool,
    look: Callable[[Any], Look] = look_at,
    things: str = "images",
) -> tuple[DatasetDict, list[Look]]:
    """Return the data set without the images that can't be read, and what the others are.

    Args:
        column: the images, or the paths of their files, relative to the folder of the table that names them.
        folders: what each split was read from.
        skip: leave damaged images out and print their number, instead of an error.
        look: tells what one of them is.
        things: what an error calls them.

    Raises:
        ValueError: the column holds something else; or some images can't be read, and `skip` is False; or none can.
    """
    from datasets import Image

    looks = list[Look]()
    faults = list[str]()
    for split, rows in dataset.items():
        kind = rows.features[column]
        if not isinstance(kind, Image):
            if getattr(kind, "dtype", None) not in ("string", "large_string"):
                raise ValueError(
                    f"The column {column!r} of the {split} data holds neither {things} nor paths of {things}: "
                    f"give --{things.rstrip('s')}_column."
                )
            table = Path(folders.get(split, folders.get("train", "")))
            paths = [None if path is None else str(table.parent / path) for path in rows[column]]
            rows = rows.add_column("paths of images", paths).remove_columns(column)
            rows = rows.rename_column("paths of images", column).cast_column(column, Image())
        values = rows.cast_column(column, Image(decode=False))[column]
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # Pillow decodes outside of Python's lock
            found = list(threads.map(look, values))
        for row, (value, seen) in enumerate(zip(values, found, strict=True)):
            if seen.fault:
                path = value and value["path"]
                faults.append(f"{path or f'row {row} of the {split} data'}: {seen.fault}")
        good = [row for row, look in enumerate(found) if not look.fault]
        if skip and not good:
            raise ValueError(
                f"None of the {len(found):,} {things} of the {split} data can be read ({_first(faults)})."
            )
        dataset[split] = rows if len(good) == len(rows) else rows.select(good)
        looks += [found[row] for row in good]
    if faults and not skip:
        number = f"{len(faults):,} of {len(faults) + len(looks):,} {things}"
        raise ValueError(
            f"{number} can't be read ({_first(faults)}): mend or delete them, or leave them out with "
            "--skip_corrupt_files."
        )
    if faults:
        print(f"Left out {len(faults):,} {things} that can't be read ({_first(faults)})")
    return dataset, looks


def _first(faults: list[str]) -> str:
    return "; ".join(faults[:SHOWN]) + ("; ..." if len(faults) > SHOWN else "")


def image_paths(rows: Dataset, column: str) -> list[str]:
    """Return the path of each image, or "row 3" where it has none."""
    from datasets import Image

    values = rows.cast_column(column, Image(decode=False))[column]
    return [value["path"] or f"row {row}" for row, value in enumerate(values)]


def image_processor(image_size: int, checkpoint: str | None = None, **options: Any) -> Any:
    """Return the image processor of a checkpoint, or a new one, which turns images of any mode to `image_size` pixels.

    A checkpoint's own keeps its size. `pixel_values` [B, 3, H, W] are colours, as in the pipelines of transformers; a
    grey model reads their brightness.
    """
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    if checkpoint is not None:
        try:
            found = ViTImageProcessorPil.from_pretrained(checkpoint, do_convert_rgb=True, **options)
        except OSError:  # it was saved without one
            pass
        else:
            for name in ("image_mean", "image_std"):
                value = getattr(found, name)
                if isinstance(value, list | tuple) and len(value) == 1:  # of a grey model of version 0.1.0
                    setattr(found, name, value[0])
            return found
    size = {"height": image_size, "width": image_size}
    return ViTImageProcessorPil(image_mean=0.5, image_std=0.5, size=size, do_convert_rgb=True)


def image_sizes(
    looks: list[Look], image_size: int | None = None, num_channels: int | None = None
) -> tuple[int, dict[str, Any]]:
    """Return the size of images in pixels and the `input_config` of a new model, read from the images unless given.

    The size is the middle one of their shorter sides, at most LARGEST. A patch is the largest power of two that
    leaves at least PATCHES of them a side. Images are grey if none has colours.
    """
    if num_channels is None:
        num_channels = 1 if all(look.grey for look in looks) else 3
    shorter = sorted(min(look.width, look.height) for look in looks)
    size = image_size or min(LARGEST, shorter[len(shorter) // 2])
    patch = 1
    while 2 * patch * PATCHES <= size:
        patch *= 2
    if image_size is None:
        size -= size % patch
    return size, {"type": "images", "patch_size": patch, "num_channels": num_channels}


def print_images(looks: list[Look], image_size: int, num_channels: int, things: str = "images") -> None:
    """Print what the images are, and as what the model reads them."""
    (low, high), (least, most) = _range(look.width for look in looks), _range(look.height for look in looks)
    sizes = f"{low} x {least}" if (low, least) == (high, most) else f"{low} x {least} to {high} x {most}"
    grey = sum(look.grey for look in looks)
    kinds = "grey" if grey == len(looks) else f"in colour, {grey:,} of them grey" if grey else "in colour"
    print(
        f"{len(looks):,} {things} of {sizes} pixels, {kinds}; the model reads them as {image_size} x {image_size}, "
        f"{'grey' if num_channels == 1 else 'in colour'} (--image_size, --num_channels)"
    )
    if deep := sum(look.deep for look in looks):
        print(
            f"{deep:,} images have 16 bits a pixel and are scaled to 8: do so with images for a pipeline too, which "
            "cuts everything above 255"
        )


def _range(values: Iterator[int]) -> tuple[int, int]:
    seen = list(values)
    return min(seen), max(seen)
