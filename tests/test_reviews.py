"""A newcomer's own file of reviews: what its labels are, empty rows, unbalanced classes, reports and predictions."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build, tokens
from datasets import Dataset, DatasetDict
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from test_examples import examples_on_path, run  # noqa: F401 - a fixture
from transformers import AutoConfig, pipeline

from feedback_transformers import FeedbackForSequenceClassification
from feedback_transformers.training import scripts
from feedback_transformers.training.scripts.rows import split_off
from feedback_transformers.training.scripts.targets import MULTI, NUMBERS, SINGLE, Targets, class_weights

QUICK = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--max_steps", 1]
QUICK += ["--max_train_samples", 100]


def write(path: Path, rows: list) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def reviews(path: Path, labels: list, header: str = "label") -> Path:
    return write(path, [("text", header), *((f'it was, "so to say",\nnumber {i}', x) for i, x in enumerate(labels))])


# What labels are


@pytest.mark.parametrize(
    ("columns", "flags", "expected"),
    [
        ({"label": ["good", "bad", "good"]}, {}, (SINGLE, ["bad", "good"], [1, 0, 1])),
        ({"label": [5, 1, 3]}, {}, (SINGLE, ["1", "3", "5"], [2, 0, 1])),
        ({"label": [5.0, 1.0, 3.0]}, {}, (SINGLE, ["1", "3", "5"], [2, 0, 1])),
        ({"label": [True, False, True]}, {}, (SINGLE, ["False", "True"], [1, 0, 1])),
        ({"label": [5, 1, 3]}, {"problem": NUMBERS}, (NUMBERS, ["label"], [[5.0], [1.0], [3.0]])),
        ({"label": [0.5, 1.0, -3.2]}, {}, (NUMBERS, ["label"], [[0.5], [1.0], [-3.2]])),
        ({"label": [["b", "a"], [], ["a"]]}, {}, (MULTI, ["a", "b"], [[1, 1], [0, 0], [1, 0]])),
        ({"label": [[3], [7, 3], [7]]}, {}, (MULTI, ["3", "7"], [[1, 0], [1, 1], [0, 1]])),
        ({"label": ["['b', 'a']", "[]", "['a']"]}, {}, (MULTI, ["a", "b"], [[1, 1], [0, 0], [1, 0]])),
        ({"label": ["b|a", "a", "b"]}, {"separator": "|"}, (MULTI, ["a", "b"], [[1, 1], [1, 0], [0, 1]])),
        ({"label": ["b|a", "a", "b"]}, {}, (SINGLE, ["a", "b", "b|a"], [2, 0, 1])),
        ({"war": [0, 1, 1], "love": [1, 0, 1]}, {}, (MULTI, ["war", "love"], [[0, 1], [1, 0], [1, 1]])),
        ({"x": [0.1, 1.0, 2.0], "y": [1, 0, 7]}, {}, (NUMBERS, ["x", "y"], [[0.1, 1], [1, 0], [2, 7]])),
    ],
)
def test_what_labels_are(columns, flags, expected):
    rows = Dataset.from_dict({"text": ["a"] * 3, **columns})
    dataset, targets = scripts.read_targets(DatasetDict(train=rows, validation=rows), list(columns), **flags)
    assert (targets.problem, targets.names) == expected[:2]
    for split in ("train", "validation"):
        assert list(dataset[split]["labels"]) == expected[2]


@pytest.mark.parametrize(
    ("train", "test", "flags", "sentence"),
    [
        ([["a"], ["b"]], [["c"], []], {}, "The test data has the class 'c', and train only a, b"),
        (
            [[1, 0, 1], [0, 0, 1]],
            [[0], [1]],
            {},
            "name a class twice: name each class once, or give a column of 0 and",
        ),
        (["a", "b"], ["a", "b"], {"problem": NUMBERS}, "The column 'label' does not hold numbers alone"),
        (["a", "b"], ["a", "b"], {"problem": "ranking"}, "Unknown problem_type 'ranking'; choose one of single_label"),
    ],
)
def test_labels_that_are_refused(train, test, flags, sentence):
    splits = {"train": train, "test": test}
    dataset = DatasetDict({split: Dataset.from_dict({"text": ["a"] * 2, "label": x}) for split, x in splits.items()})
    with pytest.raises(ValueError, match=sentence):
        scripts.read_targets(dataset, ["label"], **flags)


def test_a_checkpoint_decides_what_labels_are():
    rows = DatasetDict(train=Dataset.from_dict({"text": ["a"] * 2, "label": [3, 1]}))
    known = Targets(NUMBERS, ["label"])
    assert scripts.read_targets(rows, ["label"], known=known, trains=False)[1] == known
    assert (
        scripts.read_targets(DatasetDict(test=rows["train"].remove_columns("label")), ["label"], known=known)[1]
        == known
    )


# Empty rows, by the lines of the file


EMPTY = [("text", "label"), ("one", "a"), ("two\nlines", ""), ("", "b"), ("NA", "None"), ("  ", "a"), ("six", "b")]


def test_empty_rows_are_named_by_the_lines_of_the_file(tmp_path):
    """Row 2 begins on line 3 and ends on line 4; "NA" and "None" are words."""
    file = write(tmp_path / "a.csv", EMPTY)
    arguments = scripts.DataArguments(train_file=str(file), validation_split_percentage=30)
    flags = {"texts": {"text_column": "text"}, "labels": {"label_column": ["label"]}}
    with pytest.raises(ValueError, match=r"3 of 6 rows of .*a.csv have no text or label \(lines 3, 5, 7\): fill them"):
        arguments.load(**flags)
    lines = [json.dumps({"text": "a", "label": label}) for label in ("x", None, "y")]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    with pytest.raises(ValueError, match=r"1 of 3 rows of .*a.jsonl has no label \(line 3\)"):
        scripts.DataArguments(train_file=str(tmp_path / "a.jsonl")).load(**flags)


def test_empty_rows_are_dropped_and_counted(tmp_path, capsys):
    file = write(tmp_path / "a.csv", EMPTY)
    arguments = scripts.DataArguments(train_file=str(file), validation_split_percentage=40, drop_empty_rows=True)
    dataset = arguments.load(texts={"text_column": "text"}, labels={"label_column": ["label"]})
    kept = {(row["text"], row["label"]) for rows in dataset.values() for row in rows}
    assert kept == {("one", "a"), ("NA", "None"), ("six", "b")}
    assert "Left out 3 of 6 rows of " in capsys.readouterr().out
    write(tmp_path / "none.csv", [("text", "label"), ("", ""), ("", "")])
    with pytest.raises(ValueError, match="No row of the train data has text"):
        scripts.DataArguments(train_file=str(tmp_path / "none.csv"), drop_empty_rows=True).load(
            texts={"text_column": "text"}
        )


def test_a_split_has_each_class_in_the_same_share():
    labels = ["common"] * 80 + ["rare"] * 20 + ["once"]
    rows = Dataset.from_dict({"label": labels, "row": list(range(101))})
    train, validation = split_off(rows, 0.1, True, "label")
    assert sorted(validation["label"]) == ["common"] * 8 + ["rare"] * 2
    assert sorted([*train["row"], *validation["row"]]) == list(range(101))
    assert list(train["row"]) != sorted(train["row"]), "sorted rows are mixed"


# Training


def test_the_weights_of_classes_and_the_loss():
    """Against scikit-learn and PyTorch."""
    labels = [0] * 6 + [1] * 2 + [2]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights(labels, 3) == pytest.approx(expected.tolist())
    model = build(FeedbackForSequenceClassification, num_labels=3, problem_type=SINGLE)
    scripts.balance_classes(model, Targets(SINGLE, ["a", "b", "c"]), labels)
    batch, answers = tokens(3), torch.tensor([0, 1, 2])
    outputs = model(batch, labels=answers)
    losses = torch.nn.functional.cross_entropy(outputs.logits, answers, reduction="none")
    assert outputs.loss.item() == pytest.approx((losses * torch.tensor(expected)).mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match="is for one class in each row"):
        scripts.balance_classes(model, Targets(MULTI, ["a"]), [])


def test_which_metric_is_watched():
    assert scripts.best_metric(Targets(SINGLE, ["a", "b"]), [0] * 5 + [1] * 4) == "accuracy"
    assert scripts.best_metric(Targets(SINGLE, ["a", "b"]), [0] * 9 + [1] * 4) == "f1_macro"
    assert scripts.best_metric(Targets(MULTI, ["a", "b"]), []) == "f1_macro"
    assert scripts.best_metric(Targets(NUMBERS, ["a"]), []) == "mae"


def test_scores_by_hand():
    single = scripts.score(SINGLE, np.array([[2.0, 1], [0, 1], [0, 1]]), np.array([0, 1, 0]))
    assert single == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3, "f1_macro": 2 / 3})
    several = scripts.score(MULTI, np.array([[1.0, -1], [1, 1]]), np.array([[1, 0], [0, 1]]))
    assert several == pytest.approx({"accuracy": 0.5, "f1": 5 / 6, "f1_macro": 5 / 6})
    numbers = scripts.score(NUMBERS, np.array([[1.0], [4.0]]), np.array([[2.0], [4.0]]))
    assert numbers == pytest.approx({"mae": 0.5, "rmse": 0.5**0.5, "r2": 0.5})


def test_unbalanced_stars_with_a_report_and_predictions(tmp_path, capsys):
    labels = [5] * 30 + [1] * 10
    file, new = (
        reviews(tmp_path / "a.csv", labels),
        write(tmp_path / "new.csv", [("text",), ("good, he said",), ("x",)]),
    )
    flags = ["--train_file", file, "--test_file", new, "--class_weights", "balanced", "--learning_rate", 0]
    out = tmp_path / "out"
    run("run_classification", *flags, "--output_dir", out)
    config = AutoConfig.from_pretrained(out)
    assert (config.problem_type, config.id2label) == (SINGLE, {0: "1", 1: "5"})
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(state["log_history"][-1]["eval_f1_macro"]), "nothing was learned"
    assert "The best checkpoint is the one with the best f1_macro" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [row["text"] for row in rows] == ["good, he said", "x"] and {row["prediction"] for row in rows} <= {
        "1",
        "5",
    }
    assert all(0.5 <= float(row["probability"]) <= 1 for row in rows)
    assert "macro avg" in (out / "classification_report.txt").read_text()
    with Image.open(out / "plots" / "confusion_matrix.png") as picture:
        assert picture.format == "PNG"
    assert "plots/confusion_matrix.png" in (out / "README.md").read_text()


def test_a_checkpoint_predicts_rows_without_labels_alone(tmp_path):
    """Without the training data; and a long text is cut by the pipeline of the saved tokenizer."""
    run(
        "run_classification",
        "--train_file",
        reviews(tmp_path / "a.csv", ["a", "b"] * 10),
        *QUICK,
        "--output_dir",
        tmp_path / "out",
    )
    new = write(tmp_path / "new.csv", [("text", "label"), ("one", ""), ("two", "")])
    asked = ["--model_name_or_path", tmp_path / "out", "--do_train", "false", "--test_file", new]
    assert run("run_classification", *asked, "--output_dir", tmp_path / "again") == {}
    rows = list(csv.DictReader((tmp_path / "again" / "predictions.csv").open()))
    classify = pipeline("text-classification", str(tmp_path / "out"))
    expected = classify(["one", "two"])
    assert [row["prediction"] for row in rows] == [answer["label"] for answer in expected]
    assert [float(row["probability"]) for row in rows] == pytest.approx([x["score"] for x in expected], abs=1e-3)
    assert classify.tokenizer.model_max_length == 512
    assert classify("word " * 3000, truncation=True)[0]["label"] in ("a", "b")


@pytest.mark.parametrize(
    ("labels", "flags", "problem", "metric"),
    [
        ([0.5 * i for i in range(20)], [], NUMBERS, "eval_mae"),
        (list(range(1, 6)) * 4, ["--problem_type", NUMBERS], NUMBERS, "eval_rmse"),
        (["war|love", "war"] * 10, ["--label_separator", "|"], MULTI, "eval_f1_macro"),
    ],
)
def test_numbers_and_several_classes(labels, flags, problem, metric, tmp_path):
    run(
        "run_classification",
        "--train_file",
        reviews(tmp_path / "a.csv", labels),
        *flags,
        "--output_dir",
        tmp_path / "out",
    )
    assert AutoConfig.from_pretrained(tmp_path / "out").problem_type == problem
    assert metric in json.loads((tmp_path / "out" / "all_results.json").read_text())
