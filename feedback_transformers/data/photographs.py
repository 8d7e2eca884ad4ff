"""Read the photographs that scikit-image and scikit-learn ship."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .packages import file

if TYPE_CHECKING:
    from datasets import DatasetDict

FOLDERS = {"scikit-image": "skimage/data", "scikit-learn": "sklearn/datasets/images"}
# A photograph is in one split as a whole. motorcycle_right.png shows the scene of motorcycle_left.png and is left out.
PHOTOGRAPHS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "scikit-image": (
            *("astronaut.png", "brick.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg"),
            *("ihc.png", "moon.png", "motorcycle_left.png", "page.png", "retina.jpg"),
        ),
        "scikit-learn": ("flower.jpg",),
    },
    "validation": {"scikit-image": ("chelsea.png", "rocket.jpg")},
    "test": {"scikit-image": ("camera.png", "coffee.png"), "scikit-learn": ("china.jpg",)},
}


def photographs() -> DatasetDict:
    """Return photographs of people, things, landscapes and textures: `image` (PIL RGB, 384 x 191 to 1411 x 1411).

    12 train, 2 validation, 3 test. Some of them are grey.
    """
    from datasets import Dataset, DatasetDict, Features, Image

    made = {}
    for split, packages in PHOTOGRAPHS.items():
        paths = [file(package, f"{FOLDERS[package]}/{name}") for package, names in packages.items() for name in names]
        columns = {"image": [str(path) for path in paths]}
        made[split] = Dataset.from_dict(columns, Features(image=Image(mode="RGB")), split=split)
    return DatasetDict(made)
