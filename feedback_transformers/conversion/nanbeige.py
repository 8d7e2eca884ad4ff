"""Nanbeige4.2: all layers of a Llama, several times; the norm at the end of each pass is fed back."""

from __future__ import annotations

from ..models.configuration_feedback import FeedbackConfig
from . import ouro
from .families import Family, Official, backbone_of, enter, shared_fields
from .mapping import Row, layers, refuse, same

LAYER = [
    *same("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight"),
    *same("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
    *same("input_layernorm.weight", "post_attention_layernorm.weight"),
]
ROWS = [
    Row("model.embed_tokens.weight", ("model.embeddings.embed_tokens.weight",)),
    *layers("model.layers.{n}.", "model.loop.cell.layers.{n}.", LAYER),
    Row("model.norm.weight", ("model.loop.norm.weight",)),
    Row("lm_head.weight", ("lm_head.weight",)),
]
# Features of its config that are not built here, and their values without them.
PLAIN = {
    **dict.fromkeys(("skip_loop_final_norm", "loop_share_kv", "use_ngram_embedding", "use_hyper_connection"), False),
    **dict.fromkeys(("use_hyper_connections", "use_depth_attention", "ngram_embedding"), False),
}


def config(official: Official) -> FeedbackConfig:
    """Return our config of theirs."""
    refuse(official, **PLAIN)
    return FeedbackConfig.preset(
        "nanbeige",
        **{"tie_word_embeddings": False, **shared_fields(official)},
        backbone_config=backbone_of(official),
        num_feedback_layers=official["num_hidden_layers"],
        num_feedback_steps=official.get("num_loops", 2),
    )


def official(config: FeedbackConfig) -> Official:
    """Return their config of ours."""
    made = ouro.official(config)
    for name in ("total_ut_steps", "early_exit_threshold", "use_sliding_window"):
        del made[name]
    return {
        **made,
        "model_type": "nanbeige",
        "architectures": ["NanbeigeForCausalLM"],
        "num_loops": config.num_feedback_steps,
        "skip_loop_final_norm": False,
    }


NANBEIGE = enter(
    Family("nanbeige", "LlamaModel of transformers, looped", config, lambda official: ROWS, official, body="model.")
)
