"""Series of one's own: several in one file, times that are unsorted, double or missing, and values that are."""

import csv
import math
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from test_examples import examples_on_path, run  # noqa: F401 - a fixture

from feedback_transformers import data
from feedback_transformers.training import scripts

START = datetime(2024, 1, 1)
HEAD = ("store", "date", "sales")


def hours(store, level: float = 100, count: int = 120, start: datetime = START) -> list[list]:
    """Rows of store, time and sales: a wave of a day, on a line that rises."""
    times = [start + timedelta(hours=h) for h in range(count)]
    return [[store, str(t), level + math.sin(2 * math.pi * h / 24) + h / 100] for h, t in enumerate(times)]


def write(path, rows, head=HEAD):
    with path.open("w", newline="") as lines:
        csv.writer(lines).writerows([head, *rows])
    return path


def checked(tmp_path, rows, head=HEAD, **asked) -> Dataset:
    file = write(tmp_path / "sales.csv", rows, head)
    read = scripts.DataArguments(train_file=str(file)).read()["train"]
    return scripts.one_series(read, "sales.csv", str(file), "sales", **asked)


def changed(rows, row, column, value):
    return [[*r[:column], value, *r[column + 1 :]] if i == row else r for i, r in enumerate(rows)]


def dated(times, store="north"):
    return [[store, str(t), float(i % 5)] for i, t in enumerate(times)]


NORTH, SOUTH = hours("north"), hours("south", 50)
BOTH = [*NORTH, *SOUTH]
MIXED = [row for pair in zip(NORTH, SOUTH, strict=True) for row in pair]
NIGHTS = [row for row in NORTH if 8 <= int(row[1][11:13]) < 20]


