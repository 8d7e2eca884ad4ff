"""Read a series of one's own: choose one of several, and check its timestamps and values."""

from __future__ import annotations

import re
import shlex
import warnings
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from .rows import places

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

DATE = re.compile(r"\s*(\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}|\d{4}[-/]\d{1,2}|\d{8})(?=[T ]|\s*$)")
TIMES = (
    "timestamp",
    "time",
    "datetime",
    "date",
    "ds",
    "ts",
)  # names of columns that hold times, whatever they look like
NO_TIME = "none"  # in place of the name of a column
SHOWN = 5  # series that an error names


@dataclass
class Table:
    """A table of series, what it is called in an error, and the file whose lines errors name, if there is one."""

    frame: pd.DataFrame
    name: str
    file: str | None

    def places(self, rows: Any) -> str:
        """Return where `rows`, numbers of the table's index, stand in the file."""
        return places(self.file, [int(row) for row in rows])


def one_series(
    rows: Dataset,
    name: str,
    file: str | None,
    value_column: str,
    timestamp_column: str | None = None,
    id_column: str | None = None,
    series_id: str | None = None,
) -> Dataset:
    """Return the rows of one series, after checking that it is one, in order, without gaps, and no constant.

    Args:
        name: what the data is called in errors.
        file: the file it was read from, whose lines errors name; None for a data set with a name.
        value_column: the values.
        timestamp_column: their times; without it, a column that looks like times, if there is one. "none" takes the
            rows as they stand, as one series with equal steps.
        id_column: the column, or several with commas, that tells the series apart.
        series_id: which series, by its values in these columns.

    Raises:
        ValueError: the rows are several series, or unsorted, or times are double or missing, or values are no numbers.
    """
    table = Table(rows.to_pandas(), name, file)
    time = timestamp_column or find_times(table.frame, value_column)
    if time not in (None, NO_TIME) and time not in table.frame:
        raise ValueError(f"{name} has no column {time!r}, only {_listed(table.frame)}: give --timestamp_column.")
    if id_column is not None:
        table = choose(table, id_column, series_id)
    elif series_id is not None:
        raise ValueError(f"--series_id {series_id} needs --id_column, the column that names the series.")
    if time is None:
        refuse_blocks(table, value_column)
    elif time != NO_TIME:
        times = read_times(table, time)
        fault = find_fault(table, time, times)
        if fault is not None:
            refuse_several(table, [value_column, time], times)
            raise ValueError(fault)
    check_values(table, value_column)
    return rows.select(table.frame.index)


def _listed(names: Any) -> str:
    return ", ".join(map(repr, map(str, names)))


def find_times(frame: pd.DataFrame, value_column: str) -> str | None:
    """Return the column that holds times: a text or a date in its first row, or a name such as date."""
    from pandas.api.types import is_datetime64_any_dtype, is_numeric_dtype

    columns = [column for column in frame if column != value_column]
    for column in columns:
        first = frame[column].iloc[0]
        is_date = is_datetime64_any_dtype(frame[column]) or (isinstance(first, str) and DATE.match(first))
        if is_date and not is_numeric_dtype(frame[column]):
            return column
    return next((column for column in columns if column.lower() in TIMES), None)


def choose(table: Table, id_column: str, series_id: str | None) -> Table:
    """Return the rows of the series `series_id`."""
    columns = [column.strip() for column in id_column.split(",")]
    for column in columns:
        if column not in table.frame:
            raise ValueError(f"{table.name} has no column {column!r}, only {_listed(table.frame)}: give --id_column.")
    ids = _ids(table, columns)
    known = list(dict.fromkeys(ids))
    if series_id is None and len(known) == 1:
        return table
    if series_id not in known:
        which = "" if series_id is None else f", and none is {series_id}"
        raise ValueError(
            f"{table.name} holds {len(known):,} series, {_some(known)}{which}: choose one with "
            f"--series_id {shlex.quote(known[0])}."
        )
    return Table(table.frame[ids == series_id], f"The series {series_id} of {table.name}", table.file)


