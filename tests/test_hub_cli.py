"""feedback-transformers export | card | info, on folders; test_hub_http.py has them on repositories."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import build, make_tokenizer, tokens
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from feedback_transformers import cli
from feedback_transformers.card import split_of
from feedback_transformers.hub import measured
from feedback_transformers.models.configuration_feedback import AUTO_MAP

RESULTS = {"eval_loss": 1.5, "eval_runtime": 3.0, "epoch": 1.0, "train_loss": 2.0, "perplexity": 4.5}


@pytest.fixture
def run(tmp_path):
    """A folder as a training run leaves it: no code, no card."""
    folder = tmp_path / "run"
    build().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    (folder / "all_results.json").write_text(json.dumps(RESULTS))
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 1.5}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


def test_export_completes_a_run(run, tmp_path, capsys):
    target = tmp_path / "out"
    cli.main(["info", str(run)])
    assert "lacks configuration_feedback.py" in capsys.readouterr().out
    cli.main(["export", str(run), str(target), "--dataset", "me/plays", "--name", "It", "--reproduce", "make it"])
    assert torch.equal(AutoModelForCausalLM.from_pretrained(target)(tokens()).logits, build()(tokens()).logits)
    assert AutoTokenizer.from_pretrained(target)("an").input_ids == make_tokenizer()("an").input_ids
    assert json.loads((target / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert (target / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    entries = yaml.safe_load((target / ".eval_results" / "me_plays.yaml").read_text())
    assert {entry["dataset"]["task_id"]: entry["value"] for entry in entries} == {"eval_loss": 1.5, "perplexity": 4.5}
    capsys.readouterr()
    cli.main(["info", str(target)])
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "," not in line[:26])
    assert shown["class"] == "FeedbackForCausalLM" and shown["parameters"] == f"{build().num_parameters():,}"
    assert shown["code"] == "complete" and shown["card"] == "eval_loss 1.5, perplexity 4.5"


def test_card_touches_nothing_else(run, tmp_path):
    before = {file: file.read_bytes() for file in run.iterdir() if file.is_file()}
    (tmp_path / "metrics.json").write_text('{"accuracy": 0.75}')
    cli.main(["card", str(run), "--results", str(tmp_path / "metrics.json"), "--dataset", "me/plays"])
    after = {file.relative_to(run).as_posix(): file for file in run.rglob("*") if file.is_file()}
    assert set(after) - {file.name for file in before} == {
        "README.md",
        ".eval_results/me_plays.yaml",
        "plots/loss.png",
    }
    assert all(file.read_bytes() == content for file, content in before.items())
    card = yaml.safe_load((run / "README.md").read_text().split("---")[1])
    ((metric,),) = [result["metrics"] for result in card["model-index"][0]["results"]]
    assert (metric["type"], metric["value"]) == ("accuracy", 0.75)


def test_a_card_keeps_what_its_author_said(run, tmp_path):
    folder = tmp_path / "kept"
    cli.main(["export", str(run), str(folder), "--dataset", "me/plays", "--license", "other"])
    readme = folder / "README.md"
    readme.write_text(readme.read_text().replace("license: other", "license: other\nlanguage: de", 1))
    said = ["card", str(folder), "--dataset", "me/plays", "--results", str(tmp_path / "results.json")]
    (tmp_path / "results.json").write_text('{"eval_loss": 1.25, "eval_f1": NaN}')
    cli.main(said)
    assert "license: other" in readme.read_text() and "language: de" in readme.read_text()
    assert "nan" not in readme.read_text().split("---")[1] and "1.25" in readme.read_text().split("---")[1]
    cli.main([*said, "--license", "mit"])
    assert "license: mit" in readme.read_text()
    with pytest.raises(SystemExit, match="states results, which this would remove: give --results"):
        cli.main(["card", str(folder)])


def test_what_cannot_be_done_ends_with_a_sentence(run, tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    LoraConfig().save_pretrained(tmp_path / "adapter")
    card, files = ("card", str(run), "--dataset", "a", "--results"), [tmp_path / f"{i}.json" for i in range(3)]
    for file, text in zip(files, ("[1]", '{"loss": "x"}', "no"), strict=True):
        file.write_text(text)
    for arguments, sentence in {
        ("card", str(run)): "name with --dataset what they were measured on",
        ("card", str(tmp_path / "nowhere")): "There is no folder",
        ("export", str(run), str(tmp_path / "out"), "--results", "none.json"): "There is no file none.json",
        ("info", str(tmp_path / "llama")): "not a feedback model",
        ("info", str(tmp_path / "adapter")): "holds an adapter alone: give the folder of the model",
        (*card, str(files[0])): "holds a list: give metrics by name",
        (*card, str(files[1])): "holds loss='x', which is not a number",
        (*card, str(files[2])): "2.json is not JSON",
    }.items():
        with pytest.raises(SystemExit, match=sentence):
            cli.main(list(arguments))


def test_python_m_is_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "feedback_transformers", "card", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("feedback-transformers card: There is no")


def test_only_what_was_measured_of_the_weights_is_a_result():
    assert measured(RESULTS) == {"eval_loss": 1.5, "perplexity": 4.5}
    assert split_of("eval_loss") == ("loss", "validation") and split_of("test_top_5") == ("top_5", "test")
    assert split_of("accuracy") == ("accuracy", None)
