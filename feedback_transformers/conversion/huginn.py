"""Huginn (Geiping et al. 2025, arXiv:2502.05171), and models that its authors made recurrent (McLeish et al. 2025).

e = prelude(embeddings), x_0 random, x = core(adapter [x; e]), y = coda(x). Huginn has norms on the residual sums,
biases of queries and keys, neighbouring rotary pairs, and its last norm before the coda too. A retrofitted model has
the layers of the Llama or OLMo 2 that it was made from.
"""

from __future__ import annotations

from collections.abc import Collection
from math import sqrt
from typing import Any

from ..models.configuration_feedback import FeedbackConfig
from .families import Family, Official, enter, rope_of, shared_fields
from .mapping import PairedBias, PairedRows, Row, Rows, SwappedColumns, layers, refuse

PARTS = {
    "transformer.prelude.{n}.": "model.encoder.layers.{n}.",
    "transformer.core_block.{n}.": "model.loop.cell.layers.{n}.",
    "transformer.coda.{n}.": "model.decoder.layers.{n}.",
}
QUERIES_KEYS_VALUES = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")


def kind_of(official: Official, names: Collection[str]) -> str:
    """Return which layers a checkpoint of type huginn_raven has: its config does not always tell them."""
    if official.get("qk_bias"):
        return "huginn"
    return "retrofitted_olmo" if any(name.endswith("attn.q_norm.weight") for name in names) else "retrofitted_llama"


def sizes(official: Official) -> tuple[int, int, int]:
    """Return the numbers of query heads and of key heads, and the size of a head."""
    heads = official.get("n_heads") or official["num_attention_heads"]
    size = official.get("head_dim") or official["n_embd"] // heads
    return heads, official.get("num_key_value_heads") or heads, size


