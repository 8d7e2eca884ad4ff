"""Bad input gets one clear sentence that says what to change."""

import math

import pytest
import torch
from conftest import BOS, PAD, build, tiny, tokens
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from feedback_transformers import (
    FeedbackConfig,
    FeedbackForCausalLM,
    FeedbackForConditionalGeneration,
    FeedbackForImageClassification,
    FeedbackForMaskedLM,
    FeedbackForSequenceClassification,
    FeedbackForTimeSeriesPrediction,
    FeedbackForTokenClassification,
    FeedbackModel,
    retrofit,
)
from feedback_transformers.models import feedback_calls
from feedback_transformers.models.feedback_names import CHOICES

CONFIGS = [
    ({"feedback_connection": "replace"}, "needs initial_state='input'"),
    (
        {"feedback_connection": "replace", "initial_state": "input", "feedback_signal": "output"},
        "needs feedback_signal=",
    ),
    ({"halting": "select", "halting_scope": "sequence"}, "needs is_causal=False"),
    ({"prefix_lm": True, "feedback_axis": "time"}, "needs feedback_axis='depth'"),
    (
        {"prefix_lm": True, "backbone_config": {"model_type": "mistral", "sliding_window": 4}},
        "not go with a sliding_window",
    ),
    ({"supervision_interval": 2, "num_feedback_steps": 3}, "must be a multiple of supervision_interval"),
    ({"initial_state": "learned", "feedback_signal": "output"}, "needs feedback_signal='state' or 'none'"),
    ({"token_mixer": "mlp"}, "needs is_causal=False"),
    ({"norm_placement": "post", "backbone_config": "gpt2"}, "use a backbone_config of llama"),
    ({"feedback_recursion": "refinement", "feedback_connection": "sum"}, "set initial_state='learned'"),
    ({"num_prefix_tokens": 2}, "num_prefix_tokens needs is_causal=False"),
    ({"format_version": 4}, "upgrade feedback_transformers"),
    ({"backbone_config": {"model_type": "bert"}}, "Unknown backbone 'bert'; choose one of llama"),
    ({"hidden_act": "nope"}, "Unknown hidden_act 'nope'; choose rrelu or one of"),
    ({"num_feedback_steps": 0}, "num_feedback_steps is 0; it must be at least 1"),
    ({"num_feedback_steps": -3}, "num_feedback_steps is -3; it must be at least 1"),
    ({"solver_steps": 0}, "solver_steps is 0"),
    ({"feedback_interval": 0}, "feedback_interval is 0"),
    ({"gradient_steps": 0}, "gradient_steps is 0; it must be at least 1"),
    ({"gradient_steps": 10**30}, f"it must be below {2**31}"),
    ({"hidden_size": 10**30}, f"it must be below {2**31}"),
    ({"intermediate_size": (2, 2)}, "intermediate_size is (2, 2); it must be a whole number"),
    ({"feedback_noise": math.nan}, "feedback_noise is nan; it must be 0 or more, and at most 1000"),
    ({"state_noise": -1}, "state_noise is -1; it must be 0 or more"),
    ({"relaxation": 0}, "relaxation is 0; it must be above 0 and at most 1"),
    ({"relaxation": math.nan}, "relaxation is nan; it must be above 0 and at most 1"),
    ({"initial_state_cut": 0}, "initial_state_cut is 0; it must be above 0 and at most 1000"),
    ({"halting_weight": 1e300}, "halting_weight is 1e+300; it must be 0 or more, and at most 1000"),
    ({"num_feedback_layers": 2**31 - 1}, "num_feedback_layers is 2147483647; it must be at most 10000"),
    ({"halting_threshold": math.inf}, "halting_threshold is inf; it must be above 0 and at most 1000, or None"),
    ({"num_labels": 0}, "num_labels is 0; it must be at least 1"),
    ({"num_labels": None}, "num_labels is None; it must be a whole number"),
    ({"id2label": {0: "a", 2: "b"}}, "id2label names the classes [0, 2]; it must name 0 to 1"),
    ({"dtype": "float33"}, "Unknown dtype 'float33'"),
    ({"feedback_axes": "time"}, "Unknown field 'feedback_axes': did you mean feedback_axis?"),
    ({"num_layers": 6}, "Unknown field 'num_layers': did you mean num_feedback_layers?"),
    ({"num_steps": 6}, "did you mean num_feedback_steps?"),
    ({"axis": "time"}, "Unknown field 'axis': did you mean feedback_axis?"),
    ({"d_model": 64}, "did you mean hidden_size?"),
    ({"cell": "gru"}, "Unknown field 'cell': did you mean feedback_type?"),
    ({"sliding_window": 4}, "set it in backbone_config={'model_type': 'llama', 'sliding_window': ...}"),
    (
        {"backbone_config": "qwen3", "rope_theta": 10.0},
        "set it in backbone_config={'model_type': 'qwen3', 'rope_theta'",
    ),
    ({"attention_bias": True}, "attention_bias is a field of the transformer layers"),
    ({"preset": "gru"}, "preset is no field: use FeedbackConfig.preset('gru'"),
    ({"backbone_config": 7}, "backbone_config is 7; give the name of a family, a dictionary or a config"),
    ({"backbone_config": {"head_dim": 3}}, "head_dim of backbone_config is 3; rotary positions need an even number"),
    ({"backbone_config": {"rope_parameters": {"rope_type": "no"}}}, "Unknown rope_type 'no' in backbone_config"),
    ({"backbone_config": {"rope_parameters": {"rope_type": "yarn"}}}, "backbone_config can't be a llama: Missing"),
    ({"backbone_config": {"model_type": "mistral", "sliding_window": -2}}, "sliding_window of backbone_config is -2"),
    ({"retrofitted_from": "LlamaForCausalLM"}, "backbone_config is None; give the name"),
    ({"decoder_start_token_id": 50}, "decoder_start_token_id is 50; it must be at least 0 and below vocab_size"),
    ({"eos_token_id": [1, -2]}, "eos_token_id is -2; it must be at least -1"),
    ({"num_feedback_layers": 0}, "num_feedback_layers is 0"),
    ({"num_encoder_layers": -1}, "num_encoder_layers is -1; it must be 0 or more"),
    ({"conv_kernel_size": 0}, "conv_kernel_size is 0"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"intermediate_size": 0}, "intermediate_size is 0"),
    ({"hidden_size": 0}, "hidden_size is 0; it must be at least 1"),
    ({"hidden_size": 30}, "must be a multiple of num_attention_heads"),
    ({"hidden_size": 12}, "need an even number: change either"),
    ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
    ({"feedback_noise": -0.1}, "feedback_noise is -0.1; it must be 0 or more"),
    ({"pad_token_id": 50}, "pad_token_id is 50; it must be at least 0 and below vocab_size"),
    ({"pad_token_id": -1}, "pad_token_id is -1; it must be at least 0 and below vocab_size"),
    ({"solver": "jacobi"}, "in depth use 'sequential'"),
    ({"feedback_interval": 2}, "it needs feedback_axis='time'; set it to 1"),
    ({"feedback_connection": "memory"}, "'memory' needs feedback_axis='time'."),
    ({"feedback_connection": "memory", "feedback_axis": "time", "feedback_interval": 2}, "set feedback_interval=1"),
    (
        {"feedback_connection": "memory", "feedback_axis": "time", "feedback_signal": "output"},
        "feedback_signal='state'",
    ),
    ({"feedback_connection": "memory", "feedback_axis": "time", "backbone_config": "gpt2"}, "instead of gpt2"),
    ({"share_encoder_decoder": True, "decoder_type": "mlp"}, "encoder_type = decoder_type"),
    ({"share_encoder_decoder": True, "is_encoder_decoder": True}, "set one of them to False"),
    ({"is_encoder_decoder": True, "is_causal": False}, "set is_causal=True"),
    ({"feedback_signal": "output", "feedback_axis": "time", "is_causal": False}, "or decoder_type='mlp'"),
    ({"input_config": {"type": "images", "patch_size": 0}}, "patch_size of an input of images is 0"),
    ({"input_config": {"type": "images", "positions": "x"}}, "Unknown positions 'x' of an input of images"),
    (
        {"input_config": {"type": "videos", "tubelet": 1}},
        "Unknown field 'tubelet' of input_config",
    ),
    ({"input_config": "image"}, "input_config is 'image'; give the type of an input (tokens, images, videos, values,"),
    ({"source_config": "images"}, "source_config is what the encoder of is_encoder_decoder=True reads"),
    ({"input_type": "images"}, "Unknown field 'input_type': did you mean input_config?"),
    *(
        ({name: "nope"}, f"Unknown {name} 'nope'; choose one of {known[0]}")
        for name, known in CHOICES.items()
        if name != "input_type"
    ),
]