@pytest.mark.parametrize(
    ("rows", "asked", "sentence"),
    [
        (
            BOTH,
            {},
            r"holds 2 series, one for each store \(north, south\): choose one with --id_column store --series_",
        ),
        (MIXED, {}, "holds 2 series, one for each store"),
        ([[len(r[0]) + (r[0] == "north"), *r[1:]] for r in MIXED], {}, "one for each store .*--series_id 6"),
        ([*NORTH, *hours("south", 50, 120, START - timedelta(days=9))], {}, "holds 2 series, one for each store"),
        ([*NORTH[:50], *NORTH[53:], *SOUTH], {}, "holds 2 series, one for each store"),
        (BOTH, {"id_column": "store"}, "holds 2 series, north, south: choose one with --series_id north"),
        (BOTH, {"id_column": "store", "series_id": "east"}, "and none is east: choose"),
        (BOTH, {"id_column": "shop"}, "no column 'shop', only 'store', 'date', 'sales': give --id_column"),
        (BOTH, {"series_id": "north"}, "--series_id north needs --id_column"),
        (NORTH, {"timestamp_column": "when"}, "no column 'when', only .*: give --timestamp_column"),
        ([*NORTH[:50], *NORTH[49:]], {}, r"repeats a date that was there before, at line 52 \(1 in all\): keep one"),
        ([*NORTH[60:], *NORTH[:60]], {}, r"its date goes back at line 62 \(1 in all\): sort the rows by date"),
        (NORTH[::-1], {}, r"goes back at lines 3, 4, 5, 6, 7, ... \(119 in all\)"),
        (
            [*NORTH[:50], *NORTH[53:]],
            {},
            r"steps by 1:00:00, and steps are missing before line 52: .* \(3 in all\): a",
        ),
        (NIGHTS, {}, r"missing before line 14: 2024-01-02 08:00:00 follows 2024-01-01 19:00:00 \(48 in all\)"),
        (changed(NORTH, 9, 1, "2024-01-01 09:20"), {}, "not evenly spaced: .* 2 of 119 are not, first at line 11"),
        (changed(NORTH, 9, 1, "yesterday"), {}, r"has 'yesterday' as its date \(line 11\), which is no time"),
        (changed(NORTH, 7, 2, ""), {}, r"no finite sales in 1 of its 120 rows \(line 9\): fill them"),
        (changed(NORTH, 7, 2, "inf"), {}, r"no finite sales in 1 of its 120 rows \(line 9\)"),
        (
            changed(changed(NORTH, 3, 2, "1,5"), 5, 2, "shut"),
            {},
            r"has '1,5' as its sales \(lines 5, 7\), which is no",
        ),
        ([[*r[:2], 5.0] for r in NORTH], {}, "same sales, 5, in all 120 rows: there is nothing to forecast"),
    ],
)
def test_series_that_are_refused(rows, asked, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        checked(tmp_path, rows, **asked)


def test_lines_are_those_of_the_file(tmp_path):
    """A field in quotes may hold line breaks, and a chosen series has its lines between those of others."""
    rows = [[["north\nsea", "south"][i % 2], *row[1:]] for i, row in enumerate(MIXED)]
    with pytest.raises(ValueError, match=r"series south of sales.csv has 'shut' as its sales \(line 7\)"):
        checked(tmp_path, changed(rows, 3, 2, "shut"), id_column="store", series_id="south")


def test_one_of_several_series_is_taken_in_its_order(tmp_path):
    found = checked(tmp_path, MIXED, id_column="store", series_id="south")
    assert list(found["sales"]) == pytest.approx([row[2] for row in SOUTH]) and set(found["store"]) == {"south"}
    both = [[store, kind, *row[1:]] for store in ("north", "south") for kind in "xy" for row in NORTH]
    head = ("store", "kind", "date", "sales")
    with pytest.raises(
        ValueError, match="4 series, one for each store and kind .* --id_column store,kind --series_id"
    ):
        checked(tmp_path, both, head)
    assert len(checked(tmp_path, both, head, id_column="store,kind", series_id="north,y")) == 120


def test_rows_without_times(tmp_path):
    untimed = [[store, sales] for store, _, sales in BOTH]
    with pytest.raises(ValueError, match="seems to hold 2 series one after the other, one for each store"):
        checked(tmp_path, untimed, ("store", "sales"))
    assert len(checked(tmp_path, untimed, ("store", "sales"), timestamp_column="none")) == 240
    assert len(checked(tmp_path, NIGHTS, timestamp_column="none")) == len(NIGHTS)
    weather = [[["sun", "rain"][i % 3 == 0], row[1]] for i, row in enumerate(untimed)]
    assert len(checked(tmp_path, weather, ("weather", "sales"))) == 240
    counted = [[i, row[1]] for i, row in enumerate(untimed)]
    assert len(checked(tmp_path, counted, ("hour", "sales"), timestamp_column="hour")) == 240
    with pytest.raises(ValueError, match="steps by 1, and steps are missing before line 9"):
        checked(tmp_path, [*counted[:7], *counted[9:]], ("hour", "sales"), timestamp_column="hour")


@pytest.mark.parametrize("step", ["15min", "h", "D", "B", "W", "MS", "ME", "QS", "YE"])
def test_steps_that_are_even(step, tmp_path):
    """Also from Monday to Friday, and by months, quarters and years, which are not equally long."""
    times = pd.date_range("2020-01-01", periods=30, freq=step)
    assert len(checked(tmp_path, dated(times))) == 30
    with pytest.raises(ValueError, match="steps are missing|not evenly spaced"):
        checked(tmp_path, dated(times.delete([11, 12])))


@pytest.mark.parametrize(
    "form", ["%d.%m.%Y", "%m/%d/%Y", "%d/%m/%y", "%Y%m%d", "%b %d, %Y", "%Y-%m-%dT%H:%M:%SZ", "%d.%m.%Y %H:%M"]
)
@pytest.mark.parametrize("count", [10, 60])
def test_dates_as_people_write_them(form, count, tmp_path):
    """With 10 days, only the steps tell whether the day or the month comes first."""
    times = pd.date_range("2024-01-01", periods=count, freq="D").strftime(form)
    assert len(checked(tmp_path, dated(times))) == count
    if count == 60:
        with pytest.raises(ValueError, match=r"steps by 1 day, and steps are missing before line 42: .*\(1 in all\)"):
            checked(tmp_path, dated(times.delete(40)))


def test_summer_time(tmp_path):
    zoned = pd.date_range("2024-03-30", periods=72, freq="h", tz="Europe/Berlin")
    assert len(checked(tmp_path, dated(zoned))) == 72
    with pytest.raises(ValueError, match="2024-03-31 03:00:00 follows 2024-03-31 01:00:00"):
        checked(tmp_path, dated(zoned.tz_localize(None)))


# Windows


def test_windows_keep_small_changes_of_large_values():
    """float32 has 24 bits: at two thousand million, it knows multiples of 128."""
    series = 2e9 + np.arange(12.0)
    cut = data.windows(series, context_length=3, prediction_length=2).with_format("torch", dtype=torch.float64)
    assert cut["future_values"][0].tolist() == [2e9 + 3, 2e9 + 4]
    assert data.windows(range(8), 3, 2).features["past_values"].feature.dtype == "float32"
    with pytest.raises(ValueError, match=r"The series has the shape \[2, 4\]: give one series"):
        data.windows(np.zeros((2, 4)), 1, 1)


# The script

FLAGS = ["--value_column", "sales", "--context_length", 24, "--prediction_length", 4, "--season", 24]


def test_the_script_chooses_a_series_and_prints_the_naive_forecast(tmp_path, capsys):
    flags = ["--train_file", write(tmp_path / "sales.csv", BOTH), *FLAGS, "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="holds 2 series, one for each store"):
        run("run_forecasting", *flags)
    results = run("run_forecasting", *flags, "--id_column", "store", "--series_id", "south")
    assert results["eval_mase_naive_24"] == pytest.approx(1, abs=1e-3), "its error is the rise of a day, as in train"
    assert {f"eval_mase_step_{k}" for k in range(1, 7)} <= results.keys()
    before, after = capsys.readouterr().out.split("parameters")
    assert "Repeating the last 24 steps: MASE 1.000 on the validation data" in before
    assert f"{results['eval_mase']:8.3f}  of the model" in after and "1.000  repeating the last 24 steps" in after
    assert "mase_naive_24" in (tmp_path / "out" / "README.md").read_text()


def test_validation_windows_look_back_into_train(tmp_path, capsys):
    """With 40 values, 4 for validation and 36 for windows of 28; and a season longer than a window."""
    file = write(tmp_path / "sales.csv", NORTH[:40])
    flags = [*FLAGS, "--output_dir", tmp_path / "out"]
    results = run("run_forecasting", "--train_file", file, *flags, "--season", 30)
    assert "36 steps to learn from, 9 windows" in capsys.readouterr().out
    assert "eval_mase_naive_1" in results
    with pytest.raises(ValueError, match="--season 36 is longer than the train data, 36 steps"):
        run("run_forecasting", "--train_file", file, *flags, "--season", 36)
    short = write(tmp_path / "short.csv", NORTH[:30])
    with pytest.raises(ValueError, match="A window takes 28 values .* and the train data has 26: make them smaller"):
        run("run_forecasting", "--train_file", short, *flags)
    with pytest.raises(ValueError, match="A window takes 28 values .* and the test data has 20"):
        run("run_forecasting", "--train_file", file, "--test_file", write(tmp_path / "t.csv", NORTH[:20]), *flags)
    with pytest.raises(ValueError, match="MASE would divide by zero"):  # before training
        exact = [[*row[:2], i % 24] for i, row in enumerate(NORTH)]
        run("run_forecasting", "--train_file", write(tmp_path / "exact.csv", exact), *flags)


def test_the_loss_of_large_values_with_small_changes(tmp_path):
    """Is that of the small values."""
    errors = []
    for level in (0, 2e9):
        rows = [[*row[:2], f"{row[2] + level:.6f}"] for row in hours("north", 0)]
        file = write(tmp_path / "sales.csv", rows)
        errors.append(run("run_forecasting", "--train_file", file, *FLAGS, "--output_dir", tmp_path / "out"))
    assert errors[1]["eval_mase"] == pytest.approx(errors[0]["eval_mase"], rel=1e-3)
    assert errors[1]["eval_mase_naive_24"] == pytest.approx(errors[0]["eval_mase_naive_24"], rel=1e-3)


def test_a_checkpoint_forecasts_as_many_steps_as_are_asked_for(tmp_path):
    file = write(tmp_path / "sales.csv", NORTH)
    run("run_forecasting", "--train_file", file, *FLAGS, "--output_dir", tmp_path / "out")
    flags = [*FLAGS[:-4], "--prediction_length", 6, "--model_name_or_path", tmp_path / "out"]
    run("run_forecasting", "--train_file", file, *flags, "--output_dir", tmp_path / "more")
    from feedback_transformers import FeedbackForTimeSeriesPrediction

    model = FeedbackForTimeSeriesPrediction.from_pretrained(tmp_path / "more")
    assert model(torch.rand(2, 24)).prediction_outputs.shape == (2, 6)