def rows_of(kind: str) -> Any:
    """Return the function that makes the table of a kind."""

    def rows(official: Official) -> list[Row]:
        heads, groups, size = sizes(official)
        split = (heads * size, groups * size, groups * size)
        pairs = kind == "huginn"
        norms = {
            "huginn": ("input_layernorm", "attention_norm", "post_attention_layernorm", "mlp_norm"),
            "retrofitted_llama": ("input_layernorm", "post_attention_layernorm"),
            "retrofitted_olmo": ("post_attention_layernorm", "post_feedforward_layernorm"),
        }[kind]
        width = official["intermediate_size"]
        layer = [
            Row("attn.Wqkv.weight", QUERIES_KEYS_VALUES, PairedRows(*split, head_dim=size) if pairs else Rows(*split)),
            Row("attn.proj.weight", ("self_attn.o_proj.weight",)),
            Row("mlp.fc.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), Rows(width, width)),
            Row("mlp.proj.weight", ("mlp.down_proj.weight",)),
            *(Row(f"norm_{i}.weight", (f"{name}.weight",)) for i, name in enumerate(norms, start=1)),
        ]
        if kind == "huginn":
            biases = ("self_attn.q_proj.bias", "self_attn.k_proj.bias")
            layer.append(Row("attn.qk_bias", biases, PairedBias(*split[:2], head_dim=size)))
        if kind == "retrofitted_olmo":
            layer += [Row(f"attn.{name}.weight", (f"self_attn.{name}.weight",)) for name in ("q_norm", "k_norm")]
        return [
            Row("transformer.wte.weight", ("model.embeddings.embed_tokens.weight",)),
            *(row for theirs, ours in PARTS.items() for row in layers(theirs, ours, layer)),
            Row("transformer.adapter.weight", ("model.loop.connection.signal_proj.weight",), SwappedColumns()),
            Row("transformer.ln_f.weight", ("model.norm.weight",)),
            Row("lm_head.weight", ("lm_head.weight",)),
        ]

    return rows


def config_of(kind: str) -> Any:
    """Return the function that makes our config of a kind."""

    def config(official: Official) -> FeedbackConfig:
        refuse(official, injection_type="linear", bias=False, test_time_noise=0)
        heads, groups, size = sizes(official)
        family = "olmo2" if kind == "retrofitted_olmo" else "llama"
        backbone = {
            "model_type": family,
            "hidden_size": official["n_embd"],
            "intermediate_size": official["intermediate_size"],
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": size,
            "rms_norm_eps": official.get("norm_eps", 1e-6),
            "max_position_embeddings": official.get("block_size", 4096),
            "attention_bias": kind == "huginn",
            # A retrofitted model turns as its original did, whatever its config says beside that.
            "rope_parameters": rope_of(
                {"rope_theta": official.get("rope_base", 50000)} if kind == "huginn" else official
            ),
        }
        if family == "olmo2":
            del backbone["head_dim"]
        scale = sqrt(official["n_embd"]) if kind == "huginn" else 1.0
        start = "input" if official.get("initial_state_mode") == "embed-init" else "random"
        if start == "random":
            refuse(official, initial_state_mode="random")
        layers = {
            "num_encoder_layers": official["n_layers_in_prelude"],
            "num_feedback_layers": official["n_layers_in_recurrent_block"],
            "num_decoder_layers": official["n_layers_in_coda"],
        }
        fields = {**shared_fields(official), "vocab_size": official.get("padded_vocab_size") or official["vocab_size"]}
        tied = official.get("tie_embeddings", official.get("tie_word_embeddings", kind == "huginn"))
        return FeedbackConfig.preset(
            kind if kind == "huginn" else "retrofitted-recurrence",
            **{**fields, **layers, "tie_word_embeddings": bool(tied)},
            backbone_config=backbone,
            num_feedback_steps=official.get("mean_recurrence", 32),
            gradient_steps=official.get("mean_backprop_depth", 8),
            embedding_scale=scale,
            initial_state=start,
            initial_state_scale=sqrt(2 / 5) if kind == "huginn" else sqrt(2 / (5 * official["n_embd"])),
        )

    return config


def official_of(kind: str) -> Any:
    """Return the function that makes their config of ours."""

    def official(config: FeedbackConfig) -> Official:
        backbone, parts = (
            config.backbone_config,
            (
                config.num_encoder_layers,
                config.num_feedback_layers,
                config.num_decoder_layers,
            ),
        )
        return {
            "model_type": "huginn_raven",
            "architectures": ["RavenForCausalLM"],
            "n_embd": config.hidden_size,
            "n_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.hidden_size // config.num_attention_heads,
            "n_layers": sum(parts),
            **dict(
                zip(("n_layers_in_prelude", "n_layers_in_recurrent_block", "n_layers_in_coda"), parts, strict=True)
            ),
            "intermediate_size": config.intermediate_size,
            "vocab_size": config.vocab_size,
            "padded_vocab_size": config.vocab_size,
            "norm_eps": config.norm_eps,
            "rope_base" if kind == "huginn" else "rope_theta": backbone.rope_parameters["rope_theta"],
            "block_size": config.max_position_embeddings,
            "qk_bias": kind == "huginn",
            "qk_norm": kind == "retrofitted_olmo",
            "bias": False,
            "tie_embeddings": config.tie_word_embeddings,
            "tie_word_embeddings": config.tie_word_embeddings,
            "mean_recurrence": config.num_feedback_steps,
            "mean_backprop_depth": config.gradient_steps,
            "injection_type": "linear",
            "state_init": "like-init",
            "initial_state_mode": "embed-init" if config.initial_state == "input" else "random",
            **{name: getattr(config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
        }

    return official


for name, source in {
    "huginn": "seal-rg/recurrent-pretraining 59e0b69",
    "retrofitted_llama": "LoopedLMs/retrofitting-recurrence 3797ded",
    "retrofitted_olmo": "LoopedLMs/retrofitting-recurrence 3797ded",
}.items():
    biases = (r".*\.self_attn\.[vo]_proj\.bias",) if name == "huginn" else ()
    enter(
        Family(
            name,
            source,
            config_of(name),
            rows_of(name),
            official_of(name),
            dropped=(r"freqs_cis",),
            zeros=biases,
        )
    )
