"""Sharing: a folder that loads anywhere with `trust_remote_code=True`, with a card of measured results.

The code and the complete auto_map go along with every `save_pretrained` and `push_to_hub` (see
FeedbackConfig.save_pretrained); `export` adds the processor and the card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import EvalResult
from transformers import PreTrainedModel

from .models.configuration_feedback import MODELING
from .models.modeling_feedback import FeedbackPreTrainedModel

TEMPLATE = Path(__file__).with_name("card_template.md")
PIPELINES = {
    "FeedbackForCausalLM": "text-generation",
    "FeedbackForMaskedLM": "fill-mask",
    "FeedbackForSequenceClassification": "text-classification",
    "FeedbackForTokenClassification": "token-classification",
    "FeedbackForQuestionAnswering": "question-answering",
    "FeedbackForConditionalGeneration": "text2text-generation",
    "FeedbackForImageClassification": "image-classification",
    "FeedbackForTimeSeriesPrediction": "time-series-forecasting",
}


def export(
    model: FeedbackPreTrainedModel,
    folder: str | Path,
    processor: Any = None,
    results: dict[str, float] | None = None,
    **card: Any,
) -> Path:
    """Writes weights, config, code, processor and README.md to `folder`; push it with `hf upload` or push_to_hub.

    Args:
        processor: a tokenizer, image or feature processor, saved beside the model.
        results: measured metrics by name, for the card.
        card: what `model_card` takes.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"export takes a feedback model, not a {type(model).__name__}: merge_and_unload() adapters first."
        )
    folder = Path(folder)
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    model_card(model, results or {}, **card).save(folder / "README.md")
    return folder


def model_card(
    model: FeedbackPreTrainedModel,
    results: dict[str, float],
    name: str = "feedback model",
    dataset: str = "unknown",
    license: str = "apache-2.0",
    description: str = "",
    command: str = "",
) -> ModelCard:
    """A card with the sizes of `model` and the measured `results` on `dataset`, which `command` reproduces."""
    config = model.config
    head = type(model).__name__
    task = PIPELINES.get(head, "feature-extraction")
    data = ModelCardData(
        library_name="transformers",
        license=license,
        pipeline_tag=task,
        tags=["feedback", "feedback_transformers", f"feedback-{config.feedback_axis}"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=task, dataset_type=dataset, dataset_name=dataset, metric_type=metric, metric_value=value
            )
            for metric, value in results.items()
        ]
        or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=name,
        description=description,
        head=head,
        auto=next(auto for auto, reference in MODELING.items() if reference.endswith(f".{head}")),
        parameters=f"{model.num_parameters():,}",
        config=config,
        results=results,
        dataset=dataset,
        command=command,
    )
