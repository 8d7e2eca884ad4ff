"""Every head: registered, learns, keeps to its padding and its pooling."""

import copy

import pytest
import torch
from conftest import (
    BOS,
    PAD,
    arguments,
    assert_close,
    build,
    each_axis,
    pad,
    tokens,
)
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, Trainer

from feedback_transformers import (
    FeedbackConfig,
    FeedbackForCausalLM,
    FeedbackForConditionalGeneration,
    FeedbackForImageClassification,
    FeedbackForImageToImage,
    FeedbackForMaskedLM,
    FeedbackForObjectDetection,
    FeedbackForQuestionAnswering,
    FeedbackForSequenceClassification,
    FeedbackForTimeSeriesPrediction,
    FeedbackForTokenClassification,
    FeedbackForVideoClassification,
    FeedbackModel,
)
from feedback_transformers.models.configuration_feedback import MODELING

HEADS = {
    FeedbackModel: {},
    FeedbackForCausalLM: {},
    FeedbackForMaskedLM: {"is_causal": False},
    FeedbackForSequenceClassification: {"num_labels": 3},
    FeedbackForTokenClassification: {"num_labels": 3},
    FeedbackForQuestionAnswering: {},
    FeedbackForConditionalGeneration: {"is_encoder_decoder": True, "decoder_start_token_id": BOS},
    FeedbackForImageClassification: {
        "input_config": {"type": "images", "num_channels": 1},
        "is_causal": False,
        "pad_token_id": None,
    },
    FeedbackForVideoClassification: {
        "input_config": {"type": "videos", "num_channels": 1},
        "is_causal": False,
        "pad_token_id": None,
    },
    FeedbackForObjectDetection: {
        "input_config": {"type": "images", "num_channels": 1},
        "is_causal": False,
        "pad_token_id": None,
        "num_labels": 3,
    },
    FeedbackForImageToImage: {
        "input_config": {"type": "images", "num_channels": 1},
        "is_causal": False,
        "pad_token_id": None,
        "upscale": 2,
    },
    FeedbackForTimeSeriesPrediction: {"input_config": "values", "prediction_length": 4, "pad_token_id": None},
}
SERIES_OF_TWO = {**HEADS[FeedbackForTimeSeriesPrediction], "input_config": {"type": "values", "num_channels": 2}}
each_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)


def inputs_of(head) -> dict:
    if head is FeedbackForImageClassification:
        return {"pixel_values": torch.randn(2, 1, 8, 8), "labels": torch.tensor([0, 1])}
    if head is FeedbackForObjectDetection:
        one = {
            "class_labels": torch.tensor([2, 0]),
            "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.4], [0.7, 0.6, 0.4, 0.3]]),
        }
        none = {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
        return {"pixel_values": torch.randn(2, 1, 8, 8), "labels": [one, none]}
    if head is FeedbackForImageToImage:
        return {"pixel_values": torch.randn(2, 1, 8, 8), "labels": torch.randn(2, 1, 16, 16)}
    if head is FeedbackForVideoClassification:
        return {"pixel_values": torch.randn(2, 4, 1, 8, 8), "labels": torch.tensor([0, 1])}
    if head is FeedbackForTimeSeriesPrediction:
        return {"past_values": torch.randn(2, 10).cumsum(1), "future_values": torch.randn(2, 4)}
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(2, 13, dtype=torch.long)}
    if head is FeedbackForSequenceClassification:
        inputs["labels"] = torch.tensor([0, 2])
    elif head is FeedbackForTokenClassification:
        inputs["labels"] = tokens() % 3
    elif head is FeedbackForQuestionAnswering:
        inputs.update(start_positions=torch.tensor([1, 2]), end_positions=torch.tensor([3, 9]))
    elif head is not FeedbackModel:
        inputs["labels"] = tokens()
    return inputs


