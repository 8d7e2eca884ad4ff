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
    """loss [] where the future was given; prediction_outputs [B, F] or [B, F, C], in the units of past_values."""

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None


class FeedbackForTimeSeriesPrediction(FeedbackHead):
    """Forecasts one step, feeds the forecast back as the next input, and so on for `prediction_length` steps.

    A window is read relative to the mean and standard deviation of its own past, and each step predicts the change
    to the next one. Trained on the true past of every step (teacher forcing); evaluation rolls out. With Trainer, set
    `label_names=["future_values"]` in TrainingArguments to have a loss in evaluation.
    """

    main_input_name = "past_values"
    accepts_loss_kwargs = False
    learns_to_halt = False
    embedding_type = "values"
    needs = {"is_causal": True, "halting_measure": "state"}  # which compares classes, and a series has none

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        self.readout = nn.Linear(config.hidden_size, config.num_channels)
        self.feedback = self.way_back(config.num_channels)
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
        past_values = past_values.to(self.dtype)
        past = past_values if past_values.ndim == 3 else past_values[..., None]
        mean, std = past.mean(dim=1, keepdim=True), past.std(dim=1, keepdim=True) + 1e-5
        past, loss = (past - mean) / std, None
        if future_values is not None:
            future = future_values if future_values.ndim == 3 else future_values[..., None]
            series = torch.cat([past, (future - mean) / std], dim=1)
            outputs = self.run(
                True, past_values=series[:, :-1], num_feedback_steps=num_feedback_steps, use_cache=False
            )

            def step_loss(y: Tensor) -> Tensor:
                return (series[:, :-1] + self.readout(y) - series[:, 1:]).abs().mean()

            loss = self.mean_loss(step_loss, outputs)
        prediction = None
        if future_values is None or not self.training:
            length = future_values.shape[1] if future_values is not None else prediction_length
            prediction = self.forecast(past, length or self.config.prediction_length, num_feedback_steps) * std + mean
            prediction = prediction if past_values.ndim == 3 else prediction[..., 0]
        return FeedbackTimeSeriesOutput(loss=loss, prediction_outputs=prediction)

    def forecast(self, past: Tensor, length: int, num_feedback_steps: int | None = None) -> Tensor:
        """[B, T, C] -> the next `length` values [B, length, C], each fed back as the next input."""
        value, cache, values = past, None, []
        for _ in range(length):
            outputs = self.run(
                False, past_values=value, past_key_values=cache, num_feedback_steps=num_feedback_steps, use_cache=True
            )
            cache = outputs.past_key_values
            values.append(value[:, -1:] + self.readout(outputs.last_hidden_state[:, -1:]))
            value = values[-1] if cache is not None else torch.cat([value, values[-1]], dim=1)
        return torch.cat(values, dim=1)
