"""Every example runs, on the packaged data and on files of one's own, and says plainly what is wrong with an input."""

import csv
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from feedback_transformers import data, retrofit, unretrofit
from feedback_transformers.models.configuration_feedback import PRESETS

EXAMPLES = Path(__file__).parent.parent / "examples"
METRICS = {
    "run_clm": ["train_loss", "eval_loss", "perplexity"],
    "run_clm_no_trainer": ["eval_loss", "perplexity"],
    "run_classification": ["test_accuracy", "test_f1"],
    "run_seq2seq": ["test_bleu", "test_chrf", "test_bleu_of_the_source"],
    "run_image_classification": ["test_accuracy", "test_accuracy_step_1", "test_accuracy_step_4"],
    "run_object_detection": ["test_map", "test_map_50", "test_map_50_step_1", "test_map_50_step_4"],
    "run_image_to_image": ["test_psnr", "test_psnr_bicubic", "test_psnr_step_1", "test_psnr_step_4"],
    "run_forecasting": ["test_mase", "test_mase_naive_24", "test_mase_naive_168"],
    "run_captioning": ["test_exact_match_without_the_image", "test_exact_match", "test_exact_match_step_6"],
    "run_video_classification": ["test_accuracy_motion", "test_accuracy", "test_accuracy_step_8"],
    "sft": ["train_loss", "eval_loss", "perplexity", "perplexity_step_8"],
    "finetune_lora": ["perplexity_before_python-docs", "perplexity_after_python-docs", "perplexity_after_shakespeare"],
    "retrofit_lora": [
        "perplexity_original_python-docs",
        "perplexity_before_python-docs_step_4",
        "perplexity_after_python-docs_step_1",
        "perplexity_after_shakespeare_step_4",
    ],
}


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # as `python examples/run_clm.py` has it
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(script, *arguments, smoke=True):
    progress = ["--disable_tqdm", "true"] if script not in ("run_clm_no_trainer", "demo") else []
    flags = ["--smoke", *progress] if smoke else []
    return importlib.import_module(script).main([*flags, *map(str, arguments)])


def results(folder):
    return json.loads((folder / "all_results.json").read_text())


def test_minimal_is_short():
    assert len((EXAMPLES / "minimal.py").read_text().splitlines()) <= 60


@pytest.mark.slow
def test_minimal_runs(tmp_path):
    script = EXAMPLES / "minimal.py"
    printed = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=500
    ).stdout
    assert "4 passes: validation loss" in printed and (tmp_path / "runs/minimal/model.safetensors").exists()


def test_there_is_a_test_and_a_row_of_the_readme_for_every_example():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*METRICS, "demo", "minimal"}
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"[{script}.py]({script}.py)" in readme for script in scripts)


@pytest.mark.parametrize("script", METRICS)
def test_smoke(script, tmp_path):
    run(script, "--output_dir", tmp_path)
    measured = results(tmp_path)
    assert all(np.isfinite(measured[name]) for name in METRICS[script])
    assert AutoConfig.from_pretrained(tmp_path).model_type == "feedback"
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "modeling_feedback.py").exists()
    card = (tmp_path / "README.md").read_text()
    assert f"python examples/{script}.py --smoke" in card
    assert METRICS[script][-1] in card


def test_demo(tmp_path, capsys):
    files = run("demo", "--output_dir", tmp_path)
    assert files and all(file.exists() and file.stat().st_size > 500 for file in files)
    printed = capsys.readouterr().out
    assert all(f"=== {number}. " in printed for number in range(1, 8))
    assert all(str(file) in printed.split("=== 7. ")[1] for file in files)
    with Image.open(tmp_path / "predictions_over_steps.png") as picture:
        assert picture.format == "PNG"
    assert "perplexity of the feed-forward control" in (tmp_path / "model" / "README.md").read_text()
    sizes = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).num_parameters() for name in ("feedback", "control")
    ]
    assert sizes[0] == sizes[1]


