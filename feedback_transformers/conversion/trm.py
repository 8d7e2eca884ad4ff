"""Puzzle models: HRM (Wang et al. 2025, arXiv:2506.21734), TRM (Jolicoeur-Martineau 2025, arXiv:2510.04871) and EqR
(Huang et al. 2026, arXiv:2605.21488).

e = √D [puzzle; tokens]; each supervision step makes H_cycles passes of the hierarchical recursion, and answers
lm_head(z_H) behind the positions of the puzzle, and q_head(z_H) at the first position. EqR has no puzzle embedding,
draws z_H and z_L at random, and relaxes each step.
"""

from __future__ import annotations

from collections.abc import Collection
from math import ceil, sqrt
from typing import Any

from ..models.configuration_feedback import FeedbackConfig
from ..models.feedback_presets import EQR_SCALE
from .families import Family, Official, enter
from .mapping import Row, Rows, layers, refuse

SOURCES = {
    "trm": "SamsungSAILMontreal/TinyRecursiveModels e7b6871",
    "trm_singlez": "SamsungSAILMontreal/TinyRecursiveModels e7b6871",
    "hrm": "sapientinc/HRM 42410da",
    "eqr": "locuslab/EqR 4d45856",
}
MULTIPLE = 256  # of the width of an MLP


def width(official: Official, size: int) -> int:
    """Return the width of an MLP over `size` numbers."""
    return ceil(round(official["expansion"] * size * 2 / 3) / MULTIPLE) * MULTIPLE


def prefix_length(official: Official) -> int:
    """Return the positions that a puzzle's embedding takes."""
    return official.get("puzzle_emb_len") or ceil(official.get("puzzle_emb_ndim", 0) / official["hidden_size"])


def is_puzzle(official: Official) -> bool:
    """Return whether a published config is of a puzzle model."""
    return "puzzle_emb_ndim" in official or {"lambda_", "H_cycles"} <= official.keys()


def kind_of(official: Official, names: Collection[str]) -> str:
    """Return which of SOURCES holds weights of these names."""
    if "lambda_" in official:
        return "eqr"
    if any(".H_level." in name for name in names):
        return "hrm"
    return "trm" if any(name.endswith("H_init") for name in names) else "trm_singlez"


