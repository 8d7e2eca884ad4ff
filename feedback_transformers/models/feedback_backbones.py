"""BACKBONES: model families of transformers whose parts are borrowed, and their names for these parts."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple, cast

from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel


class Family(NamedTuple):
    """Names of classes of a family, and paths within its base model."""

    prefix: str  # of its class names
    layer: str = "DecoderLayer"
    tokens: str = "embed_tokens"
    layers: str = "layers"
    norm: str | None = "norm"
    rotary: str | None = "rotary_emb"
    positions: str | None = None  # learned positions
    token_types: str | None = None
    embedding_norm: str | None = None
    dropout: str | None = None  # of the embeddings
    pooler: str | None = None
    cache: str = "past_key_values"  # name of a layer's argument
    numbered: bool = True  # whether a layer is made with its number
    embeddings: str | None = None  # class of embeddings of another width, with positions and types, and a norm
    projection: str | None = None  # from that width to that of the layers
    lm_head: str | None = None  # class of the readout over tokens


GPT2 = Family(
    "GPT2", layer="Block", tokens="wte", layers="h", norm="ln_f", rotary=None, positions="wpe", dropout="drop"
)
GPT_NEOX = Family(
    "GPTNeoX",
    layer="Layer",
    tokens="embed_in",
    norm="final_layer_norm",
    dropout="emb_dropout",
    cache="layer_past",
)
BERT = Family(
    "Bert",
    layer="Layer",
    tokens="embeddings.word_embeddings",
    layers="encoder.layer",
    norm=None,
    rotary=None,
    positions="embeddings.position_embeddings",
    token_types="embeddings.token_type_embeddings",
    embedding_norm="embeddings.LayerNorm",
    dropout="embeddings.dropout",
    pooler="pooler",
)
ALBERT = BERT._replace(
    prefix="Albert",
    layers="encoder.albert_layer_groups.0.albert_layers",
    numbered=False,
    embeddings="Embeddings",
    projection="encoder.embedding_hidden_mapping_in",
    lm_head="MLMHead",
)
BACKBONES: dict[str, Family] = {
    "llama": Family("Llama"),
    "qwen2": Family("Qwen2"),
    "qwen3": Family("Qwen3"),
    "mistral": Family("Mistral"),
    "olmo2": Family("Olmo2"),
    "hrm_text": Family("HrmText"),
    "gemma2": Family("Gemma2"),
    "gemma3_text": Family("Gemma3"),
    "phi3": Family("Phi3"),
    "smollm3": Family("SmolLM3"),
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "bert": BERT,
    "roberta": BERT._replace(prefix="Roberta"),
    "albert": ALBERT,
}


def family_member(model_type: str, name: str) -> Any:
    """Return a class or function of a family in transformers."""
    return getattr(import_module(f"transformers.models.{model_type}.modeling_{model_type}"), name)


def base_class(backbone: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the family's model without a head."""
    return cast(type[PreTrainedModel], MODEL_MAPPING[type(backbone)])


def attention_of(config: Any, asked: str | None) -> str | None:
    """Return the attention implementation of the borrowed layers where the model is asked for `asked`.

    A retrofitted Gemma 2 caps its attention scores, which only its eager attention does.
    """
    capped = config.retrofitted_from is not None and not base_class(config.backbone_config)._supports_sdpa
    return "eager" if capped else asked


def initialize(backbone: PreTrainedConfig, module: nn.Module) -> None:
    """Initialise a module as its family does: some norms begin at zero, and GPT-2's projections smaller."""
    family = base_class(backbone)
    initializer = family.__new__(family)
    nn.Module.__init__(initializer)
    initializer.config = backbone
    initializer._init_weights(module)
