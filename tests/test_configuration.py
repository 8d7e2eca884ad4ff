"""FeedbackConfig: what it derives, keeps and borrows. What it refuses is in test_bad_input.py."""

import pytest
from conftest import build, tiny, tokens
from transformers import AutoConfig, GPT2Config, LlamaConfig, Qwen3Config

from feedback_transformers import PRESETS, FeedbackConfig, FeedbackForCausalLM
from feedback_transformers.models import feedback_rules
from feedback_transformers.models.configuration_feedback import AUTO_MAP, MODELING
from feedback_transformers.models.feedback_names import BACKBONE_TYPES
from feedback_transformers.models.feedback_presets import RENAMED


def test_defaults_build():
    config = FeedbackConfig()
    assert (config.intermediate_size, config.num_key_value_heads) == (1024, 4)
    assert config.auto_map == AUTO_MAP and set(MODELING) < set(AUTO_MAP)
    assert isinstance(config.backbone_config, LlamaConfig)


@pytest.mark.parametrize("family", BACKBONE_TYPES)
def test_round_trip(family, tmp_path):
    config = tiny(backbone_config={"model_type": family}, feedback_noise=0.1, num_feedback_steps=5, hidden_act="gelu")
    config.save_pretrained(tmp_path)
    for loaded in (FeedbackConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is FeedbackConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert loaded.backbone_config.to_dict() == config.backbone_config.to_dict()
    assert type(loaded.backbone_config) is type(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", BACKBONE_TYPES)
def test_sizes_go_to_the_backbone(family):
    backbone = tiny(backbone_config=family, num_key_value_heads=2, hidden_act="relu", dropout=0.25).backbone_config
    assert (backbone.hidden_size, backbone.num_attention_heads, backbone.max_position_embeddings) == (32, 4, 96)
    if family == "gpt2":
        assert (backbone.n_inner, backbone.activation_function) == (48, "relu")
    else:
        assert (backbone.intermediate_size, backbone.hidden_act) == (48, "relu")
        assert getattr(backbone, "num_key_value_heads", 2) == 2  # hrm_text has a key for each query
        assert backbone.attention_dropout == 0.25
        assert getattr(backbone, "head_dim", 8) == 8


@pytest.mark.parametrize(
    "backbone",
    [
        {"model_type": "llama", "hidden_size": 48, "num_attention_heads": 6},
        LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=6, intermediate_size=192),
        {"model_type": "gpt2", "n_embd": 48, "n_head": 6},
        GPT2Config(n_embd=48, n_head=6),
    ],
)
def test_sizes_that_the_backbone_names_win(backbone):
    """And what is derived is derived of them."""
    config = FeedbackConfig(vocab_size=50, backbone_config=backbone)
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (48, 6, 6)
    assert config.intermediate_size == 192
    assert FeedbackForCausalLM(config)(tokens()).logits.shape == (2, 13, 50)


def test_a_given_backbone_is_copied():
    backbone = Qwen3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=48
    )
    config = tiny(backbone_config=backbone)
    assert config.backbone_config is not backbone
    assert config.backbone_config.head_dim == 16 and config.num_key_value_heads == 2
    assert build(backbone_config=backbone).model.encoder.layers[0].self_attn.q_proj.weight.shape == (64, 32)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = FeedbackConfig.preset(name, vocab_size=50, hidden_size=32)
    fields = {field: value for field, value in PRESETS[name].items() if field != "backbone_config"}
    assert {field: getattr(config, field) for field in fields} == fields
    assert FeedbackConfig.preset(name, num_feedback_layers=5).num_feedback_layers == 5
    with pytest.raises(Exception, match="positional"):
        FeedbackConfig(50)


TIME, JACOBI = {"feedback_axis": "time"}, {"solver": "jacobi"}
NEWTON = {"solver": "newton", "feedback_type": "min_gru", "feedback_signal": "none"}


@pytest.mark.parametrize(
    ("axis", "unread", "read"),
    [("time", "num_feedback_steps", "solver_steps"), ("depth", "solver_steps", "num_feedback_steps")],
)
def test_steps_that_nothing_reads_are_told(axis, unread, read, monkeypatch):
    said = []
    monkeypatch.setattr(feedback_rules.logger, "warning_once", said.append)
    FeedbackConfig(feedback_axis=axis, solver="jacobi" if axis == "time" else "sequential", **{read: 7})
    assert not said
    FeedbackConfig(feedback_axis=axis, **{unread: 7})
    assert len(said) >= 1 and f"{unread} has no effect with feedback_axis='{axis}'" in said[0] and read in said[0]


