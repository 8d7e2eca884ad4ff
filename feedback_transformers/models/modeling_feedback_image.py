"""Heads of images and of videos.

Shapes: B batch, C channels, F frames, H height, W width, T positions, D hidden size, L labels.
"""

from __future__ import annotations

from torch import Tensor

from .feedback_calls import named_arguments
from .feedback_states import FeedbackState
from .modeling_feedback_heads import FeedbackClassifier, FeedbackOutput


class FeedbackForImageClassification(FeedbackClassifier):
    """Classify images, or predict numbers of them; every feedback step is another look at the image."""

    main_input_name = reads = "pixel_values"
    axes = 2

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
        pixel_mask: Tensor | None = None,
    ) -> FeedbackOutput:
        """Return logits [B, L] of pixel_values [B, C, H, W], and the loss over labels, [B] classes or [B, L] numbers.

        Args:
            pixel_mask: [B, H, W], 1 for real pixels, where images of several sizes are padded to one.
            num_items_in_batch: the number of labels in a batch that may come in parts, which Trainer gives.
        """
        self.set_problem_type(labels, pixel_values)
        outputs = self.run(
            labels is not None,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            num_feedback_steps=num_feedback_steps,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_feedback_states=output_feedback_states,
            feedback_state=feedback_state,
        )
        return self.classify(outputs, labels, outputs.positions_mask, num_items_in_batch)


class FeedbackForVideoClassification(FeedbackForImageClassification):
    """Classify videos, pixel_values [B, F, C, H, W] with a pixel_mask [B, F, H, W].

    In depth all frames are looked at together, several times. Along time a model reads frame by frame, and a call goes
    on from the `feedback_state` of the frames before, with `positions="none"` in `input_config`.
    """

    axes = 3
