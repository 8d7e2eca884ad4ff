"""Tell the Auto classes of published model types that transformers does not know, which load as ours."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedConfig

from .models.modeling_feedback import FeedbackModel, FeedbackPreTrainedModel
from .models.modeling_feedback_text import (
    FeedbackForCausalLM,
    FeedbackForSequenceClassification,
    FeedbackForTokenClassification,
)

TYPES = ("ouro", "nanbeige", "huginn_raven")
HEADS = {
    "AutoModel": FeedbackModel,
    "AutoModelForCausalLM": FeedbackForCausalLM,
    "AutoModelForSequenceClassification": FeedbackForSequenceClassification,
    "AutoModelForTokenClassification": FeedbackForTokenClassification,
}


def convert_checkpoint(cls: Any, name: Any, **options: Any) -> Any:
    """Return a published checkpoint as a model of ours, or None where it is of another kind."""
    from .conversion.convert import convert_checkpoint

    return convert_checkpoint(cls, name, **options)


def register() -> None:
    """Register the types; a second call changes nothing. A type that transformers knows by then is left to it."""
    if convert_checkpoint not in FeedbackPreTrainedModel.converters:
        FeedbackPreTrainedModel.converters.append(convert_checkpoint)
    for model_type in TYPES:
        if model_type in transformers.CONFIG_MAPPING:
            continue
        name = f"{model_type.title().replace('_', '')}Config"
        config = type(name, (PreTrainedConfig,), {"model_type": model_type})
        transformers.AutoConfig.register(model_type, config)
        for auto, head in HEADS.items():
            getattr(transformers, auto).register(config, loader(config, head))


def loader(config: type, head: Any) -> type:
    """Return a class that an Auto class takes for the model of this config, and whose models are of class `head`."""

    def from_pretrained(cls: Any, name: Any, *args: Any, config: Any = None, **options: Any) -> Any:
        return head.from_pretrained(name, *args, config=config, **options)

    return type(head.__name__, (), {"config_class": config, "from_pretrained": classmethod(from_pretrained)})
