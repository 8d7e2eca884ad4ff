"""The config of the borrowed transformer layers, or of a retrofitted original, made of FeedbackConfig's fields."""

from __future__ import annotations

import copy
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .feedback_names import NOT_OF_LAYERS, RETROFIT_TYPES, model_type_of, shared_names
from .feedback_rules import check_sizes


def with_window(model_type: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with a sliding window switched on for all layers, which Qwen asks for twice."""
    told = values.get("layer_types") or "use_sliding_window" in values
    if not values.get("sliding_window") or told or model_type not in CONFIG_MAPPING:
        return values
    if not hasattr(CONFIG_MAPPING[model_type], "use_sliding_window"):
        return values
    return {**values, "use_sliding_window": True, "max_window_layers": 0, "layer_types": None}


def make_backbone(model_type: str, values: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of a family with these fields; raise ValueError where rotary parameters are missing."""
    values = with_window(model_type, values)
    try:
        backbone = AutoConfig.for_model(model_type, **values)
    except KeyError as error:  # from the parameters of rotary positions
        raise ValueError(f"backbone_config can't be a {model_type}: {error.args[0]}.") from error
    if "sliding_attention" in (values.get("layer_types") or ()):
        backbone.sliding_window = values.get("sliding_window")  # Qwen drops it where use_sliding_window is False
    return backbone


def eps_of(backbone: PreTrainedConfig) -> float:
    """Return the epsilon of a family's norms, which each calls differently."""
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    return next(value for name in names if (value := getattr(backbone, name, None)) is not None)


def layers_config(config: Any, given: str | dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """Return the config of the borrowed layers; sizes in `given` are copied here, all others come from here."""
    if given is None or isinstance(given, str):
        given = {"model_type": "llama" if given is None else given}
    elif isinstance(given, PreTrainedConfig):
        given = given.to_dict()
    model_type, given = model_type_of(given), copy.deepcopy(given)
    aliases = type(AutoConfig.for_model(model_type)).attribute_map  # hidden_size: n_embd
    theirs_to_ours = {aliases.get(theirs, theirs): ours for ours, theirs in shared_names(model_type).items()}
    named = {aliases.get(name, name): value for name, value in given.items() if name not in NOT_OF_LAYERS}
    for theirs, ours in theirs_to_ours.items():
        if named.get(theirs) is not None:
            setattr(config, ours, named[theirs])
    if config.intermediate_size is None:
        config.intermediate_size = 4 * config.hidden_size
    if config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_attention_heads
    check_sizes(config, model_type)
    own = {theirs: getattr(config, ours) for theirs, ours in theirs_to_ours.items()}
    if model_type == "gpt2":
        own.update(attn_pdrop=config.dropout, resid_pdrop=config.dropout)
    elif model_type == "albert":
        own.update(attention_probs_dropout_prob=config.dropout, hidden_dropout_prob=config.dropout)
        own.update(embedding_size=config.hidden_size, vocab_size=config.vocab_size)
    else:  # Qwen3's default head_dim is 128 for any hidden size
        own.update(attention_dropout=config.dropout, head_dim=config.hidden_size // config.num_attention_heads)
    layers = max(1, config.num_encoder_layers, config.num_feedback_layers, config.num_decoder_layers)
    own["n_layer" if model_type == "gpt2" else "num_hidden_layers"] = layers
    if model_type == "hrm_text":
        own["num_layers_per_stack"] = layers  # else it takes the number for a sum over all passes
    kinds = given.get("layer_types")
    if kinds and len(set(kinds)) == 1:
        own["layer_types"] = [kinds[0]] * layers
    backbone = make_backbone(model_type, {**own, **named, "pad_token_id": None})
    if len(set(getattr(backbone, "layer_types", None) or [])) > 1:
        raise ValueError(f"All layers must be of one type, and this {model_type} has {backbone.layer_types}.")
    return backbone


def original_config(config: Any, given: dict | PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the original of a retrofitted model, and copy its sizes here."""
    given = given.to_dict() if isinstance(given, PreTrainedConfig) else given
    model_type = model_type_of(given, RETROFIT_TYPES)
    backbone = make_backbone(model_type, {k: v for k, v in given.items() if k != "model_type"})
    for ours, theirs in shared_names(model_type).items():
        if getattr(backbone, theirs) is not None:
            setattr(config, ours, getattr(backbone, theirs))
    if config.intermediate_size is None:  # as GPT-2 leaves it
        config.intermediate_size = 4 * config.hidden_size
    if config.num_key_value_heads is None:
        config.num_key_value_heads = config.num_attention_heads
    return backbone
