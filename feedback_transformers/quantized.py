"""Retrofits of quantized models: what transformers, torchao and bitsandbytes keep beside the weights goes along."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

# What transformers leaves on a model that it loaded quantized. `is_quantized` is left out: with it Trainer refuses
# models without adapters, but the connection is not quantized, and adapters on int4, which learn here.
QUANTIZED = ("hf_quantizer", "quantization_method", "is_loaded_in_8bit", "is_loaded_in_4bit")


def beside_weights(module: nn.Module) -> list[Any]:
    """What layers of bitsandbytes keep beside their weights, made such that two modules can share it."""
    beside: list[Any] = []
    for part in cast(Any, module.modules()):
        if hasattr(part, "init_8bit_state"):
            if part.weight.CB is not None:
                part.init_8bit_state()  # which the first of the two would else take away from the other
            beside += [part.state.CB, part.state.SCB]
        elif hasattr(part, "support_avx512bf16_for_cpu"):
            if getattr(part.weight.quant_state, "packing_format_for_cpu", False):
                raise ValueError("An evaluation packed these 4-bit weights, so adapters can't learn: load them again.")
            part.support_avx512bf16_for_cpu = False  # or one would
            beside.append(part.quant_state)
    return beside


def keep_quantized(made: PreTrainedModel, like: PreTrainedModel) -> None:
    """Makes what transformers and PEFT know of `like`, a quantized model, known of `made`, to save and adapt it."""
    if not hasattr(like, "hf_quantizer") and any(type(p).__module__.startswith("torchao.") for p in like.parameters()):
        cast(Any, made).hf_quantizer = InMemory(QuantizationConfigMixin(QuantizationMethod.TORCHAO))
    for name in QUANTIZED:
        if hasattr(like, name):
            setattr(made, name, getattr(like, name))
    if hasattr(like.config, "quantization_config"):
        config = copy.deepcopy(like.config.quantization_config)
        linear = {name: part for name, part in made.named_modules() if isinstance(part, nn.Linear)}
        whole = [name for name, part in linear.items() if type(part.weight) is nn.Parameter]
        of_bitsandbytes = hasattr(config, "llm_int8_skip_modules")
        setattr(config, "llm_int8_skip_modules" if of_bitsandbytes else "modules_to_not_convert", whole)
        made.config.quantization_config = config


class InMemory(HfQuantizer):
    """Of a model that torchao quantized, not transformers, which would fail to save it without saying why."""

    is_trainable = True

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, Any]]:
        if not model._hf_peft_config_loaded:
            raise ValueError(
                "A model that was quantized in memory can't be saved whole: save its adapters, or let transformers "
                "quantize the original, with from_pretrained(..., quantization_config=...), and retrofit that."
            )
        return None, {}
