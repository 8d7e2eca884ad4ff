"""CONNECTIONS: how feedback enters a step, c(e, φ(y)).

A closed connection returns e for any φ, and its first gradient opens it; retrofitted models begin with one.

Shapes: e, φ(y) and the result are [B, T, D].
"""

from __future__ import annotations

from math import expm1, log, sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import initialization as init

from .configuration_feedback import FeedbackConfig


def is_zero(weight: Tensor) -> bool:
    """Whether a matrix is known to hold nothing but zeros; False where it has no values yet or is quantized."""
    return not weight.is_meta and weight.is_floating_point() and weight.numel() > 0 and not weight.any()


def signal_norm(config: FeedbackConfig) -> nn.Module:
    """Return the norm of φ, or nothing with connection_norm=False."""
    return nn.RMSNorm(config.hidden_size, eps=config.norm_eps) if config.connection_norm else nn.Identity()


class GateConnection(nn.Module):
    """e + a · σ(W_g [e; norm(φ)] + b) ∘ W_s norm(φ), in the spirit of Zhang 2026, Recurrent Looped Transformer."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm = signal_norm(config)
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
        """Make the connection return e; every closed connection is the same."""
        for parameter in (self.signal_proj.weight, *self.gate_proj.parameters()):
            nn.init.zeros_(parameter)


class AddConnection(nn.Module):
    """e + W norm(φ), in the spirit of Jordan's context units (1986) and of input injection in looped transformers."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.norm = signal_norm(config)
        self.signal_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, e: Tensor, signal: Tensor) -> Tensor:
        return e + self.signal_proj(self.norm(signal))

    def is_closed(self) -> bool:
        return is_zero(self.signal_proj.weight)

    def close(self) -> None:
        """Make the connection return e."""
        nn.init.zeros_(self.signal_proj.weight)


class ConcatConnection(nn.Module):
    """W [e; norm(φ)], the adapter of Huginn (Geiping et al. 2025, arXiv:2502.05171) with connection_norm=False."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.norm = signal_norm(config)
        self.signal_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, e: Tensor, signal: Tensor) -> Tensor:
        return self.signal_proj(torch.cat([e, self.norm(signal)], dim=-1))

    def is_closed(self) -> bool:
        return is_zero(self.signal_proj.weight[:, self.signal_proj.out_features :])

    def close(self) -> None:
        """Make the connection return e."""
        nn.init.eye_(self.signal_proj.weight)  # [D, 2D]: the identity for e, zero for φ


class ReplaceConnection(nn.Module):
    """norm(φ) alone: e enters as the initial state, as in Universal Transformers and Ouro (arXiv:2510.25741)."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.norm = signal_norm(config)

    def forward(self, e: Tensor, signal: Tensor) -> Tensor:
        return self.norm(signal)

    def is_closed(self) -> bool:
        return False


class SumConnection(ReplaceConnection):
    """e + norm(φ), without weights of its own, as in TRM and HRM with connection_norm=False."""

    def forward(self, e: Tensor, signal: Tensor) -> Tensor:
        return e + self.norm(signal)


class DecayConnection(nn.Module):
    """exp(-Δ exp(A_log)) ∘ norm(φ) + Δ ∘ B e with Δ = softplus(dt_bias), as in Parcae with connection_norm=False.

    Each channel keeps a share of its state below 1, so the linear part of a pass can't grow. The share begins at
    √(1/5), and B at the identity. Source: DiagonalInjection of sandyresearch/parcae dee8363.
    """

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.norm = signal_norm(config)
        self.input_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.A_log = nn.Parameter(torch.empty(config.hidden_size))
        self.dt_bias = nn.Parameter(torch.empty(config.hidden_size))

    def init_parameters(self) -> None:
        init.eye_(self.input_proj.weight)
        init.zeros_(self.A_log)
        init.constant_(self.dt_bias, log(expm1(-log(sqrt(1 / 5)))))

    def forward(self, e: Tensor, signal: Tensor) -> Tensor:
        step = softplus(self.dt_bias)
        kept = torch.exp(-step * torch.exp(self.A_log))
        return kept * self.norm(signal) + step * self.input_proj(e)

    def is_closed(self) -> bool:
        return False


class MemoryConnection(nn.Module):
    """e alone: feedback enters through the cell's attention, which reads the shared memory of past positions."""

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
    "replace": ReplaceConnection,
    "sum": SumConnection,
    "decay": DecayConnection,
    "memory": MemoryConnection,
}
