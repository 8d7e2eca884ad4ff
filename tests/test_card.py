"""The model card: what it says, what it asks for, and that its snippet runs."""

import re

import pytest
import torch
import yaml
from conftest import build, make_tokenizer
from PIL import Image
from test_heads import HEADS
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from feedback_transformers import (
    FeedbackForCausalLM,
    FeedbackForConditionalGeneration,
    FeedbackForImageClassification,
    FeedbackForObjectDetection,
    FeedbackModel,
    hub,
    retrofit,
)
from feedback_transformers.card import CAPTIONS, PIPELINES, USAGE, model_card, public_command, rounded


def metadata(card) -> dict:
    return yaml.safe_load(str(card).split("---")[1])


@pytest.mark.parametrize("head", [head for head in HEADS if head is not FeedbackModel], ids=lambda head: head.__name__)
def test_the_snippet_runs(head, tmp_path, monkeypatch, capsys):
    model = build(head, **HEADS[head])
    size, channels = 8, getattr(model.config.input_config, "num_channels", 1)
    like = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    processor = {
        FeedbackForImageClassification: ViTImageProcessorPil(size={"height": size, "width": size}, **like),
        FeedbackForObjectDetection: DetrImageProcessorPil(do_resize=False, image_mean=0.5, image_std=0.5),
    }.get(head) or make_tokenizer()
    hub.export(model, tmp_path / "it", processor, repository=str(tmp_path / "it"), license="mit")
    Image.new("L" if channels == 1 else "RGB", (size, size)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "it" / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    exec(code, {})
    assert capsys.readouterr().out  # a span of words may be an empty line


def test_the_snippet_of_a_captioner(tmp_path, monkeypatch, capsys):
    """It has an image processor and a tokenizer."""
    ids = {"pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}
    model = build(FeedbackForConditionalGeneration, is_encoder_decoder=True, source_config="images", **ids)
    hub.export(model, tmp_path / "it", make_tokenizer(), repository=str(tmp_path / "it"), license="mit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "it")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    card = (tmp_path / "it" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(code, {})
    assert "pipeline_tag: image-to-text" in card and "AutoModelForImageTextToText" in code
    assert capsys.readouterr().out


def test_every_pipeline_has_a_snippet():
    assert {*PIPELINES.values(), CAPTIONS} == set(USAGE)


def test_results_are_words_with_the_data_set_of_each():
    results = {
        "a": {"eval_loss": 1.23456789, "eval_loss_step_1": 2.0, "eval_loss_step_2": 1.23456789},
        "b": {"test_accuracy": 0.5, "number of rows": 123456.7},
    }
    card = model_card(build(), results, license="mit")
    text = str(card)
    for said in (
        "On the validation split of `a`:\n\n- loss is 1.235 (lower is better).\n",
        "| passes | loss |\n|---|---|\n| 1 | 2.0 |\n| 2 | 1.235 |\n",
        "On the test split of `b`:\n\n- accuracy is 0.5 (higher is better).\n",
        "On `b`:\n\n- number of rows is 123,457.\n",
    ):
        assert said in text, said
    index = metadata(card)["model-index"][0]["results"]
    found = {(each["dataset"]["name"], m["name"]): m["value"] for each in index for m in each["metrics"]}
    assert found[("a", "eval_loss")] == 1.235 and found[("b", "test_accuracy")] == 0.5
    assert rounded(float("inf")) == float("inf") and rounded(3) == 3


def test_what_only_the_author_knows_is_asked_for():
    card = model_card(build(), {"accuracy": 0.5})
    assert "license" not in metadata(card) and "The author has not named a license" in str(card)
    assert "a data set that the author has not named" in str(card) and "has not described the training" in str(card)
    said = {"license": "mit", "language": "de", "base_model": "me/base", "training": {"learning rate": 0.001}}
    card = model_card(build(), {}, **said, good_at="rhymes.", limits="prose.")
    for key in ("license", "language", "base_model"):
        assert metadata(card)[key] == said[key] and said[key] in str(card).partition("# feedback model")[2]
    for said in ("| learning rate | 0.001 |", "- Good at: rhymes.", "- Limits: prose.", "transformers 5."):
        assert said in str(card), said


def test_a_retrofit_names_its_original(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3}
    original = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    for name, expected in {"someone/llama": "someone/llama", str(tmp_path): None}.items():
        original.config.name_or_path = name
        retrofitted = retrofit(original, encoder_layers=1, decoder_layers=1)
        retrofitted.save_pretrained(tmp_path / "it")
        for model in (retrofitted, FeedbackForCausalLM.from_pretrained(tmp_path / "it")):
            assert metadata(model_card(model, {})).get("base_model") == expected


def test_a_command_shows_no_place_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "reviews.csv").write_text("")
    for command, shown in {
        f"{tmp_path}/bin/python examples/x.py --output_dir {tmp_path} --seed 1": "python examples/x.py --seed 1",
        "python x.py --output_dir=runs/a --train_file data/reviews.csv": "python x.py --train_file reviews.csv",
        "python x.py --train_file='~/my texts/*.txt'": "python x.py '--train_file=*.txt'",
        "python x.py --tokenizer data/reviews.csv": "python x.py --tokenizer reviews.csv",
        "python x.py --model_name_or_path me/model --source a b": None,
        "python -m benchmarks --seeds 0; make it": "python -m benchmarks --seeds 0\nmake it",
    }.items():
        assert public_command(command) == (command if shown is None else shown)


def test_symbols_say_what_they_are_in_this_model():
    text = str(model_card(build(feedback_axis="time", feedback_type="gru", feedback_signal="output"), {}))
    assert "| t | the step | the positions |" in text and "its own prediction from the position before" in text
    assert "| f, h_t | the cell and its state | gru, 1 layer |" in text
    text = str(model_card(build(num_feedback_steps=5, num_decoder_layers=0, trained_feedback_steps=[1, 9]), {}))
    assert "| t | the step | 5 passes over all positions |" in text and "trained with 1 to 9 passes" in text
    assert "| g, y_t | the decoder and its output | none |" in text
    assert "control without feedback" in str(model_card(build(feedback_signal="none"), {}))
