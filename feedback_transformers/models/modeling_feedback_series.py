"""Time-series heads. Shapes: B batch, T past steps, F future steps, C channels, D hidden size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .configuration_feedback import FeedbackConfig
from .feedback_calls import FeedbackModelOutput, named_arguments
from .feedback_objectives import losses_of_units
from .modeling_feedback_heads import FeedbackHead

GAPS = "give windows of one length, with their gaps filled"
FEATURES = "a series is read from its values alone, so make each feature a channel of past_values"


@dataclass
class FeedbackTimeSeriesOutput(ModelOutput):
    """
    Args:
        loss: [], where the future was given.
        prediction_outputs: [B, F] or [B, F, C], in the units of past_values.
        hidden_states, feedback_states: as in FeedbackModelOutput, of the past, or of all steps but the last where the
            future was given.
        num_feedback_steps: [B, F] passes that each forecast took, where halting may stop them.
    """

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    feedback_states: tuple[Tensor, ...] | None = None
    num_feedback_steps: Tensor | None = None


class FeedbackForTimeSeriesPrediction(FeedbackHead):
    """Forecast one step, feed the forecast back as the next input, and go on so for `prediction_length` steps.

    The model reads a window relative to the mean and standard deviation of the window's own past, in float32 at least,
    and predicts the change to the next step. A past that never changes has no such scale: its forecast is that it
    stays, and the loss leaves it out. Training reads the true past of every step (teacher forcing); evaluation rolls
    the forecast out. With Trainer, set `label_names=["future_values"]` in TrainingArguments to have a loss in
    evaluation.
    """

    main_input_name = "past_values"
    accepts_loss_kwargs = False
    can_be_right = False
    reads = "past_values"
    needs = {"is_causal": True, "halting_measure": "state"}  # the other one compares classes, and a series has none
    unread = {
        "attention_mask": GAPS,
        "past_observed_mask": GAPS,
        "future_observed_mask": GAPS,
        "past_time_features": FEATURES,
        "future_time_features": FEATURES,
        "static_categorical_features": FEATURES,
        "static_real_features": FEATURES,
    }

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        channels = config.input_config.num_channels
        self.readout = nn.Linear(config.hidden_size, channels)
        self.feedback = self.feedback_projection(channels)
        self.post_init()

    def predict(self, y: Tensor) -> Tensor:
        """Return the change to the next step [B, T, C], in standard deviations of the past."""
        return self.readout(y)

    def embed_output(self, y: Tensor) -> Tensor:
        return self.feedback(self.predict(y))

    @named_arguments
    def forward(
        self,
        past_values: Tensor | None = None,
        future_values: Tensor | None = None,
        num_feedback_steps: int | None = None,
        prediction_length: int | None = None,
        output_hidden_states: bool | None = None,
        output_feedback_states: bool | None = None,
    ) -> FeedbackTimeSeriesOutput:
        """Return the forecast of past_values [B, T] or [B, T, C], and the loss over future_values [B, F] or [B, F, C].

        The loss is the mean absolute error in standard deviations of the past. In training, with future_values given,
        no forecast is rolled out. `prediction_length` replaces that of the config.
        """
        if past_values is None or past_values.ndim not in (2, 3) or past_values.shape[1] < 2:
            raise ValueError("past_values needs at least two time steps, [batch, steps] or [batch, steps, channels].")
        for name, values in (("past_values", past_values), ("future_values", future_values)):
            here = values is not None and values.device.type == "cpu" and not torch.compiler.is_compiling()
            if here and not values.isfinite().all():
                raise ValueError(f"{name} holds nan or infinite numbers: fill the gaps first.")
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
        rounding = 8 * torch.finfo(past.dtype).eps * past.abs().amax(dim=1, keepdim=True)
        flat = std <= rounding  # [B, 1, C] no change beyond that
        scale = std + 1e-5
        past, loss = ((past - mean) / scale).masked_fill(flat, 0.0), None
        asked = {
            "num_feedback_steps": num_feedback_steps,
            "output_hidden_states": output_hidden_states,
            "output_feedback_states": output_feedback_states,
        }
        outputs = None
        if future_values is not None:
            series = torch.cat([past, ((future - mean) / scale).masked_fill(flat, 0.0)], dim=1)
            outputs = self.run(True, past_values=series[:, :-1], use_cache=False, **asked)

            def units(y: Tensor) -> Tensor:
                """Return the error of each step and channel, [B, T, C]."""
                return (series[:, :-1] + self.predict(y) - series[:, 1:]).abs()

            counted = (~flat).expand_as(series[:, 1:])
            loss = self.total_loss(losses_of_units(units, counted, read=lambda x: x[..., None]), outputs)
        prediction = steps = None
        if future_values is None or not self.training:
            prediction, steps, first = self.forecast(past, length, **asked)
            outputs = outputs or first
            prediction = prediction * scale.masked_fill(flat, 0.0) + mean
            prediction = prediction if past_values.ndim == 3 else prediction[..., 0]
        return FeedbackTimeSeriesOutput(
            loss=loss,
            prediction_outputs=prediction,
            hidden_states=outputs.hidden_states,
            feedback_states=outputs.feedback_states,
            num_feedback_steps=steps,
        )

    def channels(self, values: Tensor) -> Tensor:
        """Return values [B, T] or [B, T, C] as [B, T, C], in float32 or better.

        The level of a series may be large beside its changes.
        """
        kind = torch.promote_types(self.dtype, torch.float32)
        values = values.to(torch.promote_types(kind, values.dtype))
        return values if values.ndim == 3 else values[..., None]

    def forecast(self, past: Tensor, length: int, **asked: Any) -> tuple[Tensor, Tensor | None, FeedbackModelOutput]:
        """Return the next `length` values after past [B, T, C], each fed back as the next input.

        Returns:
            the values [B, length, C]; the passes made for each, [B, length], where they may stop early; and the
            model's outputs for the past.
        """
        value, cache, values, made = past, None, [], []
        for _ in range(length):
            made.append(self.run(False, past_values=value, past_key_values=cache, use_cache=True, **asked))
            cache = made[-1].past_key_values
            values.append(value[:, -1:] + self.predict(made[-1].last_hidden_state[:, -1:]))
            value = values[-1] if cache is not None else torch.cat([value, values[-1]], dim=1)
        steps = [outputs.num_feedback_steps for outputs in made]
        taken = None if steps[0] is None else torch.cat([passes[:, -1:] for passes in steps], dim=1)
        return torch.cat(values, dim=1), taken, made[0]
