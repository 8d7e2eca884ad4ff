"""The transformer layers that are borrowed: their attention, their windows, their dropout."""

import re

import pytest
import torch
from conftest import assert_close, build, tiny, tokens
from transformers import AutoModel, LlamaConfig

from feedback_transformers import FeedbackForCausalLM, FeedbackForMaskedLM
from feedback_transformers.models.feedback_names import BACKBONE_TYPES


@pytest.mark.parametrize("cell", ["gru", "transformer", "conv"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(cell, implementation, tmp_path):
    """Also where the mask is None, and also without causality."""
    for head, causal in ((FeedbackForCausalLM, True), (FeedbackForMaskedLM, False)):
        for family in ("llama", "gpt2"):
            model = build(head, feedback_type=cell, is_causal=causal, backbone_config={"model_type": family})
            model.save_pretrained(tmp_path)
            loaded = head.from_pretrained(tmp_path, attn_implementation=implementation)
            attention = loaded.model.encoder.layers[0]
            attention = attention.attn if family == "gpt2" else attention.self_attn
            assert attention.config._attn_implementation == implementation
            assert_close(loaded(tokens()).logits, model(tokens()).logits, 1e-5)


@pytest.mark.parametrize("backbone", BACKBONE_TYPES)
def test_dropout_reaches_the_backbone(backbone):
    model = build(backbone_config=backbone, dropout=0.0).train()
    torch.testing.assert_close(model(tokens()).logits, model(tokens()).logits, atol=0.0, rtol=0.0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_backbone_config_with_a_window(family, tmp_path):
    """Qwen's configs forget it unless they are told twice."""
    window = {"sliding_window": 3, "layer_types": ["sliding_attention"]}
    model, everything = build(backbone_config={"model_type": family, **window}), build(backbone_config=family)
    if family == "mistral":
        everything.config.backbone_config.sliding_window = None
    everything.load_state_dict(model.state_dict())
    logits = model(tokens()).logits
    assert_close(logits[:, :3], everything(tokens()).logits[:, :3], 1e-5)
    assert (logits - everything(tokens()).logits).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert torch.equal(FeedbackForCausalLM.from_pretrained(tmp_path)(tokens()).logits, logits)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_that_is_named_is_for_all_layers(family, tmp_path):
    """As mistral has it; Qwen's own configs take it for layers from the 28th on, and only where they are told so."""
    fields = {"encoder_type": "rnn", "num_decoder_layers": 0, "num_feedback_steps": 1}
    model = build(backbone_config={"model_type": family, "sliding_window": 3}, **fields)
    assert model.config.backbone_config.layer_types == ["sliding_attention"]
    model.save_pretrained(tmp_path)
    assert torch.equal(FeedbackForCausalLM.from_pretrained(tmp_path)(tokens()).logits, model(tokens()).logits)
    everything = build(backbone_config=family, **fields)
    everything.load_state_dict(model.state_dict())
    apart = (everything(tokens()).logits - model(tokens()).logits).abs().amax((0, 2))
    assert apart[:3].max() < 1e-5 < 1e-3 < apart[3:].min()
    for unused in ({"sliding_window": 3, "use_sliding_window": False}, {}):  # as in a config.json of the Hub
        assert build(backbone_config={"model_type": family, **unused}).config.backbone_config.sliding_window is None


def test_a_checkpoint_keeps_the_family_of_its_layers(tmp_path):
    build(backbone_config="qwen2").save_pretrained(tmp_path)
    for other in ("mistral", {"model_type": "llama"}, LlamaConfig()):
        with pytest.raises(ValueError, match="layers of this checkpoint are qwen2 and backbone_config asks for"):
            FeedbackForCausalLM.from_pretrained(tmp_path, backbone_config=other)
    dropped = FeedbackForCausalLM.from_pretrained(tmp_path, backbone_config={"attention_dropout": 0.1})
    assert dropped.config.backbone_config.attention_dropout == 0.1
    windowed = FeedbackForCausalLM.from_pretrained(tmp_path, backbone_config={"sliding_window": 3})
    apart = (windowed(tokens()).logits - dropped(tokens()).logits).abs().amax((0, 2))
    assert apart[:3].max() < 1e-5 < 1e-3 < apart[3:].min()


def test_backbone_config_of_another_depth():
    model = build(backbone_config={"model_type": "qwen2", "num_hidden_layers": 1}, num_feedback_layers=3)
    assert model.config.backbone_config.num_hidden_layers == 3
    assert torch.isfinite(model(tokens()).logits).all()


def test_a_window_to_both_sides():
    fields = {"is_causal": False, "feedback_signal": "none", "num_encoder_layers": 0, "decoder_type": "mlp"}
    model = build(FeedbackForMaskedLM, backbone_config={"model_type": "mistral", "sliding_window": 2}, **fields)
    before, changed = tokens(1, 9), tokens(1, 9)
    changed[0, 6] = 5 + (changed[0, 6] - 4) % 40
    apart = (model(before).logits - model(changed).logits).abs().amax(-1)[0]
    assert apart[:4].max() == 0 and (apart[4:9] > 1e-4).all(), "two on either side see it"


def layer_statistics(model) -> dict[str, list[tuple[float, float]]]:
    """Mean and standard deviation of each parameter of a layer, by its name within the layer."""
    found: dict[str, list[tuple[float, float]]] = {}
    for name, parameter in model.named_parameters():
        _, layer, inner = re.sub(r"\.\d+\.", ".", name).rpartition("layers." if "layers." in name else "h.")
        if layer:
            found.setdefault(inner, []).append((parameter.mean().item(), parameter.std().item()))
    return found


@pytest.mark.parametrize("family", BACKBONE_TYPES)
def test_fresh_layers_begin_as_those_of_their_family(family):
    """GPT-2 begins its residual projections smaller; norms may begin at zero; a family may have biases."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_feedback_layers": 3, "num_encoder_layers": 3}
    sizes.update(num_decoder_layers=3, initializer_range=0.03)
    model = FeedbackForCausalLM(tiny(**sizes, backbone_config=family))
    own, ours = (layer_statistics(m) for m in (AutoModel.from_config(model.config.backbone_config), model))
    assert own.keys() <= ours.keys()
    for name, values in own.items():
        assert len(ours[name]) == 9
        for mean, std in ours[name]:
            assert abs(mean - values[0][0]) < 3e-3 and abs(std - values[0][1]) < 2e-3, name
    if family == "gpt2":
        expected = 0.03 / (2 * 3) ** 0.5  # as its paper has it, of 3 layers with 2 residual paths each
        assert all(abs(std - expected) < 1e-3 for _, std in ours["mlp.c_proj.weight"])
