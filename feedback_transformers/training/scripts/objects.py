"""Read the objects of images: their boxes and classes, as a column `objects` in the layout of COCO has them."""

from __future__ import annotations

from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .images import eight_bits

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SHOWN = 5  # rows that an error names


def numbered_names(dataset: DatasetDict, column: str, key: str) -> list[str] | None:
    """Return the names of the classes by their numbers, or None where the data names each object's class itself."""
    feature = next(iter(dataset.values())).features[column]
    kind = feature[key] if isinstance(feature, dict) else feature.feature[key]
    kind = getattr(kind, "feature", kind)
    return list(kind.names) if hasattr(kind, "names") else None


def class_names(dataset: DatasetDict, column: str, key: str) -> list[str]:
    """Return the names of the classes of `objects`, sorted where the data does not number them."""
    if (names := numbered_names(dataset, column, key)) is not None:
        return names
    found = {name for rows in dataset.values() for objects in rows[column] for name in objects[key]}
    return [str(name) for name in sorted(found)]


def category_key(dataset: DatasetDict, column: str) -> str:
    """Return what `objects` calls the classes; raise ValueError where it is not in the layout of COCO."""
    rows = next(iter(dataset.values()))
    objects = rows[0][column]
    key = next((name for name in ("category", "categories") if name in objects), None)
    if key is None or "bbox" not in objects:
        raise ValueError(
            f"The column {column!r} has {', '.join(objects)}: give bbox, a list of [left, top, width, height] in "
            "pixels, and category, the class of each."
        )
    return key


@dataclass
class Boxes:
    """Turn the objects of a data set into the annotations that image processors take, cut at the edges of the images.

    Raises ValueError for boxes without an area, or outside of their image, unless `drop` leaves them out.
    """

    names: list[str]
    column: str
    key: str
    drop: bool = False
    numbered: list[str] | None = None  # names of the classes that the data numbers; None where it names them itself
    cut: int = 0
    dropped: list[str] = field(default_factory=list)

    def check(self, rows: Dataset, split: str) -> list[list[dict[str, Any]]]:
        """Return the annotations of each image of a split."""
        made = []
        for number, (image, objects) in enumerate(zip(rows["image"], rows[self.column], strict=True)):
            made.append(self.annotations(image.size, objects, f"row {number} of the {split} data"))
        if self.dropped and not self.drop:
            raise ValueError(
                f"{len(self.dropped):,} boxes have no area in their image ({'; '.join(self.dropped[:SHOWN])}): mend "
                "them, or leave them out with --drop_bad_boxes."
            )
        return made

    def annotations(self, size: tuple[int, int], objects: dict[str, list], where: str) -> list[dict[str, Any]]:
        """Return the annotations of one image of a size, width and height."""
        found = []
        for (x, y, wide, high), name in zip(objects["bbox"], objects[self.key], strict=True):
            left, top = max(0.0, x), max(0.0, y)
            right, bottom = min(size[0], x + wide), min(size[1], y + high)
            if right <= left or bottom <= top:
                self.dropped.append(f"{where}: {x:g}, {y:g}, {wide:g} x {high:g}")
                continue
            self.cut += (left, top, right, bottom) != (x, y, x + wide, y + high)
            told = str(name) if self.numbered is None else self.numbered[name]
            if told not in self.names:
                raise ValueError(f"{where} has the class {told!r}; the model knows {', '.join(self.names)}.")
            number = self.names.index(told)
            box = [left, top, right - left, bottom - top]
            found.append({"bbox": box, "category_id": number, "area": box[2] * box[3], "iscrowd": 0})
        return found


def padded(images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return images [C, H, W] of several sizes as one batch [B, C, H, W], and the mask [B, H, W] of real pixels."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.long)
    for row, image in enumerate(images):
        batch[row, :, : image.shape[1], : image.shape[2]] = image
        mask[row, : image.shape[1], : image.shape[2]] = 1
    return batch, mask


def detection_processor(checkpoint: str | None = None, longest: int | None = None, **options: Any) -> Any:
    """Return the image processor of a checkpoint, or a new one, which keeps the size of images up to `longest`."""
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    if checkpoint is not None:
        try:
            return DetrImageProcessorPil.from_pretrained(checkpoint, **options)
        except OSError:  # it was saved without one
            pass
    size = {"longest_edge": longest, "shortest_edge": longest} if longest else None
    return DetrImageProcessorPil(do_resize=longest is not None, size=size, image_mean=0.5, image_std=0.5)


def encode(processor: Any, images: list[Any], annotations: list[list[dict[str, Any]]] | None) -> dict[str, list[Any]]:
    """Return `pixel_values` [3, H, W] and, of annotated images, `labels` of each."""
    made: dict[str, list[Any]] = {"pixel_values": [], "labels": []}
    for row, image in enumerate(images):
        given = None if annotations is None else {"image_id": row, "annotations": annotations[row]}
        encoded = processor(eight_bits(image), annotations=given, do_pad=False, return_tensors="pt")
        made["pixel_values"].append(encoded["pixel_values"][0])
        if given is not None:
            labels = encoded["labels"][0]
            made["labels"].append({"class_labels": labels["class_labels"], "boxes": labels["boxes"]})
    return made if annotations is not None else {"pixel_values": made["pixel_values"]}


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a padded batch of encoded images."""
    pixels, mask = padded([row["pixel_values"] for row in rows])
    batch: dict[str, Any] = {"pixel_values": pixels, "pixel_mask": mask}
    if "labels" in rows[0]:
        batch["labels"] = [row["labels"] for row in rows]
    return batch


def average_precision(predictions: Any, references: Any) -> dict[str, float]:
    """Return the mean average precision of COCO, `map` (IoU 0.5 to 0.95) and `map_50`, by pycocotools.

    It counts the 100 surest objects of an image. Sizes are shares of the image, so there are no small or large ones.

    Args:
        predictions: of each batch, class logits [B, T, L + 1] and boxes [B, T, 4].
        references: of each batch, a list with `class_labels` and `boxes` of each image.
    """
    import numpy as np
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found, known, number, classes = list[list[float]](), list[dict[str, Any]](), 0, 0
    for (logits, boxes), objects in zip(predictions, references, strict=True):
        scores, kinds = torch.as_tensor(logits).float().softmax(-1)[..., :-1].max(-1)
        classes = logits.shape[-1] - 1
        for row, each in enumerate(objects):
            surest = scores[row].topk(min(100, scores.shape[1])).indices
            corners = corner(torch.as_tensor(boxes)[row, surest]).tolist()
            rows = zip(corners, scores[row, surest].tolist(), kinds[row, surest].tolist(), strict=True)
            found += [[number, *box, score, kind] for box, score, kind in rows]
            real = zip(corner(torch.as_tensor(each["boxes"])).tolist(), each["class_labels"].tolist(), strict=True)
            known += [{"image_id": number, "bbox": box, "category_id": int(kind)} for box, kind in real]
            number += 1
    with redirect_stdout(StringIO()):  # it prints a table
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(number)],
            "categories": [{"id": kind} for kind in range(classes)],
            "annotations": [
                {**each, "id": k, "iscrowd": 0, "area": each["bbox"][2] * each["bbox"][3]}
                for k, each in enumerate(known, start=1)
            ],
        }
        truth.createIndex()
        measured = COCOeval(truth, truth.loadRes(np.array(found)), "bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return {"map": float(measured.stats[0]), "map_50": float(measured.stats[1])}


def corner(boxes: Tensor) -> Tensor:
    """Return boxes [N, 4] of center, width and height as those of left, top, width and height, in thousandths."""
    return 1000 * torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], dim=1).double()
