"""ALBERT (Lan et al. 2020, arXiv:1909.11942; in transformers): one group of layers, again and again."""

from __future__ import annotations

from ..models.configuration_feedback import FeedbackConfig
from .families import Family, Official, enter, shared_fields
from .mapping import Row, layers, refuse, same

BOTH = ("weight", "bias")
NAMES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings", "hidden_act"),
    *("initializer_range", "layer_norm_eps", "embedding_size", "type_vocab_size"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob"),
)
LAYER = same(
    *(f"attention.{name}.{kind}" for name in ("query", "key", "value", "dense", "LayerNorm") for kind in BOTH),
    *(f"{name}.{kind}" for name in ("full_layer_layer_norm", "ffn", "ffn_output") for kind in BOTH),
)
ROWS = [
    Row("albert.embeddings.word_embeddings.weight", ("model.embeddings.embed_tokens.weight",)),
    Row("albert.embeddings.position_embeddings.weight", ("model.positions.weight",)),
    Row("albert.embeddings.token_type_embeddings.weight", ("model.token_types.weight",)),
    *(Row(f"albert.embeddings.LayerNorm.{kind}", (f"model.embedding_norm.{kind}",)) for kind in BOTH),
    *(Row(f"albert.encoder.embedding_hidden_mapping_in.{kind}", (f"model.embedding_proj.{kind}",)) for kind in BOTH),
    *layers("albert.encoder.albert_layer_groups.0.albert_layers.{n}.", "model.loop.cell.layers.{n}.", LAYER),
    Row("predictions.bias", ("lm_head.bias",)),
    *(Row(f"predictions.{n}.{kind}", (f"lm_head.{n}.{kind}",)) for n in ("dense", "LayerNorm") for kind in BOTH),
    *(Row(f"predictions.decoder.{kind}", (f"lm_head.decoder.{kind}",)) for kind in BOTH),
]


def config(official: Official) -> FeedbackConfig:
    """Return our config of theirs."""
    refuse(official, num_hidden_groups=1)
    backbone = {"model_type": "albert", **{name: official[name] for name in NAMES if name in official}}
    return FeedbackConfig.preset(
        "albert",
        **shared_fields(official),
        backbone_config=backbone,
        num_feedback_layers=official.get("inner_group_num", 1),
        num_feedback_steps=official.get("num_hidden_layers", 12),
    )


def official(config: FeedbackConfig) -> Official:
    """Return their config of ours."""
    return {
        "model_type": "albert",
        "architectures": ["AlbertForMaskedLM"],
        **{name: getattr(config.backbone_config, name) for name in NAMES},
        **{name: getattr(config, name) for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")},
        "tie_word_embeddings": config.tie_word_embeddings,
        "num_hidden_groups": 1,
        "inner_group_num": config.num_feedback_layers,
        "num_hidden_layers": config.num_feedback_steps,
    }


ALBERT = enter(
    Family(
        "albert",
        "transformers' own albert",
        config,
        lambda official: ROWS,
        official,
        head="FeedbackForMaskedLM",
        dropped=(r"albert\.pooler\..*", r"sop_classifier\..*", r".*\.position_ids"),
        tied=("lm_head.decoder.weight", "lm_head.decoder.bias"),
        body="albert.",
    )
)
