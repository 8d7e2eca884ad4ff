"""ENCODERS: stacks before the loop, e = encoder(embedded input), [B, T, D] -> [B, T, D]."""

from __future__ import annotations

from torch import nn

from .feedback_layers import ConvStack, TransformerStack
from .feedback_scan import RecurrentStack

ENCODERS: dict[str, type[nn.Module]] = {
    "transformer": TransformerStack,
    "rnn": RecurrentStack,
    "cnn": ConvStack,
}
