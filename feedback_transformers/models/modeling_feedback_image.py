"""Image heads. Shapes: B batch, C channels, H height, W width, T patches, D hidden size, L labels."""

from __future__ import annotations

from torch import Tensor

from .feedback_arguments import named_arguments
from .feedback_states import FeedbackState
from .modeling_feedback_heads import FeedbackClassifier, FeedbackOutput


class FeedbackForImageClassification(FeedbackClassifier):
    """Classify images; every feedback step is another look at the image."""

    main_input_name = "pixel_values"
    embedding_type = "patches"

    @named_arguments
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        num_feedback_steps: int | None = None,
        output_hidden_states: bool | None = None,
        output_feedback_states: bool | None = None,
        feedback_state: FeedbackState | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> FeedbackOutput:
        """Return logits [B, L] of pixel_values [B, C, H, W], and the loss over labels, [B] classes or [B, L] numbers.

        The other arguments are those of FeedbackModel; Trainer gives `num_items_in_batch`, the number of labels in a
        batch that may come in parts.
        """
        self.set_problem_type(labels, pixel_values)
        outputs = self.run(
            labels is not None,
            pixel_values=pixel_values,
            num_feedback_steps=num_feedback_steps,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_feedback_states=output_feedback_states,
            feedback_state=feedback_state,
        )
        return self.classify(outputs, labels, None, num_items_in_batch)

    def step_logit(self, y: Tensor, outputs: FeedbackOutput) -> Tensor:
        return self.pooled_logits(y, None)
