"""Feedback neural networks as ordinary Hugging Face models: h_t = f(c(e_t, φ(y_{t-1})), h_{t-1}), y_t = g(h_t)."""

from importlib.util import find_spec

import transformers

from . import quiet  # noqa: F401 - before transformers, which imports torchao
from .models.configuration_feedback import MODELING, PRESETS, FeedbackConfig
from .models.feedback_cache import FeedbackCache
from .models.modeling_feedback import FeedbackModel, FeedbackPreTrainedModel
from .models.modeling_feedback_image import FeedbackForImageClassification
from .models.modeling_feedback_seq2seq import FeedbackForConditionalGeneration
from .models.modeling_feedback_series import FeedbackForTimeSeriesPrediction
from .models.modeling_feedback_text import (
    FeedbackForCausalLM,
    FeedbackForMaskedLM,
    FeedbackForQuestionAnswering,
    FeedbackForSequenceClassification,
    FeedbackForTokenClassification,
)
from .retrofit import retrofit, unretrofit

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "FeedbackCache",
    "FeedbackConfig",
    "FeedbackForCausalLM",
    "FeedbackForConditionalGeneration",
    "FeedbackForImageClassification",
    "FeedbackForMaskedLM",
    "FeedbackForQuestionAnswering",
    "FeedbackForSequenceClassification",
    "FeedbackForTimeSeriesPrediction",
    "FeedbackForTokenClassification",
    "FeedbackModel",
    "FeedbackPreTrainedModel",
    "retrofit",
    "unretrofit",
]

# Every projection that a cell, encoder, decoder or connection can have; PEFT takes those that a model does have.
LORA_TARGETS = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),  # Llama-shaped layers, MLP
    *("c_attn", "c_proj", "c_fc"),  # GPT-2 layers
    *("qkv_proj", "gate_up_proj"),  # Phi-3
    *("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),  # GPT-NeoX
    *("query", "key", "value"),  # BERT
    *("input_proj", "state_proj"),  # GRU and LSTM
    *("conv", "out_proj"),  # convolutions, cross-attention
    "signal_proj",  # connections
]


def _register() -> None:
    """Tells the Auto classes, and PEFT where it is installed, of this model type; harmless when repeated."""
    transformers.AutoConfig.register("feedback", FeedbackConfig, exist_ok=True)
    for auto, reference in MODELING.items():
        model = globals()[reference.split(".")[1]]
        getattr(transformers, auto).register(FeedbackConfig, model, exist_ok=True)
    if find_spec("peft") is not None:
        from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["feedback"] = LORA_TARGETS


_register()
