"""Time-series heads. Shapes: B batch, T past steps, F future steps, C channels, D hidden size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_feedback import FeedbackConfig
from .modeling_feedback_heads import FeedbackHead


@dataclass
class FeedbackTimeSeriesOutput(ModelOutput):
    """loss [] where the future was given; prediction_outputs [B, F] or [B, F, C], in the units of past_values; and the
    passes that each of them took, num_feedback_steps [B, F], where halting may stop them."""

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None
    num_feedback_steps: Tensor | None = None


class FeedbackForTimeSeriesPrediction(FeedbackHead):
    """Forecasts one step, feeds the forecast back as the next input, and so on for `prediction_length` steps.

    A window is read relative to the mean and standard deviation of its own past, in float32 at least, and each step
    predicts the change to the next one. A past that never changes has no such scale: its forecast is that it stays,
    and the loss leaves it out. Trained on the true past of every step (teacher forcing); evaluation rolls out. With
    Trainer, set `label_names=["future_values"]` in TrainingArguments to have a loss in evaluation.
    """

    main_input_name = "past_values"
    accepts_loss_kwargs = False
    learns_to_halt = False
    embedding_type = "values"
    needs = {"is_causal": True, "halting_measure": "state"}  # which compares classes, and a series has none

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        self.readout = nn.Linear(config.hidden_size, config.num_channels)
        self.feedback = self.feedback_projection(config.num_channels)
        self.post_init()

    def embed_output(self, y: Tensor) -> Tensor:
        return self.feedback(self.readout(y))

    @can_return_tuple
    def forward(
        self,
        past_values: Tensor | None = None,
        future_values: Tensor | None = None,
        num_feedback_steps: int | None = None,
        prediction_length: int | None = None,
        **kwargs: Any,
    ) -> FeedbackTimeSeriesOutput:
        """past_values [B, T] or [B, T, C], future_values [B, F] or [B, F, C]; the loss is the mean absolute error in
        standard deviations. In training, with future_values given, no forecast is rolled out."""
        if past_values is None or past_values.ndim not in (2, 3) or past_values.shape[1] < 2:
            raise ValueError("past_values needs at least two time steps, [batch, steps] or [batch, steps, channels].")
        for name, values in (("past_values", past_values), ("future_values", future_values)):
            here = values is not None and values.device.type == "cpu" and not torch.compiler.is_compiling()
            if here and not values.isfinite().all():
                raise ValueError(f"{name} holds nan or infinite numbers: fill the gaps first.")
        if kwargs.get("attention_mask") is not None:
            raise ValueError("Series have no attention_mask: give windows of one length, with their gaps filled.")
        length = self.config.prediction_length if prediction_length is None else prediction_length
        past = self.channels(past_values)
        if future_values is not None:
            future, length = self.channels(future_values), future_values.shape[1]
            if future.shape[0] != past.shape[0] or future.shape[2] != past.shape[2]:
                raise ValueError(
                    f"future_values have the shape {[*future_values.shape]} and past_values {[*past_values.shape]}: "
                    "give each row and channel its own future."
                )
        if length < 1:
            raise ValueError(f"{length} steps are asked for: give a prediction_length, or a future, of at least 1.")
        mean, std = past.mean(dim=1, keepdim=True), past.std(dim=1, keepdim=True)
        flat = std <= 1e-6 * past.abs().amax(dim=1, keepdim=True)  # [B, 1, C] no change beyond rounding
        scale = std + 1e-5
        past, loss = ((past - mean) / scale).masked_fill(flat, 0.0), None
        if future_values is not None:
            series = torch.cat([past, ((future - mean) / scale).masked_fill(flat, 0.0)], dim=1)
            outputs = self.run(
                True, past_values=series[:, :-1], num_feedback_steps=num_feedback_steps, use_cache=False
            )

            def step_loss(y: Tensor) -> Tensor:
                errors = (series[:, :-1] + self.readout(y) - series[:, 1:]).abs().masked_fill(flat, 0.0)
                return errors.mean(dim=1).sum() / (~flat).sum().clamp(min=1)

            loss = self.mean_loss(step_loss, outputs)
        prediction = steps = None
        if future_values is None or not self.training:
            prediction, steps = self.forecast(past, length, num_feedback_steps)
            prediction = prediction * scale.masked_fill(flat, 0.0) + mean
            prediction = prediction if past_values.ndim == 3 else prediction[..., 0]
        return FeedbackTimeSeriesOutput(loss=loss, prediction_outputs=prediction, num_feedback_steps=steps)

    def channels(self, values: Tensor) -> Tensor:
        """[B, T] or [B, T, C] -> [B, T, C], as exact as float32 or better: a level may be large beside its changes."""
        values = values.to(torch.promote_types(self.dtype, torch.float32))
        return values if values.ndim == 3 else values[..., None]

    def forecast(
        self, past: Tensor, length: int, num_feedback_steps: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, C] -> the next `length` values [B, length, C], each fed back as the next input, and the passes made
        for each, [B, length], where they may stop early."""
        value, cache, values, steps = past, None, [], []
        for _ in range(length):
            outputs = self.run(
                False, past_values=value, past_key_values=cache, num_feedback_steps=num_feedback_steps, use_cache=True
            )
            cache = outputs.past_key_values
            steps.append(outputs.num_feedback_steps)
            values.append(value[:, -1:] + self.readout(outputs.last_hidden_state[:, -1:]))
            value = values[-1] if cache is not None else torch.cat([value, values[-1]], dim=1)
        made = None if steps[0] is None else torch.cat([made[:, -1:] for made in steps], dim=1)
        return torch.cat(values, dim=1), made
