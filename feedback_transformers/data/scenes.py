"""Make pictures and videos of real digits: several on one canvas, with their boxes, a caption, or a motion.

The digits are the images of MNIST-5k. Those of a split here are those of the same split there, so a digit of the test
is in no other picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from .images import mnist_5k

if TYPE_CHECKING:
    from datasets import DatasetDict

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNTS = {"train": 4000, "validation": 300, "test": 500}
SEEDS = {"train": 0, "validation": 1, "test": 2}
APART = 2  # pixels between the boxes of two digits, at least
TRIES = 50  # places that are tried for a digit, before the canvas is begun anew


@dataclass
class Scene:
    """A canvas and what is on it."""

    canvas: np.ndarray  # [H, W] uint8
    digits: list[int]
    boxes: list[tuple[int, int, int, int]]  # left, top, width and height in pixels, tight around the ink


def cut_out(picture: np.ndarray, side: int) -> np.ndarray:
    """Return a digit [28, 28], scaled so that 28 pixels become `side`, cut at the edges of its ink."""
    from PIL.Image import Resampling, fromarray

    scaled = np.asarray(fromarray(picture).resize((side, side), Resampling.BILINEAR))
    rows, columns = (np.flatnonzero((scaled > 32).any(axis)) for axis in (1, 0))
    return scaled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def scene(
    pictures: np.ndarray,
    labels: np.ndarray,
    random: np.random.Generator,
    count: tuple[int, int],
    size: tuple[int, int] = (48, 80),
    side: tuple[int, int] = (18, 32),
) -> Scene:
    """Scatter digits over a canvas; no box comes closer to another than APART pixels.

    Args:
        pictures, labels: [N, 28, 28] and [N], to draw from.
        count: the fewest and the most digits.
        size: the smallest and the largest height and width of the canvas, in pixels.
        side: the smallest and the largest size of 28 pixels of a digit.
    """
    wanted = int(random.integers(count[0], count[1] + 1))
    while True:
        height, width = (int(n) for n in random.integers(size[0], size[1] + 1, 2))
        made = Scene(np.zeros((height, width), np.uint8), [], [])
        for _ in range(wanted):
            index = int(random.integers(len(pictures)))
            ink = cut_out(pictures[index], int(random.integers(side[0], side[1] + 1)))
            if not place(made, ink, int(labels[index]), random):
                break
        if len(made.digits) == wanted:
            return made


def place(made: Scene, ink: np.ndarray, digit: int, random: np.random.Generator) -> bool:
    """Put a digit where it is apart from all others; return whether such a place was found."""
    (high, wide), (height, width) = ink.shape, made.canvas.shape
    for _ in range(TRIES):
        x, y = int(random.integers(width - wide + 1)), int(random.integers(height - high + 1))
        near = made.canvas[max(0, y - APART) : y + high + APART, max(0, x - APART) : x + wide + APART]
        if not near.any():
            made.canvas[y : y + high, x : x + wide] = ink
            made.digits.append(digit)
            made.boxes.append((x, y, wide, high))
            return True
    return False


def png(canvas: np.ndarray) -> dict[str, Any]:
    """Return a canvas as `datasets` keeps images; hardly compressed, which takes most of the time otherwise."""
    from PIL.Image import fromarray

    file = BytesIO()
    fromarray(canvas).save(file, "PNG", compress_level=1)
    return {"bytes": file.getvalue(), "path": None}


def splits() -> dict[str, tuple[np.ndarray, np.ndarray, np.random.Generator]]:
    """Return the digits [N, 28, 28], their labels [N] and a generator of each split."""
    found = {}
    for name, rows in mnist_5k().items():
        pictures = np.stack([np.asarray(image) for image in rows["image"]])
        found[name] = (pictures, np.array(rows["label"]), np.random.default_rng(SEEDS[name]))
    return found


def digit_scenes() -> DatasetDict:
    """Return canvases of 48 to 80 pixels with 1 to 5 digits: `image`, and `objects` as in COCO, for detection.

    `objects` has `bbox`, left, top, width and height in pixels, and `category`. 4,000 train, 300 validation, 500 test.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Sequence, Value

    features = Features(
        image=Image(),
        objects={
            "bbox": Sequence(Sequence(Value("float32"), length=4)),
            "category": Sequence(ClassLabel(names=list(NAMES))),
        },
    )
    made = {}
    for name, drawn in splits().items():
        scenes = [scene(*drawn, count=(1, 5)) for _ in range(COUNTS[name])]
        columns: dict[str, Any] = {
            "image": [png(each.canvas) for each in scenes],
            "objects": [{"bbox": each.boxes, "category": each.digits} for each in scenes],
        }
        made[name] = Dataset.from_dict(columns, features, split=name)
    return DatasetDict(made)


def caption(made: Scene) -> str:
    """Tell the digits in the order in which they lie, along the axis on which they are further apart."""
    places = np.array([(x + w / 2, y + h / 2) for x, y, w, h in made.boxes])
    names = [f"a {NAMES[digit]}" if digit != 8 else "an eight" for digit in made.digits]
    if len(names) == 1:
        return names[0]
    across, down = np.ptp(places, axis=0)
    named = [names[k] for k in places[:, 0 if across >= down else 1].argsort()]
    if len(named) == 2:
        return f"{named[0]} {'left of' if across >= down else 'above'} {named[1]}"
    listed = ", ".join(named[:-1]) + f" and {named[-1]}"
    return f"{listed} from {'left to right' if across >= down else 'top to bottom'}"


