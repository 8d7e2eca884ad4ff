"""Inputs: raw data of any size, padded in a batch, with the grid of its positions; a modality of one's own."""

import importlib
import math
import sys

import pytest
import torch
from conftest import EOS, PAD, assert_close, build, tiny, tokens
from torch import nn
from transformers import AutoModel, BertConfig, ViTConfig, Wav2Vec2Config

from feedback_transformers import (
    FeedbackConfig,
    FeedbackForCausalLM,
    FeedbackForConditionalGeneration,
    FeedbackForImageClassification,
    FeedbackForImageToImage,
    FeedbackForMaskedLM,
    FeedbackForObjectDetection,
    FeedbackForSequenceClassification,
    FeedbackForVideoClassification,
    FeedbackModel,
)
from feedback_transformers.models.feedback_inputs import GridPositions
from feedback_transformers.models.modeling_feedback_dense import image_sizes

PARTS = {
    "transformer": {"encoder_type": "transformer", "feedback_type": "transformer"},
    "conv": {"encoder_type": "cnn", "feedback_type": "conv", "decoder_type": "mlp"},
    "gru": {"encoder_type": "rnn", "feedback_type": "gru", "decoder_type": "rnn"},
    "along": {"encoder_type": "cnn", "feedback_type": "lstm", "feedback_axis": "time"},
    "layerwise": {"feedback_recursion": "layerwise", "num_feedback_layers": 2},
    "converged": {"halting": "converged", "halting_threshold": 0.3},
    "output": {"feedback_signal": "output", "feedback_type": "conv"},
}
IMAGES = {"type": "images", "num_channels": 1, "patch_size": 2}
VIDEOS = {"type": "videos", "num_channels": 1, "patch_size": 4}
SIZES = {
    FeedbackForImageClassification: ((1, 8, 12), (1, 13, 5)),
    FeedbackForVideoClassification: ((4, 1, 8, 12), (7, 1, 9, 5)),
}