@each_head
def test_every_head_is_registered_and_round_trips(head, tmp_path):
    model, inputs = build(head, **HEADS[head]), inputs_of(head)
    outputs = model(**inputs)
    model.save_pretrained(tmp_path)
    auto, *_ = [auto for auto, reference in MODELING.items() if reference.endswith(f".{head.__name__}")]
    import transformers

    loaded, info = getattr(transformers, auto).from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is head and type(AutoConfig.from_pretrained(tmp_path)) is FeedbackConfig
    assert not any(info.values())
    again = loaded(**inputs)
    assert torch.equal(again[0], outputs[0])
    base, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(base) is FeedbackModel and not info["missing_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("head", [head for head in HEADS if head is not FeedbackModel], ids=lambda head: head.__name__)
def test_learned_halting_weighs_the_losses_of_all_passes(head):
    """With a constant probability to stop, its loss is the sum of p_k times the loss after k passes."""
    fields = {**HEADS[head], "num_feedback_steps": 3}
    model = build(head, **fields, halting="learned", halting_weight=0.0).train()
    stops = model.model.loop.halting.halt_proj
    torch.nn.init.zeros_(stops.weight)
    share = torch.sigmoid(stops.bias.detach()).item()
    plain = build(head, **fields).train()
    plain.load_state_dict({name: w for name, w in model.state_dict().items() if "halting" not in name})
    inputs = inputs_of(head)
    each = [plain(**inputs, num_feedback_steps=k).loss for k in (1, 2, 3)]
    expected = share * each[0] + share * (1 - share) * each[1] + (1 - share) ** 2 * each[2]
    assert_close(model(**inputs).loss, expected, 1e-5)


@each_head
@pytest.mark.parametrize("signal", ["state", "output", "none"])
@each_axis
def test_every_head_learns(head, signal, axis):
    if head is FeedbackModel:
        outputs = build(FeedbackModel, feedback_signal=signal, feedback_axis=axis)(tokens())
        assert outputs.last_hidden_state.shape == (2, 13, 32)
        return
    fields = {"feedback_signal": signal, "feedback_axis": axis, "feedback_type": "gru", **HEADS[head]}
    if axis == "time" and not fields.get("is_causal", True):
        fields["decoder_type"] = "mlp"
    model, inputs = build(head, **fields).train(), inputs_of(head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        loss = model(**inputs).loss
        loss.backward()
        assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


BIDIRECTIONAL = {
    FeedbackForMaskedLM: {},
    FeedbackForSequenceClassification: {"num_labels": 3},
    FeedbackForTokenClassification: {"num_labels": 3},
    FeedbackForQuestionAnswering: {},
}


def logits_of(outputs):
    return outputs.start_logits if "start_logits" in outputs else outputs.logits


@pytest.mark.parametrize("head", BIDIRECTIONAL, ids=lambda head: head.__name__)
@pytest.mark.parametrize("encoder", ["transformer", "rnn", "cnn", "gpt2"])
@each_axis
def test_bidirectional(head, encoder, axis):
    """A later token changes earlier outputs; padding changes none."""
    backbone = {"model_type": "gpt2" if encoder == "gpt2" else "llama"}
    encoder = "transformer" if encoder == "gpt2" else encoder
    fields = {"encoder_type": encoder, "decoder_type": encoder if encoder == "rnn" else "mlp", "feedback_axis": axis}
    model = build(head, is_causal=False, backbone_config=backbone, **fields, **BIDIRECTIONAL[head])
    batch, changed = tokens(2, 9), tokens(2, 9)
    changed[:, 1] = torch.where(changed[:, 1] == 7, 8, 7)
    with torch.no_grad():
        before = logits_of(model(batch))
        assert (logits_of(model(changed)) - before)[:, 0].abs().max() > 1e-4
        for where in ("left", "right", "inside"):
            padded, mask = pad(batch, [9, 6], where)
            logits = logits_of(model(padded, attention_mask=mask))
            for i, n in enumerate([9, 6]):
                alone = logits_of(model(batch[i : i + 1, :n]))[0]
                real = logits[i] if head is FeedbackForSequenceClassification else logits[i][mask[i].bool()]
                assert_close(real, alone)


@pytest.mark.parametrize("cell", ["conv", "transformer", "gru", "lstm"])
@pytest.mark.parametrize("decoder", ["transformer", "rnn", "mlp"])
def test_bidirectional_cells_and_decoders(cell, decoder):
    """Without an encoder, what is seen of later tokens is seen by the cell or the decoder."""
    fields = {"is_causal": False, "num_encoder_layers": 0, "feedback_type": cell, "decoder_type": decoder}
    model, batch, changed = build(FeedbackForMaskedLM, **fields), tokens(2, 9), tokens(2, 9)
    changed[:, 2] = torch.where(changed[:, 2] == 7, 8, 7)
    seen = (model(changed).logits - model(batch).logits)[:, 1].abs().max() > 1e-4
    assert seen == (cell in ("conv", "transformer") or decoder != "mlp")
    padded, mask = pad(batch, [9, 6], "inside")
    logits = model(padded, attention_mask=mask).logits
    for i, n in enumerate([9, 6]):
        assert_close(logits[i][mask[i].bool()], model(batch[i : i + 1, :n]).logits[0])


@pytest.mark.parametrize(
    ("problem", "labels", "expected"),
    [
        ("regression", torch.tensor([[0.5], [-1.0]]), lambda logits, labels: F.mse_loss(logits, labels)),
        ("single_label_classification", torch.tensor([0, 2]), F.cross_entropy),
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 1]]), F.binary_cross_entropy_with_logits),
    ],
)
@pytest.mark.parametrize("signal", ["state", "output"])
def test_sequence_classification_problems(problem, labels, expected, signal):
    num_labels = 1 if problem == "regression" else 3
    model = build(
        FeedbackForSequenceClassification, num_labels=num_labels, problem_type=problem, feedback_signal=signal
    )
    outputs = model(tokens(), labels=labels)
    assert_close(outputs.loss, expected(outputs.logits, labels), 1e-6)


