"""The input that a pretrained encoder of transformers makes: of text, images, sound, or whatever it reads.

Shapes: B batch, S positions of the encoder, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig
from typing_extensions import Self

from .feedback_inputs import Embedded, Fields, Input

WITH_MASK = ("input_ids", "input_values", "input_features")  # inputs that go with an attention_mask


@dataclass(kw_only=True)
class PretrainedFields(Fields):
    """Fields of an input that a model of transformers makes.

    Args:
        encoder: the config of a model that AutoModel knows, as a dictionary, a config, or the name of its checkpoint.
            Its weights are loaded by `PretrainedInput.load_weights`.
        trained: whether the encoder learns; without, it makes no gradient and drops nothing out.
    """

    type: str = "pretrained"
    encoder: Any = None
    trained: bool = False

    def check(self) -> None:
        if isinstance(self.encoder, str):
            self.encoder = AutoConfig.from_pretrained(self.encoder)
        if isinstance(self.encoder, PreTrainedConfig):
            self.encoder = json.loads(self.encoder.to_json_string(use_diff=False))
        if not isinstance(self.encoder, dict) or "model_type" not in self.encoder:
            raise ValueError(
                "encoder of an input of pretrained is the name of a checkpoint, or the config of one of transformers."
            )
        built = self.built()
        if not hasattr(built, "hidden_size") or built.is_encoder_decoder or type(built) not in MODEL_MAPPING:
            raise ValueError(
                f"A {built.model_type} is no encoder with one hidden_size: give the config of another one, such as "
                "its vision or text part."
            )

    def built(self) -> PreTrainedConfig:
        """Return the encoder's config. Raises ValueError for types that AutoModel does not know."""
        values = {name: value for name, value in self.encoder.items() if name not in ("model_type", "dtype")}
        return AutoConfig.for_model(self.encoder["model_type"], **values)


def without_pooler(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return the model that `make` makes, without a pooler, whose weights would wait for a gradient in vain."""
    try:
        return make(*args, add_pooling_layer=False, **options)
    except TypeError:  # it has none
        return make(*args, **options)


class PretrainedInput(Input):
    """Map what an encoder reads to its last hidden states, projected to [B, S, D]."""

    Fields = PretrainedFields
    layer = "projection"
    axes = 0  # its states have no grid of ours

    @classmethod
    def takes_of(cls, fields: PretrainedFields) -> tuple[str, ...]:
        model: Any = MODEL_MAPPING[type(fields.built())]
        first = model.main_input_name
        return (first, "attention_mask") if first in WITH_MASK else (first,)

    def __init__(self, config: Any, fields: PretrainedFields) -> None:
        super().__init__(config, fields)
        encoder = fields.built()
        self.encoder = without_pooler(AutoModel.from_config, encoder)
        self.projection = nn.Linear(encoder.hidden_size, config.hidden_size)
        self.train(False)

    def load_weights(self, name: Any, **options: Any) -> None:
        """Load the weights of the encoder from a checkpoint, a folder or a name on the Hub."""
        loaded = without_pooler(AutoModel.from_pretrained, name, **options)
        self.encoder.load_state_dict(loaded.state_dict())

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.encoder.requires_grad_(self.fields.trained)  # loading makes new parameters, which would learn
        if not self.fields.trained:
            self.encoder.eval()
        return self

    def forward(self, *, attention_mask: Tensor | None = None, **raw: Tensor) -> Embedded:
        """Encode raw data; attention_mask [B, S] tells the real ones, or those of the samples of a sound."""
        if attention_mask is not None and "attention_mask" in self.takes:
            raw["attention_mask"] = attention_mask
        kind = self.encoder.dtype
        raw = {name: x.to(kind) if x.is_floating_point() else x for name, x in raw.items()}
        with nullcontext() if self.fields.trained else torch.no_grad():
            states = self.encoder(**raw).last_hidden_state
        mask = attention_mask
        if mask is not None and mask.shape[1] != states.shape[1]:
            mask = self.shortened(mask, states.shape[1])
        return Embedded(self.projection(states.to(self.projection.weight.dtype)), mask)

    def shortened(self, mask: Tensor, length: int) -> Tensor | None:
        """Return which of `length` states are real, of a mask of the samples that they were made of."""
        encoder: Any = self.encoder
        if hasattr(encoder, "_get_feature_vector_attention_mask"):
            return encoder._get_feature_vector_attention_mask(length, mask).bool()
        share = torch.arange(1, length + 1, device=mask.device) / length
        return share <= mask.float().mean(1, keepdim=True) + 0.5 / length
