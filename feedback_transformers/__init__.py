"""Feedback neural networks as ordinary Hugging Face models: h_t = f(c(e_t, φ(y_{t-1})), h_{t-1}), y_t = g(h_t)."""

from importlib.util import find_spec

import transformers

from . import quiet  # noqa: F401 - before transformers, which imports torchao
from .models.configuration_feedback import MODELING, PRESETS, FeedbackConfig
from .models.feedback_cache import FeedbackCache
from .models.feedback_registry import register
from .models.feedback_states import FeedbackState
from .models.modeling_feedback import FeedbackModel, FeedbackPreTrainedModel
from .models.modeling_feedback_dense import FeedbackForImageToImage, FeedbackForObjectDetection
from .models.modeling_feedback_image import FeedbackForImageClassification, FeedbackForVideoClassification
from .models.modeling_feedback_seq2seq import FeedbackForConditionalGeneration
from .models.modeling_feedback_series import FeedbackForTimeSeriesPrediction
from .models.modeling_feedback_text import (
    FeedbackForCausalLM,
    FeedbackForMaskedLM,
    FeedbackForQuestionAnswering,
    FeedbackForSequenceClassification,
    FeedbackForTokenClassification,
)
from .published import register as register_published
from .retrofit import retrofit, unretrofit

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "FeedbackCache",
    "FeedbackConfig",
    "FeedbackForCausalLM",
    "FeedbackForConditionalGeneration",
    "FeedbackForImageClassification",
    "FeedbackForImageToImage",
    "FeedbackForMaskedLM",
    "FeedbackForObjectDetection",
    "FeedbackForQuestionAnswering",
    "FeedbackForSequenceClassification",
    "FeedbackForTimeSeriesPrediction",
    "FeedbackForTokenClassification",
    "FeedbackForVideoClassification",
    "FeedbackModel",
    "FeedbackPreTrainedModel",
    "FeedbackState",
    "register",
    "retrofit",
    "unretrofit",
]


def _complete_push(model: FeedbackPreTrainedModel, folder: str, repository: str) -> None:
    from . import hub  # which is heavier than the rest, and of use in an upload only

    hub.complete_push(model, folder, repository)


def _register() -> None:
    """Tell the Auto classes, and PEFT where it is installed, of this model type; a second call changes nothing."""
    transformers.AutoConfig.register("feedback", FeedbackConfig, exist_ok=True)
    for auto, reference in MODELING.items():
        model = globals()[reference.split(".")[1]]
        getattr(transformers, auto).register(FeedbackConfig, model, exist_ok=True)
    if _complete_push not in FeedbackPreTrainedModel.before_upload:
        FeedbackPreTrainedModel.before_upload.append(_complete_push)
    register_published()
    if find_spec("peft") is not None:
        from .adapters import register

        register()


_register()
