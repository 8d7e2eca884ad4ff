"""CONNECTIONS: c(e, φ(y)), how feedback enters a step.

Shapes: e and φ(y) are [B, T, D]; so is the result. A retrofitted model begins with a closed connection, which returns e
whatever φ is. It opens by its first gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_feedback import FeedbackConfig


def is_zero(weight: Tensor) -> bool:
    """Whether a matrix is known to hold nothing but zeros; False where it has no values yet or is quantized."""
    return not weight.is_meta and weight.is_floating_point() and weight.numel() > 0 and not weight.any()


class GateConnection(nn.Module):
    """e + a · σ(W_g [e; norm(φ)] + b) ∘ W_s norm(φ), as in the Recurrent Looped Transformer (Zhang 2026)."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.gate_proj = nn.Linear(2 * size, size)
        self.signal_proj = nn.Linear(size, size, bias=False)
        self.scale = nn.Parameter(torch.empty(1))

    def init_parameters(self) -> None:
        init.ones_(self.scale)

    def forward(self, e: Tensor, signal: Tensor) -> Tensor:
        signal = self.norm(signal)
        gate = torch.sigmoid(self.gate_proj(torch.cat([e, signal], dim=-1)))
        return e + self.scale * gate * self.signal_proj(signal)

    def is_closed(self) -> bool:
        return is_zero(self.signal_proj.weight)

    def close(self) -> None:
        for parameter in (self.signal_proj.weight, *self.gate_proj.parameters()):  # the same in every closed model
            nn.init.zeros_(parameter)


class AddConnection(nn.Module):
    """e + W norm(φ): the context units of Jordan 1986, and the input injection of looped transformers."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.signal_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, e: Tensor, signal: Tensor) -> Tensor:
        return e + self.signal_proj(self.norm(signal))

    def is_closed(self) -> bool:
        return is_zero(self.signal_proj.weight)

    def close(self) -> None:
        nn.init.zeros_(self.signal_proj.weight)


class ConcatConnection(nn.Module):
    """W [e; norm(φ)], the adapter of recurrent-depth models (Geiping et al. 2025, arXiv:2502.05171)."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.signal_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, e: Tensor, signal: Tensor) -> Tensor:
        return self.signal_proj(torch.cat([e, self.norm(signal)], dim=-1))

    def is_closed(self) -> bool:
        return is_zero(self.signal_proj.weight[:, self.signal_proj.out_features :])

    def close(self) -> None:
        nn.init.eye_(self.signal_proj.weight)  # [D, 2 D]: e as it is, and nothing of φ


class MemoryConnection(nn.Module):
    """e alone: feedback enters through the attention of the cell, which reads the shared memory of past steps."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()

    def forward(self, e: Tensor, signal: Tensor) -> Tensor:
        return e

    def is_closed(self) -> bool:
        return False


CONNECTIONS: dict[str, type[nn.Module]] = {
    "gate": GateConnection,
    "add": AddConnection,
    "concat": ConcatConnection,
    "memory": MemoryConnection,
}
