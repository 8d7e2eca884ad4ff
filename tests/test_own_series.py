"""Series of one's own: several in one file, times that are unsorted, double or missing, and values that are."""

import csv
import math
from datetime import datetime, timedelta

import pytest
from datasets import Dataset
from test_examples import examples_on_path, run  # noqa: F401 - a fixture

from feedback_transformers import data

START = datetime(2024, 1, 1)
HOURS = 120


def hours(store: str, level: float, count: int = HOURS) -> list[list]:
    """Rows of store, time and sales: a wave of a day, on a line that rises."""
    times = [START + timedelta(hours=h) for h in range(count)]
    return [[store, str(t), level + math.sin(2 * math.pi * h / 24) + h / 100] for h, t in enumerate(times)]


def checked(rows: list[list], **asked) -> Dataset:
    columns = dict(zip(("store", "date", "sales"), map(list, zip(*rows, strict=True)), strict=True))
    return data.one_series(Dataset.from_dict(columns), "sales", first_line=2, **asked)


def changed(rows: list[list], row: int, column: int, value) -> list[list]:
    return [[*r[:column], value, *r[column + 1 :]] if i == row else r for i, r in enumerate(rows)]


NORTH = hours("north", 100)
BOTH = [*NORTH, *hours("south", 50)]
UNTIMED = [[store, "", sales] for store, _, sales in BOTH]


@pytest.mark.parametrize(
    ("rows", "asked", "sentence"),
    [
        (BOTH, {}, "120 lines repeat a date, such as line 122 that of line 2: .* --id_column store"),
        (BOTH, {"id_column": "store"}, "'store' holds 2 series, north, south, and no series is chosen"),
        (BOTH, {"id_column": "store", "series_id": "east"}, "none of them is 'east'"),
        (BOTH, {"id_column": "shop"}, "no column 'shop', only 'store', 'date', 'sales'"),
        (NORTH, {"timestamp_column": "when"}, "no column 'when'"),
        ([*NORTH[:50], *NORTH[49:]], {}, "1 lines repeat a date, such as line 52 that of line 51"),
        ([*NORTH[60:], *NORTH[:60]], {}, "The date goes back at line 62: sort the file by date"),
        ([*NORTH[:50], *NORTH[53:]], {}, "most lines are 0 days 01:00:00 apart, and line 52 is not: fill"),
        (changed(NORTH, 9, 1, "yesterday"), {}, "Line 11 has 'yesterday' as its date, which is no time: correct it"),
        (changed(NORTH, 7, 2, math.nan), {}, "The value of sales in line 9 is missing or infinite: fill it"),
        ([[*r[:2], str(r[2]) + ("," if i in (3, 5) else "")] for i, r in enumerate(NORTH)], {}, "Line 5 .* 1 other"),
        ([[*r[:2], 5.0] for r in NORTH], {}, "All values of sales are 5.0: there is nothing to forecast"),
    ],
)
def test_series_that_are_refused(rows, asked, sentence):
    with pytest.raises(ValueError, match=sentence):
        checked(rows, **asked)


def test_texts_without_times_may_be_several_series():
    columns = {"store": [row[0] for row in BOTH], "sales": [row[2] for row in BOTH]}
    with pytest.raises(ValueError, match="'store' has 2 different texts: choose a series with --id_column store"):
        data.one_series(Dataset.from_dict(columns), "sales")
    assert len(data.one_series(Dataset.from_dict(columns), "sales", timestamp_column="none")) == len(BOTH)


def test_one_series_of_several_is_taken_in_its_order():
    mixed = [row for pair in zip(NORTH, BOTH[HOURS:], strict=True) for row in pair]
    assert checked(mixed, id_column="store", series_id="south")["sales"][:] == [row[2] for row in BOTH[HOURS:]]


WEEKDAYS = [START + timedelta(days=i) for i in range(40) if (START + timedelta(days=i)).weekday() < 5]


@pytest.mark.parametrize(
    "times",
    [
        [START + timedelta(days=i) for i in range(24)],
        [START + timedelta(weeks=i) for i in range(24)],
        [datetime(2020 + i // 12, 1 + i % 12, 1) for i in range(24)],
        [datetime(2000 + i, 12, 31) for i in range(24)],
        WEEKDAYS,
    ],
)
def test_days_weeks_months_years_and_weekdays_are_equal_steps(times):
    rows = [["north", str(t), float(i)] for i, t in enumerate(times)]
    assert len(checked(rows)) == len(times)


def test_the_script_chooses_a_series_and_prints_the_naive_forecast(examples_on_path, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "sales.csv"
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows([("store", "date", "sales"), *BOTH])
    flags = [
        "--train_file",
        str(file),
        "--value_column",
        "sales",
        "--context_length",
        "24",
        "--prediction_length",
        "4",
    ]
    flags += ["--season", "24", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="120 lines repeat a date"):
        run("run_forecasting", *flags)
    results = run("run_forecasting", *flags, "--id_column", "store", "--series_id", "south")
    assert results["eval_mase_naive_24"] == pytest.approx(1, abs=1e-3), (
        "its error is the rise of a day, as in training"
    )
    assert "mase naive 24, the lower the better" in capsys.readouterr().out
