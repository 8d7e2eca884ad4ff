"""Data of one's own in the examples: classes of several files, columns, sorted rows, and what an interrupt leaves."""

import csv
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import build, tokens
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image
from test_examples import examples_on_path, run  # noqa: F401 - a fixture
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import PaddingStrategy

from feedback_transformers import data
from feedback_transformers.training import Distill, SampleFeedbackSteps, StopOnNonFinite, scripts, train_safely
from feedback_transformers.training.callbacks import loops_of


def splits(**labels) -> DatasetDict:
    columns = {split: {"text": ["a"] * len(values), "label": values} for split, values in labels.items()}
    return DatasetDict({split: Dataset.from_dict(column) for split, column in columns.items()})


def numbers(dataset: DatasetDict) -> dict[str, list[int]]:
    return {split: list(rows["label"]) for split, rows in dataset.items()}


def test_classes_are_those_of_train():
    mixed = scripts.with_classes(splits(train=[1.0, 0.0, 3.0], validation=[0, 3]), "label")
    assert (
        mixed["train"].features["label"] == mixed["validation"].features["label"] == ClassLabel(names=["0", "1", "3"])
    )
    assert numbers(mixed) == {"train": [1, 0, 2], "validation": [0, 2]}
    apart = splits(train=[0, 1, 2], validation=[1, 0])
    apart["train"] = apart["train"].cast_column("label", ClassLabel(names=["apple", "pear", "plum"]))
    apart["validation"] = apart["validation"].cast_column("label", ClassLabel(names=["pear", "plum"]))  # of a folder
    assert numbers(scripts.with_classes(apart, "label")) == {"train": [0, 1, 2], "validation": [2, 1]}
    known = scripts.with_classes(splits(train=["b", "c"]), "label", known=["c", "a", "b"])
    assert numbers(known) == {"train": [2, 0]} and known["train"].features["label"].names == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("labels", "known", "sentence"),
    [
        ({"train": ["a", "b"], "test": ["c"]}, [], "The test data has the class 'c', and train only a, b"),
        ({"train": ["a", "b"]}, ["b"], "The train data has the class 'a', and the checkpoint only b"),
        ({"train": ["a", None]}, [], "Row 1 of the train data has no label: give it a class"),
        ({"train": [1.0, float("nan")]}, [], "Row 1 of the train data has no label"),
    ],
)
def test_classes_that_are_refused(labels, known, sentence):
    with pytest.raises(ValueError, match=sentence):
        scripts.with_classes(splits(**labels), "label", known)


def test_columns_that_are_refused():
    with pytest.raises(ValueError, match="train data has no column 'words', only 'text', 'label': give --text_column"):
        scripts.check_columns(splits(train=["a"]), text_column="words")
    with pytest.raises(ValueError, match="Row 0 of the train data has 7 as its label, which is no text"):
        scripts.check_columns(splits(train=[7]), target_column="label")


def test_a_part_of_sorted_rows_has_all_classes():
    arguments = scripts.DataArguments(max_train_samples=30)
    part = arguments.limit(splits(train=["a"] * 50 + ["b"] * 50), shuffle=True)
    assert len(part["train"]) == 30 and set(part["train"]["label"]) == {"a", "b"}
    assert set(arguments.limit(splits(train=["a"] * 50 + ["b"] * 50))["train"]["label"]) == {"a"}