def rows_of(kind: str) -> Any:
    """Return the function that makes the table of a kind."""

    def rows(official: Official) -> list[Row]:
        size = official["hidden_size"]
        length = official["seq_len"] + prefix_length(official)
        mixer = width(official, length)
        mlp = width(official, size)
        layer = [
            Row(
                "self_attn.qkv_proj.weight",
                tuple(f"self_attn.{each}_proj.weight" for each in "qkv"),
                Rows(size, size, size),
            ),
            Row("self_attn.o_proj.weight", ("self_attn.o_proj.weight",)),
            Row("mlp.gate_up_proj.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), Rows(mlp, mlp)),
            Row("mlp.down_proj.weight", ("mlp.down_proj.weight",)),
            Row(
                "mlp_t.gate_up_proj.weight",
                ("mixer.mlp.gate_proj.weight", "mixer.mlp.up_proj.weight"),
                Rows(mixer, mixer),
            ),
            Row("mlp_t.down_proj.weight", ("mixer.mlp.down_proj.weight",)),
        ]
        low = "model.loop.cell." if kind == "trm_singlez" else "model.loop.cell.low."
        first, low_state = ("model.loop.initial_state.vector",), ("model.loop.cell.low_state",)
        begins = dict.fromkeys(SOURCES, [Row("H_init", first), Row("L_init", low_state)])
        begins |= {"trm_singlez": [Row("L_init", first)], "eqr": []}
        return [
            Row("embed_tokens.embedding_weight", ("model.embeddings.embed_tokens.weight",)),
            Row("puzzle_emb.weights", ("model.prefixes.weight",)),
            *begins[kind],
            *layers("L_level.layers.{n}.", low + "layers.{n}.", layer),
            *layers("H_level.layers.{n}.", "model.loop.cell.high.layers.{n}.", layer),
            Row("q_head.weight", ("model.loop.halting.halt_proj.weight",)),
            Row("q_head.bias", ("model.loop.halting.halt_proj.bias",)),
            Row("lm_head.weight", ("lm_head.weight",)),
        ]

    return rows


def config_of(kind: str) -> Any:
    """Return the function that makes our config of a kind."""

    def config(official: Official) -> FeedbackConfig:
        mixes = bool(official.get("mlp_t"))
        places = "none" if mixes else "rope"
        if not (kind == "eqr" and mixes):  # whose config names what it does not read
            refuse({"pos_encodings": str(official.get("pos_encodings", places)).lower()}, pos_encodings=places)
        if kind == "hrm":
            refuse(official, H_layers=official["L_layers"])
        size, length = official["hidden_size"], official["seq_len"] + prefix_length(official)
        backbone = {
            "model_type": "llama",
            "hidden_size": size,
            "num_attention_heads": official["num_heads"],
            "intermediate_size": width(official, size),
            "max_position_embeddings": length,
            "rms_norm_eps": official.get("rms_norm_eps", 1e-5),
            "rope_parameters": {"rope_type": "default", "rope_theta": float(official.get("rope_theta", 10000.0))},
        }
        mixer = {"token_mixer": "mlp", "mixer_size": width(official, length)} if mixes else {}
        relaxed = relaxation_of(official) if kind == "eqr" else {}
        return FeedbackConfig.preset(
            kind.replace("_", "-"),
            vocab_size=official["vocab_size"],
            backbone_config=backbone,
            num_feedback_layers=official["L_layers"],
            num_low_steps=official["L_cycles"],
            num_feedback_steps=official["H_cycles"] * official["halt_max_steps"],
            supervision_interval=official["H_cycles"],
            num_prefix_tokens=prefix_length(official),
            num_prefixes=official["num_puzzle_identifiers"] if prefix_length(official) else 1,
            prefix_size=official.get("puzzle_emb_ndim") or None,
            embedding_scale=sqrt(size),
            **mixer,
            **relaxed,
        )

    return config


def relaxation_of(official: Official) -> dict[str, Any]:
    """Return our fields of the relaxation, the noise and the initial state of an EqR."""
    high, low = (official.get(name, 1.0) for name in ("H_init_std", "L_init_std"))
    refuse({"L_init_std": low}, L_init_std=high)
    return {
        "relaxation": official["lambda_"],
        "state_noise": official.get("noise_scale", 0.01),
        "initial_state_scale": high * EQR_SCALE,
    }


def official_of(kind: str) -> Any:
    """Return the function that makes their config of ours."""

    def official(config: FeedbackConfig) -> Official:
        puzzle = {
            "puzzle_emb_ndim": config.prefix_size or config.num_prefix_tokens * config.hidden_size,
            "puzzle_emb_len": config.num_prefix_tokens,
            "num_puzzle_identifiers": config.num_prefixes,
        }
        std = config.initial_state_scale / EQR_SCALE
        relaxed = {"lambda_": config.relaxation, "noise_scale": config.state_noise}
        relaxed |= {"H_init_std": std, "L_init_std": std}
        return {
            "batch_size": 1,
            "seq_len": config.max_position_embeddings - config.num_prefix_tokens,
            **(relaxed if kind == "eqr" else puzzle),
            "vocab_size": config.vocab_size,
            "H_cycles": config.supervision_interval,
            "L_cycles": config.num_low_steps,
            "H_layers": 0 if kind == "eqr" else config.num_feedback_layers,
            "L_layers": config.num_feedback_layers,
            "hidden_size": config.hidden_size,
            "expansion": 1.5 * config.intermediate_size / config.hidden_size,
            "num_heads": config.num_attention_heads,
            "pos_encodings": "none" if config.token_mixer == "mlp" else "rope",
            "mlp_t": config.token_mixer == "mlp",
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.backbone_config.rope_parameters["rope_theta"],
            "halt_max_steps": config.num_feedback_steps // config.supervision_interval,
            "halt_exploration_prob": 0.1,
            "forward_dtype": "float32",
        }

    return official


for name, source in SOURCES.items():
    enter(
        Family(
            name,
            source,
            config_of(name),
            rows_of(name),
            official_of(name),
            head="FeedbackForMaskedLM",
            prefixes=("_orig_mod.model.inner.", "model.inner.", "inner."),
        )
    )