def filled(model):
    """The model with every parameter drawn, so that none hides a fault by being zero."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def padded(arrays):
    """A batch [B, ..., C, H, W] of arrays of several sizes, and the mask of its real pixels, without the channels."""
    shape = [max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True)]
    batch, mask = torch.zeros(len(arrays), *shape), torch.zeros(len(arrays), *shape)
    for row, array in enumerate(arrays):
        place = (row, *(slice(size) for size in array.shape))
        batch[place], mask[place] = array, 1
    return batch, mask.select(-3, 0)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("head", SIZES, ids=lambda head: head.__name__)
def test_a_batch_of_several_sizes_is_as_each_alone(head, parts):
    kind = IMAGES if head is FeedbackForImageClassification else VIDEOS
    model = filled(build(head, input_config=kind, is_causal=False, num_labels=3, **PARTS[parts]))
    arrays = [torch.randn(size) for size in SIZES[head]]
    batch, mask = padded(arrays)
    outputs = model(batch, pixel_mask=mask, output_feedback_states=True)
    for row, array in enumerate(arrays):
        assert_close(outputs.logits[row], model(array[None]).logits[0], 1e-4)
    assert_close(model.step_logits(outputs)[-1], outputs.logits, 1e-5)
    noise = torch.where(mask.bool().unsqueeze(-3), batch, torch.randn_like(batch))
    assert_close(model(noise, pixel_mask=mask).logits, outputs.logits, 1e-5)
    assert (outputs.logits[0] - outputs.logits[1]).abs().max() > 1e-3


def test_the_place_of_a_cell_counts():
    """Two cells of an image change places: attention alone would not see it."""
    model = filled(build(FeedbackForImageClassification, input_config=IMAGES, is_causal=False, num_labels=3))
    image = torch.randn(1, 1, 8, 8)
    other = image.clone()
    other[..., :2, :2], other[..., 4:6, 2:4] = image[..., 4:6, 2:4], image[..., :2, :2]
    assert (model(image).logits - model(other).logits).abs().max() > 1e-3


def test_waves_of_the_grid():
    """Sine and cosine of row and column, by hand."""
    positions = GridPositions(2, 4)
    made, count = positions((3, 5)), GridPositions.FREQUENCIES
    waves = [1000.0 ** (-k / count) for k in range(count)]
    row, column = 2, 3
    by_hand = [f(place * w) for place in (row, column) for f in (math.sin, math.cos) for w in waves]
    assert_close(made[row * 5 + column], positions.projection.weight @ torch.tensor(by_hand), 1e-5)


def test_pixels_that_do_not_fit():
    model = build(FeedbackForVideoClassification, input_config=VIDEOS, is_causal=False)
    with pytest.raises(ValueError, match=r"takes \[batch, frames, channels, height, width\] with 1 channels"):
        model(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="give 1 for each real pixel and 0 for padding"):
        model(torch.zeros(2, 2, 1, 8, 8), pixel_mask=torch.ones(2, 8, 8))
    with pytest.raises(ValueError, match="This model reads pixel_values, not input_ids"):
        model.model(input_ids=tokens())
    with pytest.raises(ValueError, match="Classification reads pixel_values: set input_config='images'"):
        build(FeedbackForImageClassification, input_config="videos", is_causal=False)


def test_frame_by_frame_with_a_carried_state():
    """Along time, a video in pieces is the whole video; a position is a frame."""
    frames = {"type": "videos", "num_channels": 1, "patch_size": 8, "tubelet_size": 1, "positions": "none"}
    along = {"feedback_axis": "time", "feedback_type": "gru", "num_encoder_layers": 0, "decoder_type": "mlp"}
    model = filled(build(FeedbackForVideoClassification, input_config=frames, num_labels=3, **along))
    video, state = torch.randn(2, 6, 1, 8, 8), None
    for frame in video.split(1, dim=1):
        outputs = model(frame, feedback_state=state)
        state = outputs.feedback_state
    assert_close(outputs.logits, model(video).logits, 1e-5)


# A source of another kind


def captioner(**fields):
    source = {"source_config": IMAGES, "is_encoder_decoder": True}
    ids = {"pad_token_id": PAD, "decoder_start_token_id": 1, "eos_token_id": EOS}
    return build(FeedbackForConditionalGeneration, **{**source, **ids, **fields})


@pytest.mark.parametrize("parts", ["transformer", "conv", "along"])
def test_captions_of_a_batch_are_those_of_each_image(parts):
    fields = {**PARTS[parts], "decoder_type": "transformer"}
    model = filled(captioner(**fields))
    images = [torch.randn(1, 8, 12), torch.randn(1, 6, 4)]
    batch, mask = padded(images)
    asked = {"max_new_tokens": 5, "do_sample": False}
    written = model.generate(pixel_values=batch, pixel_mask=mask, **asked)
    for row, image in enumerate(images):
        alone = model.generate(pixel_values=image[None], **asked)[0]
        assert written[row, : len(alone)].tolist() == alone.tolist()
    target = tokens(2, 6)
    loss = model(pixel_values=batch, pixel_mask=mask, labels=target).loss
    each = [model(pixel_values=image[None], labels=target[[row]]).loss for row, image in enumerate(images)]
    assert_close(loss, torch.stack(each).mean(), 1e-4)
    beams = model.generate(pixel_values=batch, pixel_mask=mask, num_beams=2, **asked)
    assert beams.shape[0] == 2


def test_a_captioner_is_saved_with_its_source(tmp_path):
    model, image = captioner(), torch.randn(1, 1, 8, 8)
    model.save_pretrained(tmp_path)
    again, info = FeedbackForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and again.config.source_config == model.config.source_config
    written = {"decoder_input_ids": tokens(1, 4)}
    assert torch.equal(again(pixel_values=image, **written).logits, model(pixel_values=image, **written).logits)
    with pytest.raises(ValueError, match="The source is pixel_values, so input_ids is not read"):
        model(input_ids=tokens(), **written)


# Configs


def test_fields_of_0_1_0_are_moved(caplog):
    config = FeedbackConfig(embedding_type="patches", image_size=8, patch_size=2, num_channels=3)
    assert "are fields of input_config now" in caplog.text
    assert config.input_config.to_dict() == {"type": "images", "patch_size": 2, "num_channels": 3, "positions": "none"}
    saved = {"model_type": "feedback", "format_version": 2, "embedding_type": "values", "num_channels": 2}
    assert FeedbackConfig.from_dict(saved).input_config.to_dict() == {"type": "values", "num_channels": 2}


def test_an_input_can_be_given_in_three_ways():
    given = ("images", {"type": "images"}, tiny(input_config="images").input_config)
    first, *others = [tiny(input_config=each) for each in given]
    assert [first, first] == others
    assert FeedbackConfig.from_dict(first.to_dict()).to_json_string() == first.to_json_string()


# A modality of one's own

SPECTRUM = '''
"""Sizes of the frequencies of a signal, a position each."""

from dataclasses import dataclass

import torch
from torch import nn

from feedback_transformers import register
from feedback_transformers.models.feedback_inputs import Embedded, Fields, Input


@dataclass(kw_only=True)
class SpectrumFields(Fields):
    type: str = "spectrum"
    width: int = 4


@register("input_type", "spectrum")
class Spectrum(Input):
    Fields = SpectrumFields
    takes = ("signal",)

    def __init__(self, config, fields):
        super().__init__(config, fields)
        self.projection = nn.Linear(fields.width, config.hidden_size)

    def forward(self, signal):
        sizes = torch.fft.rfft(signal).abs()[:, 1:]
        return Embedded(self.projection(sizes.unflatten(1, (-1, self.fields.width))))
'''


def test_a_modality_of_ones_own(tmp_path, monkeypatch, registries):
    """One file and one line of registration: it builds, computes, is saved with its code, and loads again."""
    (tmp_path / "spectrum.py").write_text(SPECTRUM)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.import_module("spectrum")
    try:
        model = build(FeedbackModel, input_config={"type": "spectrum", "width": 8}, is_causal=False)
        signal = torch.randn(2, 64)
        y = model(signal=signal).last_hidden_state
        assert y.shape == (2, 4, 32)
        model.save_pretrained(tmp_path / "it")
        assert (tmp_path / "it" / "spectrum.py").is_file()
        assert torch.equal(FeedbackModel.from_pretrained(tmp_path / "it")(signal=signal).last_hidden_state, y)
        with pytest.raises(ValueError, match="reads input_ids: set input_config='tokens', not 'spectrum'"):
            build(FeedbackForCausalLM, input_config="spectrum")
    finally:
        del sys.modules["spectrum"]


# Pretrained encoders


def tiny_encoders():
    """Of images, text and sound, by the head that they go with."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vision = ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=3)
    text = BertConfig(**sizes, vocab_size=50)
    sound = {"conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2}
    heard = Wav2Vec2Config(**sizes, **sound, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=9)
    return {"images": vision, "text": text, "sound": heard}


@pytest.mark.parametrize("kind", ["images", "text", "sound"])
def test_a_pretrained_encoder(kind, tmp_path):
    """Its states, projected; frozen, so that training leaves it alone; saved and loaded with the model."""
    encoder = AutoModel.from_config(tiny_encoders()[kind]).eval()
    encoder.save_pretrained(tmp_path / "encoder")
    fields = {"type": "pretrained", "encoder": str(tmp_path / "encoder")}
    model = build(FeedbackModel, input_config=fields, is_causal=False)
    model.embeddings.load_weights(tmp_path / "encoder")
    raw = {
        "images": {"pixel_values": torch.randn(2, 3, 8, 8)},
        "text": {"input_ids": tokens()},
        "sound": {"input_values": torch.randn(2, 200)},
    }[kind]
    states = encoder(**raw).last_hidden_state
    y = model(**raw).last_hidden_state
    assert_close(y, model(inputs_embeds=model.embeddings.projection(states)).last_hidden_state, 1e-5)
    model.save_pretrained(tmp_path / "it")
    assert_close(FeedbackModel.from_pretrained(tmp_path / "it")(**raw).last_hidden_state, y, 1e-6)
    model.train()
    assert not model.embeddings.encoder.training
    model(**raw).last_hidden_state.sum().backward()
    trained = {
        name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and "embeddings" in name
    }
    assert trained == {"projection"}


def test_a_pretrained_encoder_of_padded_text_and_sound(tmp_path):
    """A batch is as each row alone."""
    text = build(
        FeedbackModel, input_config={"type": "pretrained", "encoder": tiny_encoders()["text"]}, is_causal=False
    )
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    y = text(ids, attention_mask=mask).last_hidden_state
    assert_close(y[1, :6], text(ids[1:, :6]).last_hidden_state[0], 1e-4)
    config = tiny_encoders()["sound"]
    config.feat_extract_norm, config.do_stable_layer_norm = "layer", True  # others norm over the padding too
    sound = build(FeedbackModel, input_config={"type": "pretrained", "encoder": config}, is_causal=False)
    waves, mask = torch.randn(2, 200), torch.ones(2, 200, dtype=torch.long)
    mask[1, 120:] = 0
    waves = waves * mask
    y = sound(input_values=waves, attention_mask=mask).last_hidden_state
    alone = sound(input_values=waves[1:, :120]).last_hidden_state[0]
    assert_close(y[1, : len(alone)], alone, 1e-3)


def test_a_head_on_a_pretrained_encoder():
    fields = {"type": "pretrained", "encoder": tiny_encoders()["images"], "trained": True}
    model = build(FeedbackForImageClassification, input_config=fields, is_causal=False, num_labels=3)
    model.train()(torch.randn(2, 3, 8, 8), labels=torch.tensor([0, 2])).loss.backward()
    assert model.model.embeddings.encoder.embeddings.patch_embeddings.projection.weight.grad.abs().max() > 0
    source = {"source_config": fields, "is_encoder_decoder": True, "decoder_start_token_id": 1, "eos_token_id": EOS}
    writer = build(FeedbackForConditionalGeneration, **source, pad_token_id=PAD)
    assert writer.generate(pixel_values=torch.randn(2, 3, 8, 8), max_new_tokens=3, do_sample=False).shape[0] == 2
    with pytest.raises(ValueError, match="Detection reads pixel_values: set input_config='images', not 'pretrained'"):
        build(FeedbackForObjectDetection, input_config=fields, is_causal=False)
    with pytest.raises(ValueError, match="encoder of an input of pretrained is the name of a checkpoint"):
        tiny(input_config="pretrained")


# What is frozen, refused, or too large for half precision


def test_a_frozen_encoder_stays_frozen_when_it_is_loaded(tmp_path):
    fields = {"type": "pretrained", "encoder": tiny_encoders()["text"]}
    model = build(FeedbackForSequenceClassification, input_config=fields, is_causal=False, num_labels=3)
    model.save_pretrained(tmp_path)
    loaded = FeedbackForSequenceClassification.from_pretrained(tmp_path).train()
    assert not any(p.requires_grad for p in loaded.model.embeddings.encoder.parameters())
    fresh = FeedbackModel(tiny(input_config=fields, is_causal=False))
    assert not fresh.embeddings.encoder.training
    fields["trained"] = True
    trained = build(FeedbackForSequenceClassification, input_config=fields, is_causal=False, num_labels=3).train()
    trained(tokens(), labels=torch.tensor([0, 1])).loss.backward()
    encoder = trained.model.embeddings.encoder
    assert not [name for name, p in encoder.named_parameters() if p.grad is None], "a pooler would wait in vain"


def test_a_language_model_does_not_read_what_it_should_predict():
    fields = {"type": "pretrained", "encoder": tiny_encoders()["text"]}
    with pytest.raises(ValueError, match="reads input_ids: set input_config='tokens', not 'pretrained'"):
        build(FeedbackForMaskedLM, input_config=fields, is_causal=False)
    with pytest.raises(ValueError, match="A pretrained encoder, which reads both sides, needs is_causal=False"):
        tiny(input_config=fields)
    with pytest.raises(ValueError, match="A t5 is no encoder with one hidden_size"):
        tiny(input_config={"type": "pretrained", "encoder": {"model_type": "t5"}}, is_causal=False)


def test_fields_of_an_input_that_stand_alone_are_refused():
    with pytest.raises(ValueError, match="patch_size is a field of input_config: give input_config="):
        FeedbackConfig(input_config="images", patch_size=8)
    with pytest.raises(ValueError, match="patch_size is a field of input_config"):
        FeedbackConfig(is_encoder_decoder=True, source_config="images", patch_size=8)


def test_an_input_can_be_changed_on_a_config(tmp_path):
    config = tiny(input_config={"type": "images", "num_channels": 1}, is_causal=False)
    config.input_config = {"patch_size": 2}
    assert config.input_config.to_dict() == {**IMAGES, "positions": "grid"}
    config.save_pretrained(tmp_path)
    loaded = FeedbackConfig.from_pretrained(tmp_path, input_config={"patch_size": 8})
    assert (loaded.input_config.patch_size, loaded.input_config.num_channels) == (8, 1)
    with pytest.raises(ValueError, match="Unknown field 'patch'"):
        config.input_config = {"patch": 2}


def test_a_source_refuses_what_it_does_not_read():
    model, image = captioner(), torch.randn(1, 1, 8, 8)
    with pytest.raises(ValueError, match="The source is pixel_values, so input_ids is not read: leave it out"):
        model(pixel_values=image, input_ids=tokens(1), labels=tokens(1, 4))
    with pytest.raises(ValueError, match="A source of values takes past_values, which this class does not read yet"):
        captioner(source_config="values")
    embeds, mask = torch.randn(1, 6, 32), torch.tensor([[1, 1, 1, 1, 0, 0]])
    text = {"decoder_input_ids": tokens(1, 4)}
    noise = torch.where(mask[..., None].bool(), embeds, torch.randn_like(embeds))
    first, second = (model(inputs_embeds=x, attention_mask=mask, **text).logits for x in (embeds, noise))
    assert_close(first, second, 1e-5)


def test_a_mask_goes_with_states_of_a_pretrained_source():
    fields = {"type": "pretrained", "encoder": tiny_encoders()["text"]}
    model, mask = captioner(source_config=fields), torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    source, written = tokens(2, 9), {"decoder_input_ids": tokens(2, 4)}
    outputs = model(input_ids=source, attention_mask=mask, **written)
    again = model(encoder_outputs=(outputs.encoder_last_hidden_state,), attention_mask=mask, **written)
    assert_close(again.logits, outputs.logits, 1e-5)


def test_places_along_time_do_not_go_on():
    along = {"feedback_axis": "time", "feedback_type": "gru", "num_encoder_layers": 0, "decoder_type": "mlp"}
    model = build(FeedbackForVideoClassification, input_config=VIDEOS, num_labels=3, **along)
    state = model(torch.randn(2, 4, 1, 8, 8)).feedback_state
    with pytest.raises(ValueError, match="set positions='none' in input_config"):
        model(torch.randn(2, 4, 1, 8, 8), feedback_state=state)


def test_half_precision_counts_pixels():
    """Sizes and areas that float16 and bfloat16 can't hold."""
    images = {"input_config": IMAGES | {"patch_size": 8}, "is_causal": False, "encoder_type": "cnn"}
    model = build(FeedbackForImageToImage, **images, feedback_type="conv", decoder_type="mlp", num_feedback_steps=1)
    pixels = torch.rand(1, 1, 320, 320)
    asked = {"pixel_values": pixels, "labels": torch.zeros_like(pixels)}
    assert_close(model.half()(**asked).loss.float(), model.float()(**asked).loss, 0.01)
    assert image_sizes(pixels[..., :16, :257].bfloat16(), torch.ones(1, 16, 257)).tolist() == [[16, 257]]


def test_convolutions_need_a_grid():
    model = build(FeedbackModel, input_config=IMAGES, is_causal=False, feedback_type="conv")
    with pytest.raises(ValueError, match="Convolutions read the grid of an image, which inputs_embeds do not have"):
        model(inputs_embeds=torch.randn(1, 4, 32))