@pytest.mark.parametrize(("fields", "sentence"), CONFIGS, ids=lambda value: str(value)[:60])
def test_config_is_refused(fields, sentence):
    with pytest.raises(ValueError) as raised:
        tiny(**fields)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "fields", [{"num_feedback_steps": 2.5}, {"num_feedback_steps": True}, {"hidden_size": "big"}, {"is_causal": "yes"}]
)
def test_wrong_types_are_refused(fields):
    ((name, value),) = fields.items()
    with pytest.raises(Exception, match=rf"Field '{name}' expected \w+, got {type(value).__name__}"):
        tiny(**fields)


def test_a_config_changed_for_the_worse_is_not_saved(tmp_path):
    config = tiny()
    config.num_feedback_steps = -1
    with pytest.raises(Exception, match="num_feedback_steps is -1"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_unknown_preset():
    with pytest.raises(ValueError, match="Unknown preset 'nope'; choose one of .*shared-memory, "):
        FeedbackConfig.preset("nope")


@pytest.mark.parametrize(
    ("head", "fields", "sentence"),
    [
        (FeedbackForCausalLM, {"is_causal": False}, "FeedbackForCausalLM needs is_causal=True, not False: set"),
        (FeedbackForMaskedLM, {}, "FeedbackForMaskedLM needs is_causal=False"),
        (FeedbackForConditionalGeneration, {}, "needs is_encoder_decoder=True"),
        (FeedbackForImageClassification, {}, "reads pixel_values: set input_config='images', not 'tokens'"),
        (FeedbackForTimeSeriesPrediction, {}, "reads past_values: set input_config='values', not 'tokens'"),
        (
            FeedbackForSequenceClassification,
            {"input_config": "values"},
            "reads input_ids: set input_config='tokens', not 'values'",
        ),
    ],
)
def test_head_refuses_the_config(head, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        head(tiny(**fields))


INPUTS = [
    ({"input_ids": torch.tensor([[3, 50]])}, "input_ids go from 3 to 50 and the vocabulary has 50 tokens"),
    ({"input_ids": torch.tensor([[-1, 4]])}, "resize_token_embeddings"),
    ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "The input is empty: give at least one position"),
    ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "The input is empty"),
    ({"input_ids": torch.zeros(5, dtype=torch.long)}, r"The input has 1 dimensions; it must be \[batch, positions\]"),
    ({}, "This model reads input_ids: give exactly one of input_ids and inputs_embeds"),
    ({"input_ids": tokens(), "inputs_embeds": torch.zeros(2, 13, 32)}, "give exactly one of"),
    (
        {"input_ids": tokens(), "attention_mask": torch.ones(2, 12)},
        r"attention_mask has the shape \[2, 12\]; it must have the shape \[2, 13\]",
    ),
    ({"input_ids": tokens(), "attention_mask": torch.ones(1, 13)}, r"attention_mask has the shape \[1, 13\]"),
    ({"input_ids": tokens(), "attention_mask": torch.ones(2, 1, 13, 13)}, r"\[2, 13\], \[batch, positions\]"),
    ({"input_ids": tokens(), "num_feedback_steps": 0}, "num_feedback_steps is 0; it must be a whole number"),
    ({"input_ids": tokens(), "num_feedback_steps": -1}, "num_feedback_steps is -1"),
    ({"input_ids": tokens(), "num_feedback_steps": 2.5}, "num_feedback_steps is 2.5"),
    (
        {"input_ids": tokens(), "past_key_values": DynamicCache()},
        "must be a FeedbackCache, not DynamicCache: leave it out; prefix tuning",
    ),
    (
        {"input_ids": tokens(), "labels": tokens()[:, 1:]},
        r"labels have the shape \[2, 12\] and the logits \[2, 13, 50\]",
    ),
    ({"input_ids": tokens(), "labels": torch.full((2, 13), 77)}, "labels go up to 77 and vocab_size is 50"),
    (
        {"input_ids": tokens(), "labels": torch.full((2, 13), -1)},
        "labels go down to -1: number them from 0, and give -100",
    ),
    ({"input_ids": tokens().tolist()}, "input_ids are a list: give a tensor of whole numbers"),
    ({"input_ids": torch.zeros(2, 13)}, "input_ids are torch.float32: give a tensor of whole numbers"),
    ({"inputs_embeds": torch.zeros(2, 13, 16)}, "inputs_embeds are 16 wide; this model takes 32, its hidden_size"),
    (
        {"input_ids": tokens(), "position_ids": torch.arange(5)[None]},
        r"position_ids have the shape \[1, 5\] and the in",
    ),
    (
        {"input_ids": tokens(), "position_ids": torch.tensor([[*range(6), *range(7)]])},
        "do not rise within a row: Several texts in one row would read each other: give each a row of its own",
    ),
    (
        {"input_ids": tokens(), "cu_seq_lens_q": torch.tensor([0, 6, 13], dtype=torch.int32)},
        "cu_seq_lens_q: Several texts in one row",
    ),
    ({"input_ids": tokens(), "output_attentions": True}, "Attention weights are not returned"),
]


