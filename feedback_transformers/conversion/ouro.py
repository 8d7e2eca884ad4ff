"""Ouro (ByteDance, arXiv:2510.25741): looped sandwich layers; exits select which pass is read."""

from __future__ import annotations

from ..models.configuration_feedback import FeedbackConfig
from .families import Family, Official, backbone_of, enter, shared_fields
from .mapping import Row, layers, refuse, same

LAYER = [
    *same("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight"),
    *same("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    *same("input_layernorm.weight", "post_attention_layernorm.weight"),
    Row("input_layernorm_2.weight", ("attention_norm.weight",)),
    Row("post_attention_layernorm_2.weight", ("mlp_norm.weight",)),
]
ROWS = [
    Row("model.embed_tokens.weight", ("model.embeddings.embed_tokens.weight",)),
    *layers("model.layers.{n}.", "model.loop.cell.layers.{n}.", LAYER),
    Row("model.norm.weight", ("model.loop.norm.weight",)),
    Row("model.early_exit_gate.weight", ("model.loop.halting.halt_proj.weight",)),
    Row("model.early_exit_gate.bias", ("model.loop.halting.halt_proj.bias",)),
    Row("lm_head.weight", ("lm_head.weight",)),
]


def config(official: Official) -> FeedbackConfig:
    """Return our config of theirs."""
    refuse(official, use_sliding_window=False)
    return FeedbackConfig.preset(
        "ouro",
        **{"tie_word_embeddings": False, **shared_fields(official)},
        backbone_config=backbone_of(official),
        num_feedback_layers=official["num_hidden_layers"],
        num_feedback_steps=official.get("total_ut_steps", 4),
        halting_threshold=official.get("early_exit_threshold", 1.0),
    )


def official(config: FeedbackConfig) -> Official:
    """Return their config of ours."""
    backbone = config.backbone_config
    names = (
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("max_position_embeddings", "hidden_act", "initializer_range", "rms_norm_eps", "attention_dropout"),
    )
    return {
        "model_type": "ouro",
        "architectures": ["OuroForCausalLM"],
        **{name: getattr(backbone, name) for name in names},
        **{name: getattr(config, name) for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
        "rope_theta": backbone.rope_parameters["rope_theta"],
        "tie_word_embeddings": config.tie_word_embeddings,
        "num_hidden_layers": config.num_feedback_layers,
        "total_ut_steps": config.num_feedback_steps,
        "early_exit_threshold": config.halting_threshold or 1.0,
        "use_sliding_window": False,
    }


OURO = enter(Family("ouro", "LoopedLMs/ouro_rl 531187b", config, lambda official: ROWS, official, body="model."))