def _ids(table: Table, columns: list[str]) -> pd.Series:
    return table.frame[columns].astype(str).agg(",".join, axis=1)


def _some(known: list[str]) -> str:
    return ", ".join(known[:SHOWN]) + (", ..." if len(known) > SHOWN else "")


def read_times(table: Table, column: str) -> pd.Series:
    """Return the times of a column, as dates or, where it holds other numbers, as these.

    Raises:
        ValueError: some can't be read.
    """
    import pandas as pd
    from pandas.api.types import is_datetime64_any_dtype, is_numeric_dtype

    given = table.frame[column]
    if is_datetime64_any_dtype(given):
        read = given
    elif is_numeric_dtype(given):
        whole = given.notna().all() and given.between(19000101, 21001231).all()
        read = pd.to_datetime(given.astype(int).astype(str), format="%Y%m%d", errors="coerce") if whole else given
        read = given if read.isna().any() else read  # numbers of eight digits that are no dates
    else:
        read = min((_dates(given, first) for first in (False, True)), key=_disorder)
    wrong = list(read.index[read.isna()])
    if wrong:
        raise ValueError(
            f"{table.name} has {str(given[wrong[0]])!r} as its {column} ({table.places(wrong)}), which is no time: "
            "mend it, or name the column of times with --timestamp_column."
        )
    return read


def _dates(given: pd.Series, day_first: bool) -> pd.Series:
    import pandas as pd

    texts = given.astype("string").str.strip()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # pandas: a format that it can't infer, or that means month first
        zoned = bool(texts.str.contains(r"\d[Tt ].*(?:Z|[+-]\d\d:?\d\d)$", na=False).any())
        year_first = bool(texts.str.match(r"\d{4}", na=False).any())
        options = {"errors": "coerce", "dayfirst": day_first and not year_first, "utc": zoned}
        read = pd.to_datetime(texts, **options)  # in the format of the first
        return read.fillna(pd.to_datetime(texts[read.isna()], format="mixed", **options))  # with no seconds, say


def _disorder(times: pd.Series) -> tuple[int, int]:
    """Return how bad a reading of dates is, to choose between day first and month first."""
    return int(times.isna().sum()), times.diff().nunique()


def find_fault(table: Table, column: str, times: pd.Series) -> str | None:
    """Return what is wrong with the times of one series, in a sentence that says what to do; None if nothing is."""
    index, steps = times.index, times.diff().iloc[1:]
    if len(steps) == 0:
        return None
    zero = steps.iloc[0] - steps.iloc[0]
    double = index[times.duplicated()]
    if len(double):
        return (
            f"{table.name} repeats a {column} that was there before, at {table.places(double)} ({len(double):,} in "
            "all): keep one row for each time, such as their sum or mean, or name the column that tells series apart "
            "with --id_column."
        )
    back = steps.index[steps < zero]
    if len(back):
        return (
            f"{table.name} is not in the order of time: its {column} goes back at {table.places(back)} "
            f"({len(back):,} in all): sort the rows by {column}."
        )
    step = most_common(steps)
    wide = steps.index[steps != step]
    if len(wide) == 0 or is_calendar(times):
        return None
    before, after = times[index[index.get_loc(wide[0]) - 1]], times[wide[0]]
    where = f"{table.places(wide[:1])}: {after} follows {before}"
    even = steps[steps != step] / step
    if (even > 1).all() and np.allclose(even, even.round()):
        return (
            f"The {column} of {table.name} steps by {_said(step)}, and steps are missing before {where} "
            f"({int((even.round() - 1).sum()):,} in all): add a row for each, with 0 or the value before, or give "
            "--timestamp_column none to take the rows as evenly spaced."
        )
    return (
        f"{table.name} is not evenly spaced: most times are {_said(step)} apart, and {len(wide):,} of {len(steps):,} "
        f"are not, first at {where}: make one row for each hour, day or week, such as a sum or a mean, or "
        "give --timestamp_column none to take the rows as evenly spaced."
    )


def most_common(steps: pd.Series) -> Any:
    """Return the most common step forward."""
    forward = steps[steps > steps.iloc[0] - steps.iloc[0]]
    return None if len(forward) == 0 else forward.mode().iloc[0]