def test_as_a_command(tmp_path):
    command = [sys.executable, EXAMPLES / "run_clm.py", "--smoke", "--output_dir", tmp_path]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "perplexity" in finished.stdout


# Files of one's own


@pytest.fixture
def verses(tmp_path):
    file = tmp_path / "verses.txt"
    file.write_text("".join(f"line {i} of a small text\n" for i in range(200)))
    return file


@pytest.mark.parametrize("script", ["run_clm", "run_clm_no_trainer"])
def test_text_file(script, verses, tmp_path):
    run(script, "--train_file", verses, "--output_dir", tmp_path / "out", "--tokenizer", "bpe", "--vocab_size", 300)
    assert results(tmp_path / "out")["perplexity"] > 1
    assert "verses.txt" in (tmp_path / "out" / "README.md").read_text()


def test_a_text_file_keeps_its_line_breaks_and_its_end_is_for_validation(verses):
    scripts = importlib.import_module("feedback_transformers.training.scripts")
    dataset = scripts.DataArguments(train_file=str(verses)).load(shuffle=False)
    assert "".join([*dataset["train"]["text"], *dataset["validation"]["text"]]) == verses.read_text()
    assert len(dataset["validation"]) == 20


def test_csv_of_texts_and_names_of_classes(tmp_path):
    for name in ("train", "validation"):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["review", "stars"])
            words = ("bad", "good", "odd")
            rows.writerows([f"what a {word} film, number {i}", word] for i in range(12) for word in words)
    flags = ["--text_column", "review", "--label_column", "stars", "--output_dir", tmp_path / "out"]
    for name in ("train", "validation"):
        flags += [f"--{name}_file", tmp_path / f"{name}.csv"]
    run("run_classification", *flags)
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "bad", 1: "good", 2: "odd"}
    assert "eval_accuracy" in results(tmp_path / "out") and "test_accuracy" not in results(tmp_path / "out")


def test_json_lines_of_pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"en": f"number {i}", "fr": f"nombre {i}"}) + "\n" for i in range(40)))
    columns = ["--source_column", "en", "--target_column", "fr", "--metric", "rouge"]
    run("run_seq2seq", "--train_file", file, "--test_file", file, *columns, "--output_dir", tmp_path / "out")
    assert "test_rougeL" in results(tmp_path / "out")


def test_csv_of_a_series(tmp_path):
    file = tmp_path / "sales.csv"
    file.write_text("sales\n" + "".join(f"{i % 7 + 0.1 * (i % 3)}\n" for i in range(300)))
    flags = ["--value_column", "sales", "--context_length", 14, "--prediction_length", 7, "--season", 7]
    run("run_forecasting", "--train_file", file, "--test_file", file, *flags, "--output_dir", tmp_path / "out")
    measured = results(tmp_path / "out")
    assert measured["test_mase"] > 0 and "test_mase_naive_168" not in measured, "168 steps back is before the window"


def test_folder_of_images(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    sizes = "input_config.patch_size=4,hidden_size=16"
    flags = ["--image_size", 16, "--config_overrides", sizes, "--output_dir", tmp_path / "out"]
    run("run_image_classification", "--train_file", tmp_path / "images", *flags)
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert (config.input_config.num_channels, config.id2label) == (3, {0: "cat", 1: "dog"})


def test_arguments_in_a_json_file(tmp_path):
    given = {"smoke": True, "output_dir": str(tmp_path / "out"), "max_steps": 1, "preset": "gru", "disable_tqdm": True}
    (tmp_path / "arguments.json").write_text(json.dumps(given))
    run("run_clm", tmp_path / "arguments.json", smoke=False)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.feedback_type, config.hidden_size) == ("gru", 32), "the preset, and the sizes of --smoke"
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 1


CAUSAL = [name for name, fields in PRESETS.items() if fields.get("is_causal", True) and name != "gru"]


@pytest.mark.parametrize("preset", CAUSAL)
def test_every_causal_preset_trains(preset, tmp_path):
    """Also those that go position by position, with no passes to draw."""
    run("run_clm", "--preset", preset, "--max_steps", 1, "--eval_strategy", "no", "--output_dir", tmp_path)
    assert "eval_loss" in results(tmp_path)


