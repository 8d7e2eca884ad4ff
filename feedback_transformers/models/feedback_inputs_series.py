"""The input of series of numbers. Shapes: B batch, T time steps, C channels, D hidden size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .feedback_inputs import Embedded, Fields, Input, at_least_one


@dataclass(kw_only=True)
class ValueFields(Fields):
    """Fields of an input of numbers.

    Args:
        num_channels: numbers of a time step.
    """

    type: str = "values"
    num_channels: int = 1

    def check(self) -> None:
        at_least_one(self, "num_channels")


class ValueInput(Input):
    """Map series [B, T, C] to [B, T, D], a position per time step."""

    Fields = ValueFields
    takes = ("past_values",)

    def __init__(self, config: Any, fields: ValueFields) -> None:
        super().__init__(config, fields)
        self.projection = nn.Linear(fields.num_channels, config.hidden_size)

    def forward(self, past_values: Tensor) -> Embedded:
        if past_values.shape[-1] != self.projection.in_features:
            raise ValueError(
                f"past_values have {past_values.shape[-1]} channels and this model {self.projection.in_features}: set "
                "num_channels in input_config."
            )
        return Embedded(self.projection(past_values.to(self.projection.weight.dtype)))
