"""HRM-Text (Sapient; in transformers): two latents over a text, gated attention, weightless norms, a prefix that sees
itself on both sides."""

from __future__ import annotations

from ..models.configuration_feedback import FeedbackConfig
from .families import Family, Official, backbone_of, enter, shared_fields
from .mapping import Row, Rows, layers, same

ATTENTION = tuple(f"self_attn.{name}_proj.weight" for name in ("gate", "q", "k", "v"))


def rows(official: Official) -> list[Row]:
    """Return the table; checkpoints of the Hub hold some matrices below each other."""
    width = official["num_attention_heads"] * official.get("head_dim", 128)
    mlp = official["intermediate_size"]
    layer = [
        *same(*ATTENTION, "self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
        *same("mlp.down_proj.weight"),
        Row("attn.gqkv_proj.weight", ATTENTION, Rows(width, width, width, width)),
        Row("attn.o_proj.weight", ("self_attn.o_proj.weight",)),
        Row("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), Rows(mlp, mlp)),
    ]
    return [
        Row("model.embed_tokens.weight", ("model.embeddings.embed_tokens.weight",)),
        *layers("model.L_module.layers.{n}.", "model.loop.cell.low.layers.{n}.", layer),
        *layers("model.H_module.layers.{n}.", "model.loop.cell.high.layers.{n}.", layer),
        Row("model.z_L_init", ("model.loop.cell.low_state",)),
        Row("lm_head.weight", ("lm_head.weight",)),
    ]


def config(official: Official) -> FeedbackConfig:
    """Return our config of theirs."""
    scale = official.get("embedding_scale") or 1 / official.get("initializer_range", 0.02)
    return FeedbackConfig.preset(
        "hrm-text",
        **{"tie_word_embeddings": False, **shared_fields(official)},
        backbone_config=backbone_of(official, "hrm_text", head_dim=official.get("head_dim", 128)),
        num_feedback_layers=official.get("num_layers_per_stack") or official["num_hidden_layers"],
        num_feedback_steps=official.get("H_cycles", 2),
        num_low_steps=official.get("L_cycles", 3),
        embedding_scale=scale,
        prefix_lm=official.get("prefix_lm", True),
    )


def official(config: FeedbackConfig) -> Official:
    """Return their config of ours."""
    backbone = config.backbone_config
    names = (
        *("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "max_position_embeddings"),
        *("hidden_act", "initializer_range", "rms_norm_eps", "rope_parameters", "attention_bias", "mlp_bias"),
    )
    return {
        "model_type": "hrm_text",
        "architectures": ["HrmTextForCausalLM"],
        **{name: getattr(backbone, name) for name in names},
        **{name: getattr(config, name) for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
        "tie_word_embeddings": config.tie_word_embeddings,
        "num_layers_per_stack": config.num_feedback_layers,
        "num_hidden_layers": config.num_feedback_layers * config.num_feedback_steps * (config.num_low_steps + 1),
        "H_cycles": config.num_feedback_steps,
        "L_cycles": config.num_low_steps,
        "embedding_scale": config.embedding_scale,
        "prefix_lm": config.prefix_lm,
    }


HRM_TEXT = enter(Family("hrm_text", "transformers' own hrm_text", config, rows, official, body="model."))
