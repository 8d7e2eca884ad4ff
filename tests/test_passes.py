"""The number of passes: drawn in training by every script, measured afterwards, and remembered by the config."""

import json
import math

import pytest
import torch
from conftest import arguments, build, dataset, tokens
from test_examples import examples_on_path, run  # noqa: F401 - a fixture
from transformers import AutoConfig, Trainer

from feedback_transformers import FeedbackConfig, FeedbackForCausalLM
from feedback_transformers.models import feedback_loop
from feedback_transformers.training import SampleFeedbackSteps, own_steps, scripts, with_steps

SCRIPTS = {  # the metric that each reports at every number of passes, and the number in its config
    "run_clm": ("perplexity", 4),
    "run_clm_no_trainer": ("perplexity", 4),
    "run_classification": ("test_accuracy", 3),
    "run_seq2seq": ("test_bleu", 2),
    "sft": ("perplexity", 4),
    "finetune_lora": ("perplexity_after_python-docs", 4),
    "retrofit_lora": ("perplexity_after_python-docs", 4),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_reads_the_range_and_reports_every_number(script, tmp_path, capsys):
    flags = ["--min_feedback_steps", 2, "--max_feedback_steps", 5]
    run(script, *flags, "--output_dir", tmp_path)
    metric, own = SCRIPTS[script]
    measured = json.loads((tmp_path / "all_results.json").read_text())
    names = [f"{metric}_step_{number}" for number in range(1, 2 * own + 1)]
    assert all(math.isfinite(measured[name]) for name in names)
    assert f"{metric}_step_{2 * own + 1}" not in measured
    card = (tmp_path / "README.md").read_text()
    assert all(f"\n| {number} | " in card for number in range(1, 2 * own + 1)), "the table of the card"
    assert AutoConfig.from_pretrained(tmp_path).trained_feedback_steps == [
        1 if script == "run_classification" else 2,
        5,
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_range_that_is_none_is_refused(script, tmp_path):
    flags = ["--min_feedback_steps", 9, "--max_feedback_steps", 3, "--output_dir", tmp_path]
    with pytest.raises(ValueError, match="--min_feedback_steps is 9 and --max_feedback_steps is 3"):
        run(script, *flags)


@pytest.mark.parametrize("overrides", ["feedback_signal=none", "solver=sequential"])
def test_a_model_without_passes(overrides, tmp_path):
    """A range that was given is refused; without one, nothing is drawn, reported or remembered."""
    model_args = scripts.ModelArguments(min_feedback_steps=1)
    fields = {"feedback_signal": "none"} if "none" in overrides else {"feedback_axis": "time"}
    with pytest.raises(ValueError, match="makes no passes whose number could be drawn"):
        scripts.steps_to_draw(model_args, build(**fields))
    model = build(trained_feedback_steps=[1, 3], **fields)
    assert scripts.drawn_passes(scripts.ModelArguments(), model) == []
    assert model.config.trained_feedback_steps is None and own_steps(model) is None
    trainer = Trainer(model, arguments(tmp_path))
    assert scripts.measure_passes(trainer, "loss", lambda: 0.0) == {}


@pytest.mark.parametrize(
    ("fields", "flags", "expected"),
    [
        ({}, {}, (1, 6)),
        ({"feedback_axis": "time", "solver": "jacobi", "solver_steps": 4}, {}, (1, 8)),
        ({"trained_feedback_steps": [2, 4]}, {}, (2, 4)),
        ({"trained_feedback_steps": [5, 7]}, {}, (1, 6)),
        ({"halting": "learned"}, {}, (3, 3)),
        ({}, {"min_feedback_steps": 2}, (2, 6)),
        ({}, {"max_feedback_steps": 2}, (1, 2)),
        ({}, {"min_feedback_steps": 8}, (8, 8)),
        ({"trained_feedback_steps": [2, 4]}, {"min_feedback_steps": 1, "max_feedback_steps": 9}, (1, 9)),
    ],
)
def test_the_range_that_is_drawn_from(fields, flags, expected):
    assert scripts.steps_to_draw(scripts.ModelArguments(**flags), build(**fields)) == expected


@pytest.mark.parametrize("fields", [{}, {"feedback_axis": "time", "solver": "jacobi"}], ids=["depth", "time"])
def test_the_measure_is_made_with_that_number_of_passes(fields, tmp_path):
    model, batch = build(**fields), tokens(4)
    own = own_steps(model)

    def measure() -> float:
        return model(batch, labels=batch).loss.item()

    with torch.no_grad():
        found = scripts.measure_passes(Trainer(model, arguments(tmp_path)), "loss", measure)
        for number in range(1, 2 * own + 1):
            loss = model(batch, labels=batch, num_feedback_steps=number).loss.item()
            assert found[f"loss_step_{number}"] == pytest.approx(loss, abs=1e-6)
    assert len({round(value, 4) for value in found.values()}) > 2 and own_steps(model) == own
    with pytest.raises(KeyboardInterrupt), with_steps(model, 9):
        raise KeyboardInterrupt
    assert own_steps(model) == own


# The config field


def test_training_writes_the_range_and_a_checkpoint_keeps_it(tmp_path):
    trainer = Trainer(build(), arguments(tmp_path), train_dataset=dataset(), callbacks=[SampleFeedbackSteps(2, 5)])
    trainer.train()
    assert FeedbackForCausalLM.from_pretrained(tmp_path / "checkpoint-4").config.trained_feedback_steps == [2, 5]
    for fields in ({"supervision": "all"}, {"halting": "learned"}):
        model = build(**fields)
        scripts.drawn_passes(scripts.ModelArguments(min_feedback_steps=2, max_feedback_steps=5), model)
        assert model.config.trained_feedback_steps == [1, 5], "a loss after every pass trains each of them"


@pytest.mark.parametrize("steps", [[3], [3, 2], [0, 2], [1, 2, 3], [1.5, 2], []])
def test_a_range_that_the_config_refuses(steps):
    with pytest.raises(Exception, match="trained_feedback_steps"):
        FeedbackConfig(trained_feedback_steps=steps)


def test_another_number_of_passes_warns_once(monkeypatch):
    said = []
    monkeypatch.setattr(feedback_loop.logger, "warning_once", said.append)
    model = build(trained_feedback_steps=[2, 4])
    for number in (None, 2, 4):
        model(tokens(), num_feedback_steps=number)
    assert not said
    model.generate(tokens(), max_new_tokens=3, num_feedback_steps=5, pad_token_id=0)
    model(tokens(), num_feedback_steps=1)
    model.train()(tokens(), num_feedback_steps=1)
    assert len(said) == 4 and len(set(said)) == 1 and "was not trained with" in said[0]
