"""FAMILIES: the published models that load here, each as a mapping of its config and of its weights.

Shapes: D hidden size, V vocabulary. `official` is the published config as a dictionary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..models.configuration_feedback import FeedbackConfig
from .mapping import Row

Official = dict[str, Any]


class Family(NamedTuple):
    """A published architecture."""

    name: str
    source: str  # the code that its function was compared with
    config: Callable[[Official], FeedbackConfig]
    rows: Callable[[Official], list[Row]]
    official: Callable[[FeedbackConfig], Official]  # their config of ours, the inverse of `config`
    head: str = "FeedbackForCausalLM"
    dropped: tuple[str, ...] = ()  # patterns of their weights that hold nothing learned
    zeros: tuple[str, ...] = ()  # patterns of our weights that they lack and that are zero
    tied: tuple[str, ...] = ("lm_head.weight",)  # our weights that are others too, where embeddings are tied
    prefixes: tuple[str, ...] = ()  # that checkpoints may put before each name
    body: str = ""  # what checkpoints of the base model alone leave out before each name


FAMILIES: dict[str, Family] = {}


def enter(family: Family) -> Family:
    """Add a family to the table."""
    FAMILIES[family.name] = family
    return family


def shared_fields(official: Official) -> dict[str, Any]:
    """Return the fields that published configs of the Llama kind have under our names."""
    names = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    return {name: official[name] for name in names if official.get(name) is not None}


def backbone_of(official: Official, model_type: str = "llama", **more: Any) -> dict[str, Any]:
    """Return the backbone_config of a published config of the Llama kind."""
    names = (
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("max_position_embeddings", "hidden_act", "initializer_range", "rms_norm_eps", "attention_dropout"),
        *("attention_bias", "mlp_bias"),
    )
    fields = {name: official[name] for name in names if official.get(name) is not None}
    return {"model_type": model_type, **fields, "rope_parameters": rope_of(official), **more}


def rope_of(official: Official) -> dict[str, Any]:
    """Return the rotary parameters, in whichever of its places a published config has them."""
    rope = dict(official.get("rope_parameters") or official.get("rope_scaling") or {})
    kind = rope.pop("type", None) or rope.pop("rope_type", None) or "default"
    theta = rope.pop("rope_theta", None) or official.get("rope_theta") or 10000.0
    return {**rope, "rope_type": kind, "rope_theta": float(theta)}
