"""Pictures: what is drawn, and that the files are pictures."""

from itertools import pairwise

import pytest
import torch
from conftest import TEXT as READABLE
from conftest import assert_close, build, make_tokenizer
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_heads import HEADS
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from feedback_transformers import (
    FeedbackConfig,
    FeedbackForCausalLM,
    FeedbackForConditionalGeneration,
    FeedbackForImageClassification,
    FeedbackForMaskedLM,
    FeedbackForQuestionAnswering,
    FeedbackForSequenceClassification,
    FeedbackForTimeSeriesPrediction,
    FeedbackForTokenClassification,
    FeedbackModel,
    data,
    visualize,
)

TEXT = "to be, or not to be\n"
HISTORY = [
    {"step": 10, "loss": 3.0, "epoch": 0.1},
    {"step": 20, "eval_loss": 2.5, "eval_runtime": 1.0},
    {"step": 20, "loss": 2.0},
    {"step": 20, "train_runtime": 9.0, "train_loss": 2.5},
]


def language_model(**fields):
    torch.manual_seed(0)
    tokenizer = data.characters([TEXT])
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": len(tokenizer), "initializer_range": 0.5}
    return FeedbackForCausalLM(FeedbackConfig(**sizes, **fields)).eval(), tokenizer


def test_loss_curves(tmp_path):
    figure = visualize.loss_curves({"a": HISTORY, "b": HISTORY[:1]}, tmp_path / "new" / "loss.png")
    assert isinstance(figure, Figure)
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines == {
        "a, training": [[10, 3.0], [20, 2.0]],
        "a, validation: 2.500": [[20, 2.5]],
        "b, training": [[10, 3.0]],
    }
    with Image.open(tmp_path / "new" / "loss.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 400


def test_numbers_that_are_not_finite_and_formulas(tmp_path):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": float("inf")}]
    history += [{"step": 3, "eval_loss": 1.5}, {"step": 4, "eval_loss": float("nan")}]
    visualize.loss_curves({"a run": history}, tmp_path / "loss.png")
    visualize.accuracy_per_step({"a model": [0.5, float("nan"), 0.7]}, tmp_path / "accuracy.png")
    tokenizer = data.characters(["a$x^{\\"])
    model = FeedbackForCausalLM(FeedbackConfig(hidden_size=16, num_attention_heads=2, vocab_size=len(tokenizer)))
    visualize.predictions_over_steps(model, tokenizer, "a$x^{$\\a$", path=tmp_path / "steps.png")
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_a_history_without_losses_is_refused():
    with pytest.raises(ValueError, match="neither 'loss' nor 'eval_loss'"):
        visualize.loss_curves({"a": [{"step": 1, "accuracy": 0.5}]})


def test_accuracy_per_step(tmp_path):
    figure = visualize.accuracy_per_step({"test": [0.5, 0.75, 0.8]}, tmp_path / "accuracy.png")
    (line,) = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[1, 0.5], [2, 0.75], [3, 0.8]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["50.0%", "75.0%", "80.0%"]
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


@pytest.mark.parametrize("fields", [{"feedback_axis": "depth"}, {"feedback_axis": "time", "solver": "jacobi"}])
def test_step_predictions_are_those_of_as_many_steps(fields):
    model, tokenizer = language_model(**fields)
    probabilities, choices, targets = visualize.step_predictions(model, tokenizer, TEXT, 3)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    assert probabilities.shape == choices.shape == (3, len(TEXT) - 1)
    assert targets.tolist() == ids[0, 1:].tolist()
    for step in (1, 2, 3):
        logits = model(ids, num_feedback_steps=step).logits[0, :-1]
        expected = logits.softmax(-1).gather(-1, targets[:, None])[:, 0]
        torch.testing.assert_close(probabilities[step - 1], expected, atol=1e-5, rtol=1e-4)
        assert choices[step - 1].tolist() == logits.argmax(-1).tolist()


def test_predictions_over_steps(tmp_path):
    model, tokenizer = language_model(num_feedback_steps=3)
    model.train()
    figure = visualize.predictions_over_steps(model, tokenizer, TEXT, last=8, path=tmp_path / "steps.png")
    assert model.training, "the mode of the model is left as it was"
    axes = figure.axes[0]
    probabilities, choices, _ = visualize.step_predictions(model, tokenizer, TEXT)
    assert_close(torch.tensor(axes.collections[0].get_array().tolist()), probabilities[:, -8:], 1e-5)
    assert len(axes.texts) == 3 * 8
    assert "".join(label.get_text() for label in axes.get_xticklabels()) == "ot␣to␣be↵"[-8:]
    first = tokenizer.decode([choices[0, -8].item()])
    assert axes.texts[0].get_text() == {" ": "␣", "\n": "↵"}.get(first, first)
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_a_hundred_subwords_stay_legible(tmp_path):
    """Lines are broken, no box is narrower than its letters, and every token is drawn once."""
    tokenizer = data.subwords([READABLE], 300)
    text = READABLE[:420]
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 100
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": len(tokenizer), "num_feedback_steps": 3}
    model = FeedbackForCausalLM(FeedbackConfig(**sizes))
    figure = visualize.predictions_over_steps(model, tokenizer, text, path=tmp_path / "steps.png")
    *lines, _ = figure.axes
    assert len(lines) > 2
    words = [label.get_text() for axes in lines for label in axes.get_xticklabels()]
    assert len(words) == len(ids) - 1 and "".join(words[:20]).replace("␣", " ").replace("↵", "\n") in text
    figure.canvas.draw()
    for axes in lines:
        assert axes.get_window_extent().width < 1400
        boxes = [text.get_window_extent() for text in axes.texts[: len(axes.get_xticklabels())]]
        assert all(left.x1 <= right.x0 + 1 for left, right in pairwise(boxes)), "letters overlap"


EXAMPLES = {
    FeedbackForCausalLM: ("text", 3),
    FeedbackForMaskedLM: ("text", 3),
    FeedbackForTokenClassification: ("text", 3),
    FeedbackForConditionalGeneration: (("the source", "a target"), 3),
    FeedbackForQuestionAnswering: (("who?", "he said"), 6),
    FeedbackForSequenceClassification: ("text", 3),
    FeedbackForImageClassification: (None, 3),
    FeedbackForTimeSeriesPrediction: (torch.arange(12.0).sin(), 4),
}


@pytest.mark.parametrize("head", EXAMPLES, ids=lambda head: head.__name__)
def test_every_head_is_drawn(head, tmp_path):
    """Each row is what the model predicts when it makes so many steps."""
    model, (example, rows) = build(head, **HEADS[head]), EXAMPLES[head]
    size, channels = 8, getattr(model.config.input_config, "num_channels", 1)
    processor = make_tokenizer()
    if head is FeedbackForImageClassification:
        like = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
        processor = ViTImageProcessorPil(size={"height": size, "width": size}, **like)
        example = torch.rand(channels, size, size)
    if head is FeedbackForTimeSeriesPrediction and channels > 1:
        example = example[:, None].expand(-1, channels)
    figure = visualize.predictions_over_steps(model, processor, example, path=tmp_path / "it.png")
    assert (tmp_path / "it.png").stat().st_size > 1000
    if head is FeedbackForTimeSeriesPrediction:
        drawn = [line.get_ydata() for line in figure.axes[0].lines[1:]]
        assert len(figure.axes[0].lines) == rows
        for step, line in enumerate(drawn, start=1):
            made = model(past_values=example[None], num_feedback_steps=step).prediction_outputs[0]
            assert_close(torch.as_tensor(line), made if made.ndim == 1 else made[:, 0], 1e-5)
    else:
        *boxes, _ = figure.axes
        assert sum(len(axes.get_yticks()) for axes in boxes) == rows
        logits, _ = visualize.step_logits(model, processor, example)
        for step in (1, 2, 3):
            alone, _ = visualize.run_steps(model, processor, example, step)
            assert_close(logits[step - 1], model.step_logits(alone)[-1].view_as(logits[step - 1]))
    figure = visualize.states_over_steps(model, processor, example, path=tmp_path / "states.png")
    assert figure.axes[0].images[0].get_array().shape[0] == 2


def test_states_over_steps_are_the_changes_of_the_output():
    model, tokenizer = language_model(num_feedback_steps=3)
    figure = visualize.states_over_steps(model, tokenizer, TEXT)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    before, now = (model.model(ids, num_feedback_steps=step).last_hidden_state[0] for step in (1, 2))
    expected = (now - before).norm(dim=-1) / now.norm(dim=-1)
    assert_close(torch.tensor(figure.axes[0].images[0].get_array()[0].tolist()), expected.detach(), 1e-4)


def test_a_model_of_one_step_is_refused():
    model, tokenizer = language_model(feedback_axis="time")
    with pytest.raises(ValueError, match="There is one step to show"):
        visualize.predictions_over_steps(model, tokenizer, TEXT)


def test_a_model_that_caps_its_logits():
    model, tokenizer = language_model()
    model.predict = lambda y: 0.1 * torch.tanh(model.lm_head(y) / 0.1)
    assert visualize.step_predictions(model, tokenizer, TEXT)[0].max() < 2 / len(tokenizer)


def test_a_model_under_an_adapter_is_shown():
    model, tokenizer = language_model(num_feedback_steps=3)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    assert len(visualize.step_predictions(adapted, tokenizer, TEXT)[0]) == 3


def test_what_can_not_be_shown_is_refused():
    _, tokenizer = language_model()
    with pytest.raises(ValueError, match="Give a feedback model, such as a FeedbackForCausalLM, not this Linear"):
        visualize.predictions_over_steps(torch.nn.Linear(2, 2), tokenizer, TEXT)
    with pytest.raises(ValueError, match="a FeedbackModel has none: load a FeedbackFor"):
        visualize.states_over_steps(build(FeedbackModel), make_tokenizer(), "text")
    for nothing in ({}, {"a": []}):
        with pytest.raises(ValueError, match="There is no accuracy to show"):
            visualize.accuracy_per_step(nothing)
    with pytest.raises(ValueError, match="Give the histories by name"):
        visualize.loss_curves([{"loss": 1.0, "step": 1}])


def test_a_text_of_one_token_is_refused():
    model, tokenizer = language_model()
    with pytest.raises(ValueError, match="at least two tokens"):
        visualize.predictions_over_steps(model, tokenizer, "t")
