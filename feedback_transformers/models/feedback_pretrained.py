"""FeedbackPreTrainedModel: what all models share of initial weights and switches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from .configuration_feedback import FeedbackConfig
from .feedback_backbones import attention_of, initialize
from .feedback_checkpoints import CheckpointMixin


class FeedbackPreTrainedModel(CheckpointMixin, PreTrainedModel):
    """Base of all models here: initial weights, checkpointing and attention switches."""

    config: FeedbackConfig
    config_class = FeedbackConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FeedbackLoop"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _is_stateful = True  # no feedback state can be taken back; set here, as transformers' own False hides a mixin's
    sharing: Any = None  # what goes along in a push: see feedback_transformers.hub.describe
    more_arguments: ClassVar[tuple[str, ...]] = ()  # what `forward(**kwargs)` takes beyond its signature
    unread: ClassVar[dict[str, str]] = {}  # arguments of other models that this one rejects, and what to do instead

    def __init__(self, config: FeedbackConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if self.can_generate():  # else transformers drops num_feedback_steps when it loads the generation config
            self.generation_config._from_model_config = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether passes are recomputed in the backward. PEFT still asks by this name, which transformers warns of."""
        return self.is_activation_checkpointing

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # the borrowed layers ask the interface of their config, which is a sub-config of ours

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Set the attention implementation as in transformers, also for the borrowed layers.

        Raises ValueError for an implementation that the borrowed family does not support.
        """
        asked: Any = attn_implementation
        if isinstance(asked, dict):
            asked = asked.get("backbone_config", asked.get("", self.config._attn_implementation))
        chosen = self._check_and_adjust_attn_implementation(asked, allow_all_kernels=allow_all_kernels)
        backbone = self.config.backbone_config
        if chosen != attention_of(self.config, chosen):
            raise ValueError(f"{backbone.model_type} layers support attn_implementation='eager' only: use that.")
        backbone._attn_implementation_internal = chosen  # before transformers does so, with a warning
        super().set_attn_implementation(attn_implementation, allow_all_kernels)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return self, as models without an encoder-decoder do, whatever layers run before the loop.

        PEFT and generation take a model for an encoder-decoder if this is another module.
        """
        return self

    def get_decoder(self) -> nn.Module:
        """Return the model below the head, as transformers means it; the decoder g is `model.decoder`."""
        return self.base_model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the embeddings of tokens, as in transformers; reject a model that has none."""
        if self.base_model.embeddings.takes[0] != "input_ids":
            raise ValueError(f"A model of {self.config.input_type} has no vocabulary that could be resized.")
        return super().resize_token_embeddings(*args, **kwargs)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialize a module, also one without weights of its own: GPT-2's attention initializes its projections.

        transformers passes over those in code outside of it.
        """
        own = next(module.parameters(recurse=False), None) is not None
        super()._initialize_weights(module, is_custom_code and own)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if type(module).__module__.startswith("transformers.models."):
            initialize(self.config.backbone_config, module)
        else:
            super()._init_weights(module)
        if isinstance(module, Conv1D):  # of GPT-2 layers, which the default leaves out
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif hasattr(module, "init_parameters"):  # our modules with parameters of their own
            module.init_parameters()

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """Switch checkpointing of layers and of the loop, which checkpoints whole passes or runs of positions.

        Layers inside the loop are not checkpointed once more: they would drop the cache that the loop keeps there.
        """
        checkpoint = kwargs.get("gradient_checkpointing_func")
        if enable and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError("A feedback loop can't be checkpointed with use_reentrant=True: set it to False.")
        super()._set_gradient_checkpointing(enable, **kwargs)
        model: Any = self.base_model
        parts = [model.loop.cell]
        if self.config.feedback_axis == "time" and self.config.feedback_signal == "output":  # decodes in the loop
            parts.append(model.encoder if model.decoder is None else model.decoder)
        for layer in (layer for part in parts for layer in part.modules()):
            if isinstance(layer, GradientCheckpointingLayer):
                layer.gradient_checkpointing = False