def folder_of_images(folder, **colors) -> str:
    for name, color in colors.items():
        (folder / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((28, 28, 3), color, dtype=np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


def test_a_checkpoint_is_asked_in_its_own_classes(tmp_path):
    """A folder with some of them only, whose classes would be numbered otherwise, also without training."""
    colors = {"apple": (250, 0, 0), "pear": (0, 250, 0), "plum": (0, 0, 250)}
    whole = folder_of_images(tmp_path / "train", **colors)
    some = folder_of_images(tmp_path / "some", pear=colors["pear"], plum=colors["plum"])
    overrides = "hidden_size=16,intermediate_size=32,input_config.num_channels=3"
    flags = ["--max_steps", 60, "--learning_rate", 3e-3, "--max_train_samples", 36, "--config_overrides", overrides]
    files = ["--train_file", whole, "--validation_file", some]
    first = run("run_image_classification", *files, *flags, "--output_dir", tmp_path / "out")
    assert first["eval_accuracy"] == 1
    asked = ["--model_name_or_path", tmp_path / "out", "--do_train", "false", "--output_dir", tmp_path / "again"]
    files = ["--train_file", some, "--validation_file", some]
    assert run("run_image_classification", *files, *asked)["eval_accuracy"] == 1


def test_a_classifier_of_texts_is_asked_in_its_own_classes(tmp_path):
    def file(name, labels):
        with open(tmp_path / name, "w", newline="") as text:
            csv.writer(text).writerows([("text", "label"), *((f"it is {label}", label) for label in labels * 8)])
        return tmp_path / name

    flags = ["--max_steps", 30, "--learning_rate", 3e-3, "--max_train_samples", 100]
    flags += ["--load_best_model_at_end", "false"]  # two rows are right from the first epoch on
    first = ["--train_file", file("a.csv", ["dog", "cat", "owl"]), *flags, "--output_dir", tmp_path / "out"]
    assert run("run_classification", *first)["eval_accuracy"] == 1
    asked = ["--model_name_or_path", tmp_path / "out", "--do_train", "false", "--output_dir", tmp_path / "again"]
    assert run("run_classification", "--train_file", file("b.csv", ["dog", "owl"]), *asked)["eval_accuracy"] == 1
    with pytest.raises(ValueError, match="has the class 'ant', and the checkpoint only cat, dog, owl"):
        run("run_classification", "--train_file", file("c.csv", ["ant", "dog", "owl"]), *asked)
    more = ["--train_file", file("d.csv", ["ant", "bee", "cow", "dog"]), *flags, "--output_dir", tmp_path / "more"]
    assert run("run_classification", "--model_name_or_path", tmp_path / "out", *more)["eval_accuracy"] > 0.5
    learned = AutoConfig.from_pretrained(tmp_path / "more").id2label
    assert learned == {0: "ant", 1: "bee", 2: "cow", 3: "dog"}


def test_other_arguments_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown metric 'meteor'; choose bleu or rouge"):
        run("run_seq2seq", "--metric", "meteor", "--output_dir", tmp_path)
    for script in ("finetune_lora", "retrofit_lora"):
        with pytest.raises(ValueError, match="leave --do_train out"):
            run(script, "--do_train", "false", "--model_name_or_path", tmp_path, "--output_dir", tmp_path)
    with pytest.raises(ValueError, match="hub_t"):
        run("run_clm_no_trainer", "--hub_t", "hf_secret", "--output_dir", tmp_path)
    with pytest.raises(ValueError, match="The series has 1 gaps, or infinite numbers, the first at 3: fill them"):
        data.windows([1.0, 2.0, 3.0, float("nan"), 5.0, 6.0], 2, 1)


class Interrupt(TrainerCallback):
    def on_substep_end(self, *args, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing_in_the_model(tmp_path):
    model = build(num_feedback_steps=2)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, max_steps=2, gradient_accumulation_steps=2, save_strategy="no"
    )
    callbacks = [SampleFeedbackSteps(7, 7), Distill(build(), 100.0), StopOnNonFinite()]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[*callbacks, Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        train_safely(trainer)
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert loops_of(model)[0].num_steps is None and not callbacks[2].batches
    trainer.remove_callback(Interrupt)
    train_safely(trainer)
    assert not model._forward_hooks and torch.isfinite(model(tokens()).logits).all()


# Folders and patterns of texts


def test_a_folder_or_a_pattern_of_texts(tmp_path):
    for name, text in {"b/two.txt": "two\nlines\n", "a.txt": "one\n", "empty.txt": "", "c.md": "not this"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for given in (tmp_path, tmp_path / "**" / "*.txt"):
        dataset = scripts.DataArguments(train_file=str(given), validation_split_percentage=40).load(shuffle=False)
        assert [*dataset["train"]["text"], *dataset["validation"]["text"]] == ["one\n", "two\n", "lines\n"]
    with pytest.raises(FileNotFoundError, match=r"\*.json matches no file"):
        scripts.DataArguments(train_file=str(tmp_path / "*.json")).load()
    (tmp_path / "d.csv").write_text("text\none\n")
    with pytest.raises(ValueError, match=r"holds files of several kinds \(csv, txt\): give a pattern of one"):
        scripts.DataArguments(train_file=str(tmp_path)).load()


def test_a_language_model_of_a_folder_of_texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(5):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"a small text, number {i}\n" * 20)
    assert run("run_clm", "--train_file", tmp_path / "texts", "--output_dir", tmp_path / "out")["perplexity"] > 1


@pytest.mark.parametrize("script", ["run_clm", "run_clm_no_trainer", "run_seq2seq"])
def test_the_saved_tokenizer_knows_how_much_the_model_takes(script, tmp_path):
    run(script, "--output_dir", tmp_path)
    tokenizer, config = AutoTokenizer.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == config.max_position_embeddings
    assert len(tokenizer("a " * 5000, truncation=True)["input_ids"]) == config.max_position_embeddings


def test_no_line_of_other_packages_before_a_command():
    command = [sys.executable, Path(__file__).parent.parent / "examples" / "finetune_lora.py", "--help"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0 and finished.stderr == ""


def test_other_lines_of_these_loggers_stay(caplog):
    logging.getLogger("torchao").warning("Failed to load /x/_C.so: no")
    logging.getLogger("torchao").warning("this kernel is slow")
    logging.getLogger("torch.utils._pytree").warning("%s is an Enum subclass and so on", PaddingStrategy)
    assert [record.getMessage()[:20] for record in caplog.records if "_C.so" not in record.getMessage()] == [
        "this kernel is slow",
        str(PaddingStrategy)[:20],
    ]
