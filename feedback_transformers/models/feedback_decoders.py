"""DECODERS: stacks between the loop and the head's readout, y = g(h), [B, T, D] -> [B, T, D]."""

from __future__ import annotations

from torch import nn

from .feedback_layers import MLPStack, TransformerStack
from .feedback_scan import RecurrentStack

DECODERS: dict[str, type[nn.Module]] = {
    "mlp": MLPStack,
    "rnn": RecurrentStack,
    "transformer": TransformerStack,
}
