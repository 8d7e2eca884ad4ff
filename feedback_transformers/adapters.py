"""Tell PEFT what it knows of every model in transformers: which modules a method adapts, and how layers are numbered.

`register` fills in PEFT's tables of default target modules, so that `LoraConfig()` or `IA3Config()` without
`target_modules` adapts a feedback model. It also lets `prepare` see each adapter before PEFT builds it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import constants
from torch import nn
from transformers import logging

logger = logging.get_logger(__name__)

# Every linear projection that a cell, encoder, decoder or connection can have; PEFT takes those that a model has.
LINEAR = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),  # Llama-shaped layers, MLP
    *("c_attn", "c_proj", "c_fc"),  # GPT-2 layers
    *("qkv_proj", "gate_up_proj"),  # Phi-3
    *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX
    *("query", "key", "value", "ffn", "ffn_output"),  # BERT, ALBERT
    *("input_proj", "state_proj"),  # GRU and LSTM
    "out_proj",  # behind convolutions, cross-attention
    "signal_proj",  # connections
]
LORA_TARGETS = [*LINEAR, "conv"]
# IA3 scales what comes out of these, and what goes into those of FEEDFORWARD.
SCALED = ["k_proj", "v_proj", "c_attn", "qkv_proj", "query_key_value", "key", "value", "input_proj", "signal_proj"]
FEEDFORWARD = ["down_proj", "mlp.c_proj", "dense_4h_to_h", "output.dense", "out_proj"]
NORMS = [
    *("norm", "input_layernorm", "post_attention_layernorm"),  # our own, Llama
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),  # Gemma
    *("ln_1", "ln_2", "ln_f", "LayerNorm", "final_layer_norm"),  # GPT-2, BERT, GPT-NeoX
]
BIASED = [
    *("v_proj", "value", "c_attn", "qkv_proj", "query_key_value", "input_proj", "down_proj", "out_proj"),
    "signal_proj",
]
# The methods of which the default targets are not LINEAR, by the names of PEFT's tables.
TARGETS = {
    "LORA_TARGET_MODULES": LORA_TARGETS,
    "LOHA_TARGET_MODULES": LORA_TARGETS,
    "LOKR_TARGET_MODULES": LORA_TARGETS,
    "IA3_TARGET_MODULES": [*SCALED, *FEEDFORWARD],
    "IA3_FEEDFORWARD_MODULES": FEEDFORWARD,
    "BEFT_TARGET_MODULES": BIASED,
    "LNTUNING_TARGET_MODULES": NORMS,
}
TABLE = re.compile(r"TRANSFORMERS_MODELS_TO_(\w+_MODULES)_MAPPING")


# Methods, and ways to begin LoRA, that add to a matrix what does not vanish with it, so that they can leave zero.
ADDING = {
    *("ADALORA", "C3A", "DEFT", "FOURIERFT", "GLORA", "GRALORA", "LILY", "LOHA", "LOKR", "MISS", "OSF"),
    *("PVERA", "RANDLORA", "SHIRA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
}
LORA_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal", "olora")
PART_LAYER = re.compile(r"(?:^|.*\.)(encoder|loop\.cell|decoder)\.layers\.(\d+)\.")


def register() -> None:
    """Enter feedback models in every table of default modules of the installed PEFT, and see adapters before it.

    PEFT asks a model nothing before it adapts it, so its base class of all methods is wrapped; other models are left
    alone. A second call changes nothing.
    """
    for name, table in vars(constants).items():
        if found := TABLE.fullmatch(name):
            table["feedback"] = TARGETS.get(found[1], LINEAR)
    if not hasattr(BaseTuner.__init__, "__wrapped__"):
        setattr(BaseTuner, "__init__", first_prepared(BaseTuner.__init__))  # noqa: B010  (mypy)
        setattr(BaseTuner, "inject_adapter", next_prepared(BaseTuner.inject_adapter))  # noqa: B010


def first_prepared(init: Callable) -> Callable:
    """Return `BaseTuner.__init__`, which makes a model's first adapter, with `prepare` before it."""

    @wraps(init)
    def prepared(tuner: Any, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
        prepare(type(tuner), model, config)
        init(tuner, model, peft_config, adapter_name, *args, **kwargs)

    return prepared


def next_prepared(inject: Callable) -> Callable:
    """Return `BaseTuner.inject_adapter`, which makes every further adapter, with `prepare` before it."""

    @wraps(inject)
    def prepared(tuner: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        prepare(type(tuner), model, tuner.peft_config[adapter_name])
        inject(tuner, model, adapter_name, *args, **kwargs)

    return prepared


def prepare(tuner: type[BaseTuner], model: nn.Module, config: Any) -> None:
    """Make a new adapter's config mean what its user expects of a feedback model; leave a saved one as it is.

    Raises:
        ValueError: `layers_to_transform` names a layer that the model lacks, or activated LoRA is asked of a model
            that goes position by position.
    """
    if getattr(getattr(model, "config", None), "model_type", None) != "feedback" or config.inference_mode:
        return
    check_activated(model, config)
    number_layers(tuner, model, config)
    train_closed_connection(tuner, model, config)


def check_activated(model: nn.Module, config: Any) -> None:
    """Reject activated LoRA where the loop goes position by position.

    It switches itself on by counting positions from the end of what a layer is given, a single position.
    """
    loop: Any = model.config  # type: ignore[assignment]
    if getattr(config, "alora_invocation_tokens", None) and loop.feedback_axis == "time" and not loop.in_passes:
        raise ValueError(
            "Activated LoRA can't tell where it begins in a model that goes position by position: leave "
            "alora_invocation_tokens out, or make the model with solver='jacobi' or feedback_axis='depth'."
        )


def number_layers(tuner: type[BaseTuner], model: nn.Module, config: Any) -> None:
    """Count the layers of `layers_to_transform` through encoder, loop and decoder, as a retrofitted original does.

    PEFT reads a layer's number from its name, and in the names each of the three parts counts from 0. So the config
    gets the names of the modules that are meant, instead of the numbers. A `layers_pattern` of more than the word
    `layers`, such as `loop.cell.layers`, names the part, and is left to PEFT.
    """
    asked, pattern = getattr(config, "layers_to_transform", None), getattr(config, "layers_pattern", None)
    if asked is None or asked == [] or (pattern and pattern not in ("layers", ["layers"])):
        return
    wanted = {asked} if isinstance(asked, int) else set(asked)
    loop: Any = model.config
    first = {"encoder": 0, "loop.cell": loop.num_encoder_layers}
    first["decoder"] = first["loop.cell"] + loop.num_feedback_layers
    numbers = {}
    for name, _ in model.named_modules():
        if found := PART_LAYER.match(name):
            numbers[name] = first[found[1]] + int(found[2])
    if missing := sorted(wanted - set(numbers.values())):
        raise ValueError(
            f"layers_to_transform names {missing}, but this model has the layers 0 to {max(numbers.values())}, "
            "counted through encoder, loop and decoder."
        )
    config.layers_to_transform = config.layers_pattern = None
    target = with_targets(tuner, config)
    config.target_modules = {
        name for name, number in numbers.items() if number in wanted and check_target_module_exists(target, name)
    }


def train_closed_connection(tuner: type[BaseTuner], model: nn.Module, config: Any) -> None:
    """Have PEFT train the connection of a fresh retrofit whole, where the method can't open it.

    The connection is closed by matrices of zeros. What scales or rotates them leaves them at zero, and DoRA divides by
    their norm. PEFT saves the connection with the adapter then, as it does all of `modules_to_save`. Its parts are
    named one by one, as most methods can merge nothing that has no weight of its own.
    """
    if adds_to_weights(config) or not hasattr(config, "modules_to_save"):
        return
    closed = [
        f"{name}.{child}"
        for name, part in model.named_modules()
        if hasattr(part, "is_closed") and part.is_closed()
        for child, _ in part.named_children()
    ]
    target = with_targets(tuner, config)
    if target.target_modules == constants.INCLUDE_LINEAR_LAYERS_SHORTHAND:
        target.target_modules = closed
    if any(check_target_module_exists(target, name) for name in closed):
        names = [name[name.index("connection.") :] for name in closed]
        config.modules_to_save = [*(config.modules_to_save or []), *names]
        logger.warning_once(
            "This method of PEFT can't open the feedback of a fresh retrofit, whose connection is zero, so the "
            "connection is trained whole beside it, as with modules_to_save=['connection']."
        )


def with_targets(tuner: type[BaseTuner], config: Any) -> Any:
    """Return a copy of the config with the default targets where it names none."""
    filled = copy.copy(config)
    if getattr(config, "target_modules", None) is None:
        defaults = getattr(tuner, "target_module_mapping", constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING)
        filled.target_modules = defaults.get("feedback", [])
    return filled


def adds_to_weights(config: Any) -> bool:
    """Whether a method can leave a matrix of zeros."""
    if config.peft_type == PeftType.LORA:
        return not config.use_dora and config.init_lora_weights in LORA_BEGINNINGS
    return config.peft_type.value in ADDING
