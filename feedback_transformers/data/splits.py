"""Make fixed train, validation and test splits: no random numbers, so they are the same on every machine."""

from __future__ import annotations

import re
import zlib
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict, Features


def cut(columns: dict[str, Any], train_end: int, validation_end: int, features: Features | None = None) -> DatasetDict:
    """Cut columns of equal length, in their order, into [0, train_end), [train_end, validation_end) and the rest."""
    from datasets import Dataset, DatasetDict

    slices = {
        "train": slice(None, train_end),
        "validation": slice(train_end, validation_end),
        "test": slice(validation_end, None),
    }
    return DatasetDict(
        {
            name: Dataset.from_dict({key: values[part] for key, values in columns.items()}, features, split=name)
            for name, part in slices.items()
        }
    )


def cut_by_hash(columns: dict[str, list], key: list[str], features: Features | None = None) -> DatasetDict:
    """Order the rows by a hash of `key` and cut at 80 % and 90 % of its range.

    Rows whose keys have the same letters and digits share a hash, so repeated texts never cross splits; and any
    slice of a split is a fair sample.
    """
    hashes = [zlib.crc32(re.sub("[^a-z0-9]", "", text.lower()).encode()) for text in key]
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    ordered = [hashes[i] for i in order]
    columns = {name: [values[i] for i in order] for name, values in columns.items()}
    return cut(columns, bisect_left(ordered, 8 * 2**32 // 10), bisect_left(ordered, 9 * 2**32 // 10), features)