@pytest.mark.parametrize(("inputs", "sentence"), INPUTS, ids=range(len(INPUTS)))
def test_input_is_refused(inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()(**inputs)


@pytest.mark.parametrize("cell", ["gru", "lstm", "diagonal_gru", "min_gru", "mlp", "transformer"])
def test_a_cache_of_other_rows_is_refused(cell):
    """Whose states compiled loops would read beyond their end."""
    model = build(feedback_type=cell, feedback_axis="time", encoder_type="rnn")
    batch = tokens(4)
    for rows in (1, 3):
        cache = model(batch[:rows, :6], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=f"of {rows} rows and the input has 4: .*batch_repeat_interleave"):
            model(batch[:, 6:], past_key_values=cache, use_cache=True)


def test_learned_positions_end():
    model = build(backbone_config="gpt2")
    with pytest.raises(ValueError, match="position_ids must be 0 or more, and below 96"):
        model(tokens(), position_ids=torch.arange(90, 103)[None])
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :3] = 0
    places = mask.cumsum(1) - 1  # -1 where there is padding
    places[0, :3] = 500
    assert model(tokens(), attention_mask=mask, position_ids=places).logits.isfinite().all()


@pytest.mark.parametrize(
    ("kinds", "window", "sentence"),
    [
        (["full_attention", "sliding"], 4, "choose out of full_attention, sliding_attention"),
        (["sliding_attention"] * 3, 4, "layer_types of backbone_config names 3 layers out of 2: name each"),
        (["full_attention"] * 2, 4, "its layer_types has no sliding_attention: name the layers"),
        (["sliding_attention"] * 2, None, "has sliding_attention: set its sliding_window too"),
        (["sliding_attention"] * 2, 0, "sliding_window of backbone_config is 0; it must be at least 1"),
        (["sliding_attention"] * 2, "4", "sliding_window of backbone_config is '4'; it must be a whole number"),
    ],
)
def test_a_wrong_window_of_a_live_model(kinds, window, sentence):
    """Before anything is trained with it, rather than when it is to be loaded."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = retrofit(LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48)), 1)
    model.config.backbone_config.sliding_window, model.config.backbone_config.layer_types = window, kinds
    with pytest.raises(ValueError, match=sentence):
        model(tokens())


def test_a_text_that_grows_too_long(monkeypatch):
    """Refused where each position has an embedding; rotary ones go on, as in transformers."""
    said, more = [], torch.full((1, 7), 7)
    monkeypatch.setattr(feedback_calls.logger, "warning_once", said.append)
    for family in ("gpt2", "llama"):
        model = build(backbone_config=family)
        cache = model(torch.full((1, 90), 7), use_cache=True).past_key_values
        if family == "gpt2":
            with pytest.raises(
                ValueError, match=r"97 positions are more than max_position_embeddings \(96\): shorten"
            ):
                model(more, past_key_values=cache, use_cache=True)
        else:
            assert model(more, past_key_values=cache, use_cache=True).logits.isfinite().all()
    assert len(said) == 1 and said[0].startswith("A text is longer than max_position_embeddings (96)")


def test_without_attention_no_length_is_too_long():
    model = build(
        encoder_type="rnn", feedback_type="gru", feedback_axis="time", decoder_type="mlp", feedback_interval=50
    )
    assert model(tokens(1, 300)).logits.shape == (1, 300, 50)


def test_steps_where_they_mean_nothing():
    with pytest.raises(ValueError, match="leave it out, or set config.solver='jacobi'"):
        build(feedback_axis="time")(tokens(), num_feedback_steps=3)


def test_steps_that_became_none():
    model = build()
    model.config.num_feedback_steps = 0
    with pytest.raises(ValueError, match="num_feedback_steps is 0; it must be a whole number of at least 1"):
        model(tokens())


def test_the_config_of_another_model_is_read():
    """As PEFT does with that of a base model, for its vocabulary."""
    assert FeedbackConfig.from_dict({"model_type": "gpt2", "vocab_size": 7, "n_layer": 2, "n_head": 2}).vocab_size == 7


def test_steps_cannot_change_halfway_through_a_text():
    model = build()
    cache = model(tokens(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="filled with 3 feedback steps.*this call makes 5.*leave past_key_values out"):
        model(tokens(), past_key_values=cache, num_feedback_steps=5)


def test_output_feedback_without_a_head():
    with pytest.raises(ValueError, match=r"use a FeedbackFor\.\.\. class, or set tie_word_embeddings=True"):
        build(FeedbackModel, feedback_signal="output", tie_word_embeddings=False)(tokens())


def test_sequence_to_sequence_inputs():
    fields = {"is_encoder_decoder": True, "decoder_start_token_id": BOS}
    with pytest.raises(ValueError, match="Give decoder_input_ids or labels"):
        build(FeedbackForConditionalGeneration, **fields)(tokens())
    with pytest.raises(ValueError, match="Set decoder_start_token_id and pad_token_id"):
        build(FeedbackForConditionalGeneration, is_encoder_decoder=True)(tokens(), labels=tokens())
    model = build(FeedbackForConditionalGeneration, **fields)
    with pytest.raises(ValueError, match="The target has 1 rows and the source 2: give a target for each source"):
        model(tokens(), labels=tokens(1))
    with pytest.raises(ValueError, match="labels go up to 77 and vocab_size is 50"):
        model(tokens(), labels=torch.full((2, 5), 77))
    with pytest.raises(ValueError, match=r"labels have the shape \[3, 4\] and the logits \[2, 6, 50\]"):
        model(tokens(), decoder_input_ids=tokens(2, 6), labels=tokens(3, 4))


def test_labels_of_masked_tokens_the_other_way_round():
    with pytest.raises(ValueError, match=r"labels have the shape \[13, 2\] and the logits \[2, 13, 50\]"):
        build(FeedbackForMaskedLM, is_causal=False)(tokens(2, 13), labels=tokens(13, 2))


def test_several_classes_of_one_token():
    for kind in ("multi_label_classification", "regression"):
        with pytest.raises(ValueError, match=f"one class here, and problem_type is '{kind}': set it to None"):
            build(FeedbackForTokenClassification, problem_type=kind)


def test_images_and_series_of_another_shape():
    model = build(FeedbackForImageClassification, input_config={"type": "images", "num_channels": 1}, is_causal=False)
    with pytest.raises(ValueError, match=r"pixel_values have the shape \[2, 2, 8, 8\]; .* with 1 channels"):
        model(torch.zeros(2, 2, 8, 8))
    with pytest.raises(ValueError, match="needs at least two time steps"):
        build(FeedbackForTimeSeriesPrediction, input_config="values")(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="past_values have 3 channels and this model 1"):
        build(FeedbackForTimeSeriesPrediction, input_config="values")(torch.zeros(2, 5, 3))
    model, counts = build(FeedbackForTimeSeriesPrediction, input_config="values"), torch.arange(10).view(2, 5)
    assert torch.equal(model(counts).prediction_outputs, model(counts.float()).prediction_outputs)
    for name, values in (("past_values", {}), ("future_values", {"past_values": torch.rand(2, 5)})):
        with pytest.raises(ValueError, match=f"{name} holds nan or infinite numbers: fill the gaps first"):
            model(**values, **{name: torch.full((2, 4), math.nan)})
    for shape in ((1, 4), (3, 4), (2, 4, 2)):
        with pytest.raises(ValueError, match="give each row and channel its own future"):
            model(torch.rand(2, 5), future_values=torch.rand(shape))
    with pytest.raises(ValueError, match="does not read attention_mask: give windows of one length"):
        model(torch.rand(2, 5), attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="0 steps are asked for"):
        model(torch.rand(2, 5), prediction_length=0)


@pytest.mark.parametrize("head", [FeedbackForSequenceClassification, FeedbackForTokenClassification])
def test_labels_of_more_classes(head):
    labels = torch.full((2,) if head is FeedbackForSequenceClassification else (2, 13), 5)
    with pytest.raises(ValueError, match="labels go up to 5 and num_labels is 2: set num_labels"):
        build(head, num_labels=2)(tokens(), labels=labels)
    with pytest.raises(ValueError, match="labels go down to -1: number them from 0, and give -100"):
        build(head, num_labels=2)(tokens(), labels=0 * labels - 1)
    with pytest.raises(ValueError, match=r"labels have the shape \[3(, 13)?\] and the logits \[2, (13, )?2\]"):
        build(head, num_labels=2)(tokens(), labels=torch.zeros(3, *labels.shape[1:], dtype=torch.long))


def test_labels_of_several_classes_at_once():
    model = build(FeedbackForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match="are numbers, 0. or 1.: give labels.float"):
        model(tokens(), labels=torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(
        ValueError, match=r"labels have the shape \[2\] and the logits \[2, 3\]: give one number for each"
    ):
        model(tokens(), labels=torch.ones(2))


def test_no_vocabulary_in_a_model_of_images():
    model = build(FeedbackForImageClassification, input_config={"type": "images", "num_channels": 1}, is_causal=False)
    with pytest.raises(ValueError, match="A model of images has no vocabulary that could be resized"):
        model.resize_token_embeddings(60)


def test_padding_token_is_read_as_padding_by_the_classifier():
    """The one head that guesses a mask: without one, and with pad_token_id in the text."""
    model, batch = build(FeedbackForSequenceClassification, num_labels=2), tokens()
    batch[:, -3:] = PAD
    given = model(batch, attention_mask=(batch != PAD).long()).logits
    assert torch.equal(model(batch).logits, given)