@pytest.mark.parametrize(
    ("name", "value", "read_with"),
    [
        ("solver_tolerance", 0.1, {"solver": "jacobi"}),
        ("solver_block_size", 8, {"solver": "gauss_seidel"}),
        ("supervision", "all", {"feedback_axis": "depth"}),
        ("halting_threshold", 0.2, {"feedback_axis": "depth", "halting": "converged"}),
        ("relaxation", 0.9, {"feedback_axis": "depth", "feedback_recursion": "hierarchical"}),
        ("state_noise", 0.1, {"feedback_axis": "depth", "feedback_recursion": "hierarchical"}),
        ("initial_state_cut", 2, {"feedback_axis": "depth", "initial_state": "random"}),
    ],
)
def test_other_options_that_nothing_reads_are_told(name, value, read_with, monkeypatch):
    said = []
    monkeypatch.setattr(feedback_rules.logger, "warning_once", said.append)
    FeedbackConfig(**{"feedback_axis": "time", **read_with, name: value})
    assert not said
    FeedbackConfig(feedback_axis="time", **{name: value})
    assert said and said[0].startswith(f"{name} has no effect")


ALREADY = [
    # what is set, and the advice that it already follows
    ({**TIME, "solver": "jacobi", "num_feedback_steps": 9}, "set solver_steps for its passes", "solver='jacobi'"),
    ({**TIME, "solver": "gauss_seidel", "num_feedback_steps": 9}, "set solver_steps for its passes", "solver="),
    ({**TIME, "feedback_signal": "none", "num_feedback_steps": 9}, "use feedback_axis='depth'", "solver="),
    ({**TIME, **NEWTON, "solver_steps": 9}, "it is for 'jacobi' and 'gauss_seidel'", "depth"),
    ({**TIME, "solver_steps": 9}, "it is for 'jacobi' and 'gauss_seidel'", "depth"),
    ({"halting": "converged", "halting_prior": 0.3}, "with halting='converged': it is for 'learned'", "fixed"),
]
REFUSED = [
    ({**TIME, **JACOBI, "feedback_signal": "none", "halting": "act"}, "feedback_signal='state' or 'output'", "jacobi"),
    ({**TIME, "halting": "act"}, "needs feedback_axis='depth' or solver='jacobi'.", "signal"),
    ({**TIME, "solver": "gauss_seidel", "halting": "act"}, "set solver='jacobi'", "depth"),
    ({**TIME, **NEWTON, "feedback_signal": "state"}, "channels, needs feedback_signal='none'.", "feedback_type"),
    ({**TIME, **NEWTON, "feedback_type": "gru"}, "needs feedback_type='diagonal_gru' or 'min_gru'.", "signal"),
    ({"feedback_connection": "memory"}, "'memory' needs feedback_axis='time'.", "halting"),
    ({**TIME, "shared_step_cache": True}, "needs feedback_axis='depth'.", "feedback_type"),
    ({"feedback_type": "gru", "shared_step_cache": True}, "needs feedback_type='transformer'.", "axis"),
]


@pytest.mark.parametrize(("fields", "sentence", "followed"), ALREADY, ids=lambda value: str(value)[:60])
def test_advice_is_not_followed_already(fields, sentence, followed, monkeypatch):
    said = []
    monkeypatch.setattr(feedback_rules.logger, "warning_once", said.append)
    FeedbackConfig(**fields)
    (found,) = set(said)
    assert sentence in found and followed not in found.partition(": ")[2]


@pytest.mark.parametrize(("fields", "sentence", "followed"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_refusal_names_what_is_to_change_alone(fields, sentence, followed):
    with pytest.raises(ValueError) as raised:
        FeedbackConfig(**fields)
    assert sentence in str(raised.value) and followed not in str(raised.value)


def test_num_hidden_layers_is_not_inflated():
    config = tiny(num_feedback_layers=2)
    assert config.num_hidden_layers == 2
    config.num_hidden_layers = 3
    assert config.num_feedback_layers == 3


@pytest.mark.parametrize("backbone", ["llama", "qwen2", "qwen3"])
def test_more_layers_than_it_was_made_with(backbone, tmp_path):
    tiny(backbone_config=backbone).save_pretrained(tmp_path)
    config = FeedbackConfig.from_pretrained(tmp_path, num_feedback_layers=3)
    assert len(FeedbackForCausalLM(config).model.loop.cell.layers) == 3


def test_labels(tmp_path):
    config = tiny(num_labels=5)
    config.save_pretrained(tmp_path)
    assert FeedbackConfig.from_pretrained(tmp_path).num_labels == 5
    assert FeedbackConfig.from_pretrained(tmp_path, num_labels=7).num_labels == 7


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_names_of_presets_warn(old, new):
    with pytest.warns(FutureWarning, match=f"is called '{new}' now"):
        assert FeedbackConfig.preset(old).to_dict() == FeedbackConfig.preset(new).to_dict()
    with pytest.warns(FutureWarning, match=f"is called '{new}' now"):
        assert PRESETS[old] == PRESETS[new] and old not in PRESETS