def digit_captions() -> DatasetDict:
    """Return canvases with 1 to 3 digits, `image`, and a sentence about them, `text`: "a three above a seven".

    Canvases are 64 x 64. 4,000 train, 300 validation, 500 test.
    """
    from datasets import Dataset, DatasetDict, Features, Image, Value

    features, made = Features(image=Image(), text=Value("string")), {}
    for name, drawn in splits().items():
        scenes = [scene(*drawn, count=(1, 3), size=(64, 64), side=(18, 28)) for _ in range(COUNTS[name])]
        columns = {"image": [png(each.canvas) for each in scenes], "text": [caption(each) for each in scenes]}
        made[name] = Dataset.from_dict(columns, features, split=name)
    return DatasetDict(made)


SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # the axis, and the way along it


def questions(made: Scene) -> list[tuple[str, str]]:
    """Return questions about a scene and their answers: the number of digits, and what lies on a side of a digit.

    Each has exactly one answer. It names a digit that is there once, and one other digit has its middle on that side
    of it, with a whole box beyond the edge.
    """
    asked = [("how many digits?", NAMES[len(made.digits)])]
    for k, digit in enumerate(made.digits):
        if made.digits.count(digit) > 1:
            continue
        for side, (axis, way) in SIDES.items():
            there = [other for other in range(len(made.digits)) if other != k and beyond(made, other, k, axis, way)]
            if len(there) == 1 and beyond(made, there[0], k, axis, way, whole=True):
                asked.append((f"what is {side} the {NAMES[digit]}?", NAMES[made.digits[there[0]]]))
    return asked


def beyond(made: Scene, one: int, other: int, axis: int, way: int, whole: bool = False) -> bool:
    """Return whether a digit lies on a side of another one: its middle from the other's, or its whole box."""
    (low, size), (low_other, size_other) = (made.boxes[k][axis::2] for k in (one, other))
    if whole:
        return low + size <= low_other if way < 0 else low >= low_other + size_other
    return way * (2 * low + size - 2 * low_other - size_other) > 0


def digit_questions() -> DatasetDict:
    """Return canvases with 2 or 3 digits, `image`, and a `question` that has one `answer`.

    A question is drawn from those of `questions`, such as "what is left of the seven?". There are as many canvases as
    in `digit_captions`, 64 x 64.
    """
    from datasets import Dataset, DatasetDict, Features, Image, Value

    features = Features(image=Image(), question=Value("string"), answer=Value("string"))
    made = {}
    for name, drawn in splits().items():
        columns: dict[str, list] = {"image": [], "question": [], "answer": []}
        for _ in range(COUNTS[name]):
            each = scene(*drawn, count=(2, 3), size=(64, 64), side=(18, 28))
            asked = questions(each)
            question, answer = asked[int(drawn[2].integers(len(asked)))]
            for column, value in zip(columns, (png(each.canvas), question, answer), strict=True):
                columns[column].append(value)
        made[name] = Dataset.from_dict(columns, features, split=name)
    return DatasetDict(made)


MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FRAMES, SIDE = 8, 36


def digit_videos() -> DatasetDict:
    """Return digits that move over a canvas: `video`, 8 images of 36 x 36 pixels, and `label`, such as "three left".

    Each moves 1 to 2 pixels a frame. 4,000 train, 300 validation, 500 test.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List

    kinds = [f"{digit} {motion}" for digit in NAMES for motion in MOTIONS]
    features = Features(video=List(Image()), label=ClassLabel(names=kinds))
    made = {}
    for name, (pictures, labels, random) in splits().items():
        videos, motions = [], []
        for _ in range(COUNTS[name]):
            index, motion = int(random.integers(len(pictures))), int(random.integers(len(MOTIONS)))
            ink = cut_out(pictures[index], 24)
            videos.append([png(frame) for frame in moving(ink, list(MOTIONS.values())[motion], random)])
            motions.append(int(labels[index]) * len(MOTIONS) + motion)
        made[name] = Dataset.from_dict({"video": videos, "label": motions}, features, split=name)
    return DatasetDict(made)


def moving(ink: np.ndarray, direction: tuple[int, int], random: np.random.Generator) -> np.ndarray:
    """Return frames [8, 36, 36] of a digit that moves in a direction, at a speed and from a place that are drawn."""
    room = np.array([SIDE - ink.shape[1], SIDE - ink.shape[0]])  # for x and y
    way = np.array(direction)
    path = np.minimum((FRAMES - 1) * random.uniform(1, 2), (room * abs(way)).max())  # pixels from first to last frame
    low, high = np.maximum(0, -path * way), room - np.maximum(0, path * way)
    begin = random.uniform(low, high)
    frames = np.zeros((FRAMES, SIDE, SIDE), np.uint8)
    for k in range(FRAMES):
        x, y = np.rint(begin + way * path * k / (FRAMES - 1)).astype(int)
        frames[k, y : y + ink.shape[0], x : x + ink.shape[1]] = ink
    return frames