# Going on


@pytest.mark.parametrize("script", ["run_clm", "run_clm_no_trainer"])
def test_a_resumed_run_ends_where_the_whole_one_does(script, tmp_path):
    checkpoint = {"run_clm": "checkpoint-2", "run_clm_no_trainer": "step_2"}[script]
    text = ["--dataset_name", "python-docs"]
    whole = run(script, *text, "--output_dir", tmp_path / "whole")
    again = ["--output_dir", tmp_path / "again", "--resume_from_checkpoint"]
    resumed = run(script, *text, *again, tmp_path / "whole" / checkpoint)
    assert resumed["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)
    last = run(script, *text, "--output_dir", tmp_path / "whole", "--resume_from_checkpoint", "true")
    assert last["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6), "nothing was left to train"


def test_a_resumed_loop_with_an_update_of_what_is_left_of_an_epoch(tmp_path):
    """Five batches an epoch, two an update."""
    few = ["--max_train_samples", 5, "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2]
    few += ["--max_train_steps", 6, "--checkpointing_steps", 4, "--learning_rate", 1e-2]
    whole = run("run_clm_no_trainer", *few, "--output_dir", tmp_path / "whole")
    going_on = ["--output_dir", tmp_path / "again", "--resume_from_checkpoint", tmp_path / "whole" / "step_4"]
    assert run("run_clm_no_trainer", *few, *going_on)["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("axis", ["depth", "time"])
def test_a_resumed_retrofit_has_the_losses_of_the_whole_one(axis, tmp_path):
    """With the steps of its curriculum, and the divergence from the original."""
    flags = ["--axis", axis, "--max_steps", 6, "--curriculum", 1, "--lora_dropout", 0.1, "--distillation_weight", 1]
    whole = run("retrofit_lora", *flags, "--save_total_limit", 3, "--output_dir", tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again = ["--output_dir", tmp_path / "again", "--resume_from_checkpoint", checkpoint]
    assert run("retrofit_lora", *flags, *again) == pytest.approx(whole, rel=1e-6)
    losses = [
        [entry["loss"] for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"][:6]]
        for folder in (tmp_path / "whole", tmp_path / "again")
    ]
    assert len(losses[0]) == 6 and losses[0] == losses[1]


@pytest.mark.parametrize("axis", ["depth", "time"])
def test_what_a_retrofit_leaves(axis, tmp_path):
    """The merged model loads by its config alone, and is the original with the adapter, whose share was trained."""
    flags = ["--axis", axis, "--learning_rate", 1e-2, "--config_overrides", "feedback_noise=0.001"]
    measured = run("retrofit_lora", *flags, "--output_dir", tmp_path)
    for text in ("python-docs", "shakespeare"):
        for steps in (1, 4):
            before = measured[f"perplexity_before_{text}_step_{steps}"]
            assert before == pytest.approx(measured[f"perplexity_original_{text}"], rel=1e-5), "exact at birth"
    assert measured["perplexity_after_python-docs_step_4"] < measured["perplexity_before_python-docs_step_4"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert merged.config.retrofitted_from == "LlamaForCausalLM" and merged.config.feedback_axis == axis
    assert merged.config.feedback_noise == 0.001
    layers = [getattr(merged.config, f"num_{part}_layers") for part in ("encoder", "feedback", "decoder")]
    assert layers == [1, 1, 1]
    adapted = PeftModel.from_pretrained(retrofit(tmp_path / "base", 1, 1, 4, axis), tmp_path / "adapter").eval()
    batch = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert (merged(batch).logits - adapted(batch).logits).abs().max() < 1e-5
        assert (merged(batch).logits - unretrofit(merged)(batch).logits).abs().max() > 1e-5, "the feedback is open"


def test_the_body_of_a_language_model_classifies(tmp_path):
    run("run_clm", "--output_dir", tmp_path / "clm")
    run("run_classification", "--model_name_or_path", tmp_path / "clm", "--output_dir", tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").feedback_axis == "time"
    assert "test_accuracy" in results(tmp_path / "out")


@pytest.mark.parametrize("script", ["run_clm", "finetune_lora", "run_clm_no_trainer"])
def test_a_checkpoint_that_is_no_feedback_model(script, tmp_path):
    """Before it is trained, rather than when it is published."""
    texts = data.load("shakespeare")["train"]["text"]
    tokenizer = data.characters(texts)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain is a model of type 'llama', not a feedback model: examples/retrofit_"):
        run(script, "--model_name_or_path", tmp_path / "plain", "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("flags", [["--token", "hf_secret"], ["--hub-token=hf_secret"]])
def test_no_token_is_written_to_the_card(flags, tmp_path):
    run("run_forecasting", "--output_dir", tmp_path, *flags)
    card = (tmp_path / "README.md").read_text()
    assert "token" in card and "hf_secret" not in card


# What is wrong, in one sentence


def test_an_empty_file(tmp_path):
    for name, text in {"empty.txt": "", "blank.txt": "\n \n", "head.csv": "text,label\n"}.items():
        (tmp_path / name).write_text(text)
    for name in ("empty.txt", "blank.txt"):
        with pytest.raises(ValueError, match=f"{name} is empty"):
            run("run_clm", "--train_file", tmp_path / name, "--output_dir", tmp_path / "out")
    with pytest.raises(ValueError, match="has no examples"):
        run("run_classification", "--train_file", tmp_path / "head.csv", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_text_shorter_than_a_block(tmp_path):
    (tmp_path / "short.txt").write_text("a\n" * 12)
    with pytest.raises(ValueError, match="less than one block of 32"):
        run("run_clm", "--train_file", tmp_path / "short.txt", "--output_dir", tmp_path / "out")


def test_too_few_examples_to_split(tmp_path):
    (tmp_path / "one.txt").write_text("a single line that is long enough for a block of tokens")
    with pytest.raises(ValueError, match="give --validation_file"):
        run("run_clm", "--train_file", tmp_path / "one.txt", "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    "flags, error, sentence",
    [
        (["--train_file", "nowhere.txt"], FileNotFoundError, "nowhere.txt does not exist"),
        (["--train_file", __file__], ValueError, "it must be one of txt, csv"),
        (["--config_overrides", "width=3"], ValueError, "Unknown field 'width' in config_overrides: it must be"),
        (["--config_overrides", "hiden_size=64"], ValueError, "did you mean hidden_size"),
        (["--dataset_name", "shakespear"], ValueError, "did you mean shakespeare"),
        (["--model_name_or_path", "me/it", "--preset", "gru"], ValueError, "preset and config_overrides are of a new"),
        (["--config_overrides", "hidden_size"], ValueError, "not of the form name=value"),
        (["--preset", "transformer-9000"], ValueError, "Unknown preset 'transformer-9000'; choose one of"),
        (
            ["--min_feedback_steps", "5", "--max_feedback_steps", "2"],
            ValueError,
            "steps is 5 and --max_feedback_steps is 2",
        ),
        (["--push_to_hub", "true", "--hub_token", "hf_secret"], ValueError, "leave --hub_token out"),
    ],
)
def test_wrong_arguments(flags, error, sentence, tmp_path):
    with pytest.raises(error, match=sentence):
        run("run_clm", *flags, "--output_dir", tmp_path)


def test_a_series_shorter_than_a_window(tmp_path):
    (tmp_path / "short.csv").write_text("value\n" + "1\n2\n" * 20)
    with pytest.raises(ValueError, match="A window takes 192 values"):
        run("run_forecasting", "--train_file", tmp_path / "short.csv", "--output_dir", tmp_path / "out")


@pytest.mark.parametrize("script", ["finetune_lora", "retrofit_lora"])
def test_lora_without_a_checkpoint(script, tmp_path):
    with pytest.raises(ValueError, match="Give --model_name_or_path"):
        run(script, "--output_dir", tmp_path, smoke=False)