def test_sequence_classification_reads_the_last_real_token():
    model, batch = build(FeedbackForSequenceClassification, num_labels=3), tokens(2, 9)
    alone = torch.cat([model(batch[:1]).logits, model(batch[1:, :6]).logits])
    for where in ("left", "right"):
        padded, mask = pad(batch, [9, 6], where)
        assert_close(model(padded, attention_mask=mask).logits, alone)
        padded[mask == 0] = PAD
        assert_close(model(padded).logits, alone)


@pytest.mark.parametrize("head", [head for head in HEADS if head is not FeedbackForConditionalGeneration])
def test_a_source_is_for_sequence_to_sequence(head):
    fields = HEADS[head] | {"is_encoder_decoder": True, "is_causal": True}
    with pytest.raises(ValueError, match="is_encoder_decoder"):
        build(head, **fields)(tokens())


def test_the_first_loss_leaves_a_multi_label_model_as_it_is():
    """transformers reads the problem off the labels in the loss, when a prediction has been fed back already."""
    fields = {"num_labels": 3, "feedback_signal": "output", "num_feedback_steps": 3}
    model, labels = build(FeedbackForSequenceClassification, **fields), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    assert torch.equal(model(tokens(), labels=labels).loss, model(tokens(), labels=labels).loss)


@pytest.mark.parametrize("head", [FeedbackForImageClassification, FeedbackForTimeSeriesPrediction])
def test_half_precision_takes_whole_numbers(head):
    inputs = {
        FeedbackForImageClassification: {"pixel_values": torch.rand(2, 1, 8, 8)},
        FeedbackForTimeSeriesPrediction: {"past_values": torch.rand(2, 9)},
    }[head]
    model = build(head, **HEADS[head])
    assert_close(model.to(torch.bfloat16)(**inputs)[0].float(), model.float()(**inputs)[0], 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_level_of_a_series(dtype):
    """A change of 3 on a level of 300,000, which neither type can hold."""
    model = build(FeedbackForTimeSeriesPrediction, **HEADS[FeedbackForTimeSeriesPrediction])
    past = 300_000 + 3 * torch.randn(2, 20).cumsum(1)
    half, full = model.to(dtype)(past, future_values=past[:, :4]), model.float()(past, future_values=past[:, :4])
    assert_close(half.prediction_outputs, full.prediction_outputs, 1.0)
    assert_close(half.loss, full.loss, 0.05 * full.loss.item())


def test_a_series_in_another_unit_has_the_same_forecast():
    model, past = build(FeedbackForTimeSeriesPrediction, **HEADS[FeedbackForTimeSeriesPrediction]), torch.randn(2, 20)
    for unit in (0.1, 1e7):
        assert_close(model(unit * past).prediction_outputs / unit, model(past).prediction_outputs, 1e-3)


def test_a_past_that_never_changes_is_left_out_of_the_loss():
    model = build(FeedbackForTimeSeriesPrediction, **SERIES_OF_TWO)
    past, future = torch.randn(3, 10, 2), torch.randn(3, 4, 2)
    expected = model(past[:2], future_values=future[:2])
    past[2] = 30_000.1
    actual = model(past, future_values=future)
    assert_close(actual.loss, expected.loss, 1e-6)
    assert_close(actual.prediction_outputs[:2], expected.prediction_outputs, 1e-5)
    assert_close(actual.prediction_outputs[2], past[2, :4], 0.01)
    assert model(past[2:], future_values=future[2:]).loss == 0


def test_a_series_reports_the_passes_of_its_forecast():
    fields = {**HEADS[FeedbackForTimeSeriesPrediction], "halting": "converged", "num_feedback_steps": 5}
    outputs = build(FeedbackForTimeSeriesPrediction, **fields, halting_threshold=0.3)(torch.randn(2, 10))
    assert outputs.num_feedback_steps.shape == (2, 4)
    assert 1 <= outputs.num_feedback_steps.min() <= outputs.num_feedback_steps.max() <= 5


def test_regression_feeds_back_its_numbers():
    """Of several outputs too: no probabilities, which another level of all of them would not change."""
    fields = {"problem_type": "regression", "feedback_signal": "output"}
    model, fed = build(FeedbackForSequenceClassification, num_labels=3, **fields), []
    model.feedback.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0].detach()))
    with torch.no_grad():
        model(tokens())
        model.classifier.bias += 10.0
        model(tokens())
    assert_close(fed[len(fed) // 2], fed[0] + 10.0, 1e-5)


def test_targets_as_embeddings():
    fields = HEADS[FeedbackForConditionalGeneration]
    model, target = build(FeedbackForConditionalGeneration, **fields), tokens(2, 6)
    embedded = model.get_input_embeddings()(target)
    expected = model(tokens(), decoder_input_ids=target, labels=target)
    actual = model(tokens(), decoder_inputs_embeds=embedded, labels=target)
    assert_close(actual.logits, expected.logits, 1e-6)
    assert_close(actual.loss, expected.loss, 1e-6)


def test_question_answering_loss():
    model, inputs = build(FeedbackForQuestionAnswering, is_causal=False), inputs_of(FeedbackForQuestionAnswering)
    outputs = model(**inputs)
    start = F.cross_entropy(outputs.start_logits, inputs["start_positions"])
    end = F.cross_entropy(outputs.end_logits, inputs["end_positions"])
    assert_close(outputs.loss, (start + end) / 2, 1e-6)


def readouts(outputs) -> torch.Tensor:
    """The logits [B, T, L] or [B, L] of any head, or the image that it makes."""
    if "reconstruction" in outputs:
        return outputs.reconstruction
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    return outputs.logits


PREDICTING = [head for head in HEADS if head not in (FeedbackModel, FeedbackForTimeSeriesPrediction)]


@pytest.mark.parametrize("head", PREDICTING, ids=lambda head: head.__name__)
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_logits_after_each_step(head, side):
    """Those of k steps are what the model predicts when it makes k steps."""
    model, inputs = build(head, **{"num_labels": 5, **HEADS[head]}), inputs_of(head)
    inputs = {name: value for name, value in inputs.items() if name == "pixel_values" or name == "input_ids"}
    if "input_ids" in inputs:
        inputs["input_ids"], inputs["attention_mask"] = pad(inputs["input_ids"], [13, 6], side)
    if head is FeedbackForConditionalGeneration:
        inputs["decoder_input_ids"] = tokens(2, 4)
    with torch.no_grad():
        outputs = model(**inputs, output_feedback_states=True)
        steps = model.step_logits(outputs)
        assert len(steps) == 3
        for made, logits in enumerate(steps, start=1):
            assert_close(logits, readouts(model(**inputs, num_feedback_steps=made)), 1e-5)
        with pytest.raises(ValueError, match="call the model with output_feedback_states=True"):
            model.step_logits(model(**inputs))


def test_a_classifier_that_guesses_its_mask_pools_each_step_by_it():
    model, batch = build(FeedbackForSequenceClassification, num_labels=3), tokens()
    batch[:, -4:] = PAD
    outputs = model(batch, output_feedback_states=True)
    assert_close(model.step_logits(outputs)[-1], outputs.logits, 1e-6)
    assert_close(outputs.logits, model(batch[:, :-4]).logits, 1e-5)


@pytest.mark.parametrize("fields", [{}, {"encoder_type": "cnn", "feedback_type": "conv", "decoder_type": "mlp"}])
def test_image_steps(fields):
    head = FeedbackForImageClassification
    model = build(head, num_labels=5, **{**HEADS[head], **fields})
    image = torch.randn(2, 1, 8, 8)
    outputs = model(image, output_feedback_states=True)
    assert_close(model.step_logits(outputs)[-1], outputs.logits, 1e-6)
    assert_close(model.step_logits(outputs)[0], model(image, num_feedback_steps=1).logits, 1e-5)


def test_hidden_states_of_a_series():
    """Those of the past where a forecast is made; the last one predicts its first step."""
    head = FeedbackForTimeSeriesPrediction
    model, past = build(head, **SERIES_OF_TWO), torch.randn(2, 9, 2)
    outputs = model(past, output_hidden_states=True)
    assert len(outputs.hidden_states) == 2 + 3 + 1
    assert {tuple(h.shape) for h in outputs.hidden_states} == {(2, 9, 32)}
    mean, std = past.mean(1), past.std(1) + 1e-5
    first = (past[:, -1] - mean) / std + model.readout(outputs.hidden_states[-1][:, -1])
    assert_close(outputs.prediction_outputs[:, 0], first * std + mean, 1e-5)
    assert_close(model.step_logits(outputs)[-1], model.readout(outputs.hidden_states[-1]), 1e-6)
    trained = model.train()(past, future_values=past[:, :4], output_hidden_states=True)
    assert {tuple(h.shape) for h in trained.hidden_states} == {(2, 12, 32)}


def test_outputs_of_a_source(tmp_path):
    """Named as Bart names them, in forward and in generate."""
    head = FeedbackForConditionalGeneration
    model, target, (source, mask) = build(head, **HEADS[head]), tokens(2, 6), pad(tokens(), [13, 7], "left")
    outputs = model(source, attention_mask=mask, decoder_input_ids=target, output_hidden_states=True)
    assert outputs.encoder_last_hidden_state.shape == (2, 16, 32)
    assert [tuple(h.shape) for h in outputs.encoder_hidden_states] == [(2, 16, 32)] * 2
    assert torch.equal(outputs.encoder_hidden_states[-1], outputs.encoder_last_hidden_state)
    assert_close(outputs.encoder_hidden_states[0][mask.bool()], model.get_input_embeddings()(source)[mask.bool()])
    assert len(outputs.decoder_hidden_states) == 2 + 3 + 1
    with pytest.warns(FutureWarning, match="Read decoder_hidden_states"):  # the name in 0.1.0
        assert outputs.hidden_states is outputs.decoder_hidden_states
    again = model(encoder_outputs=(outputs.encoder_last_hidden_state,), attention_mask=mask, decoder_input_ids=target)
    assert_close(again.logits, outputs.logits, 1e-6)
    assert again.encoder_hidden_states is None
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "return_dict_in_generate": True}
    written = model.generate(source, attention_mask=mask, output_hidden_states=True, **options)
    for actual, expected in zip(written.encoder_hidden_states, outputs.encoder_hidden_states, strict=True):
        assert_close(actual, expected, 1e-6)
    rows = Dataset.from_dict({"input_ids": source.tolist(), "labels": target.tolist()})
    predicted = Trainer(model, arguments(tmp_path)).predict(rows)
    assert predicted.predictions.shape == (2, 6, 50)


@pytest.mark.parametrize("head", [FeedbackForImageClassification, FeedbackForTimeSeriesPrediction])
def test_input_embeddings_of_images_and_series(head):
    model = build(head, **HEADS[head])
    projection = model.get_input_embeddings()
    assert projection is model.model.embeddings.projection
    other = copy.deepcopy(projection)
    torch.nn.init.zeros_(other.weight)
    inputs = {name: value for name, value in inputs_of(head).items() if name in ("pixel_values", "past_values")}
    before = model(**inputs)[0]
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other and (model(**inputs)[0] - before).abs().max() > 1e-3


@each_axis
def test_forecast_feeds_itself_back(axis):
    """Rolling out with a cache equals reading the whole series again at each step."""
    head = FeedbackForTimeSeriesPrediction
    model, past = build(head, feedback_axis=axis, **SERIES_OF_TWO), torch.randn(2, 7, 2).cumsum(1)
    with torch.no_grad():
        rolled = model(past).prediction_outputs
        series = (past - past.mean(1, keepdim=True)) / (past.std(1, keepdim=True) + 1e-5)
        for _ in range(4):
            y = model.model(past_values=series, use_cache=False).last_hidden_state[:, -1:]
            series = torch.cat([series, series[:, -1:] + model.readout(y)], dim=1)
    expected = series[:, 7:] * (past.std(1, keepdim=True) + 1e-5) + past.mean(1, keepdim=True)
    assert_close(rolled, expected)
    model.train().activation_checkpointing_enable()  # which makes no cache
    assert_close(model(past).prediction_outputs, rolled)
    assert model(past, prediction_length=9).prediction_outputs.shape == (2, 9, 2)
    assert model(past[..., 0][..., None].expand(-1, -1, 2)).prediction_outputs.shape == (2, 4, 2)