def _said(step: Any) -> str:
    """Return 0 days 01:00:00 as 1:00:00, and 7 days 00:00:00 as 7 days."""
    if isinstance(step, int | float):
        return f"{step:g}"
    return re.sub(r" 00:00:00$|^0 days 0?|(?<=^1 day)s", "", str(step))


def is_calendar(times: pd.Series) -> bool:
    """Return whether times are the same day of each month, quarter or year, or the days from Monday to Friday."""
    from pandas.api.types import is_datetime64_any_dtype

    if not is_datetime64_any_dtype(times):
        return False
    months = (times.dt.year * 12 + times.dt.month).diff().iloc[1:]
    same_day = times.dt.day.nunique() == 1 or bool(times.dt.is_month_end.all())
    if same_day and months.nunique() == 1 and months.iloc[0] > 0:
        return True
    days = times.dt.tz_localize(None).to_numpy().astype("datetime64[D]")
    return bool((times.dt.normalize() == times).all() and (np.busday_count(days[:-1], days[1:]) == 1).all()) and bool(
        np.is_busday(days).all()
    )


def refuse_several(table: Table, taken: list[str], times: pd.Series) -> None:
    """Refuse a table whose times are in order only within the groups of another column: it holds several series."""
    step = most_common(times.diff().iloc[1:])
    found = list[tuple[bool, int, int, list[str]]]()
    others = table.frame.columns.difference(taken, sort=False)
    for columns in [[one] for one in others] + [list(two) for two in combinations(others, 2)]:
        groups = [group for _, group in times.groupby([table.frame[column] for column in columns])]
        if not 1 < len(groups) <= len(times) // 2 or any(group.duplicated().any() for group in groups):
            continue
        steps = [group.diff().iloc[1:] for group in groups]
        even = all((group == step).all() for group in steps)
        if even or (times.duplicated().any() and any((group == step).any() for group in steps)):
            found.append((not even, len(columns), len(groups), columns))
    if found:
        columns = min(found)[3]
        known = list(dict.fromkeys(_ids(table, columns)))
        raise ValueError(
            f"{table.name} holds {len(known):,} series, one for each {' and '.join(columns)} ({_some(known)}): choose "
            f"one with --id_column {','.join(columns)} --series_id {shlex.quote(known[0])}."
        )


def refuse_blocks(table: Table, value_column: str) -> None:
    """Refuse a table without times where the words of a column stand in blocks, as of series one after the other."""
    for column in table.frame.columns.difference([value_column], sort=False):
        words = table.frame[column]
        if words.nunique() < 2 or not words.map(lambda word: isinstance(word, str)).all():
            continue
        blocks = int((words != words.shift()).sum())
        if blocks == words.nunique() and words.value_counts().min() > 1:
            first = words.iloc[0]
            raise ValueError(
                f"{table.name} seems to hold {blocks:,} series one after the other, one for each {column}: choose one "
                f"with --id_column {column} --series_id {shlex.quote(first)}; or, if it is one, give "
                "--timestamp_column none."
            )


def check_values(table: Table, column: str) -> None:
    """Check that the values are finite numbers, and not all the same."""
    import pandas as pd

    given = table.frame[column]
    values = pd.to_numeric(given, errors="coerce").astype(float)
    words = list(given.index[values.isna() & given.notna() & (given.astype(str).str.lower() != "nan")])
    if words:
        raise ValueError(
            f"{table.name} has {given[words[0]]!r} as its {column} ({table.places(words)}), which is no number: "
            "write numbers such as 1234.5."
        )
    gaps = list(given.index[~np.isfinite(values)])
    if gaps:
        raise ValueError(
            f"{table.name} has no finite {column} in {len(gaps):,} of its {len(values):,} rows "
            f"({table.places(gaps)}): fill them with 0 or the value before."
        )
    if values.nunique() == 1:
        raise ValueError(
            f"{table.name} has the same {column}, {values.iloc[0]:g}, in all {len(values):,} rows: there is nothing "
            "to forecast."
        )
