"""Image heads. Shapes: B batch, C channels, H height, W width, T patches, D hidden size, L labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.utils import can_return_tuple

from .modeling_feedback_heads import FeedbackClassifier, FeedbackOutput


class FeedbackForImageClassification(FeedbackClassifier):
    """A class for an image; every feedback step is another look at it."""

    main_input_name = "pixel_values"
    embedding_type = "patches"

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> FeedbackOutput:
        """pixel_values [B, C, H, W], labels [B]; logits [B, L]."""
        self.set_problem_type(labels)
        outputs = self.run(labels is not None, **{**kwargs, "pixel_values": pixel_values, "use_cache": False})
        return self.classify(outputs, labels, None, kwargs.get("num_items_in_batch"))

    def step_logits(self, outputs: FeedbackOutput) -> list[Tensor]:
        """The logits [B, L] after each feedback step, of outputs with feedback_states."""
        return [self.classifier(self.pool(y, None)) for y in outputs.feedback_states]
