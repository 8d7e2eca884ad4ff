"""HALTING: when a position has made enough passes.

A position that stopped keeps its state, and in a causal model looks to later positions as it did at its last pass.

Shapes: B batch, T positions, D hidden size, V predicted classes, K passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_feedback import FeedbackConfig
from .feedback_cache import wide


@dataclass
class Progress:
    """How far the positions of a call are."""

    running: Tensor  # [B, T] bool, False once stopped, and for padding
    num_steps: Tensor  # [B, T] passes made
    spent: Tensor  # [B, T] probability of having stopped by now, where that is learned
    probabilities: list[Tensor] = field(default_factory=list)  # [B, T] each, of stopping at this pass, in training
    mean: Tensor | None = None  # [B, T, D] what is read in place of the last state
    left_over: Tensor | float = 0.0  # [B, T] what the last pass of a position was cut to
    log_p: Tensor | None = None  # [B, T, V] the last prediction

    @classmethod
    def start(cls, e: Tensor, mask: Tensor | None) -> Progress:
        """Return the progress before the first pass of a call with inputs e [B, T, D] and mask [B, T]."""
        zeros = wide(e.new_zeros(e.shape[:2]))
        running = torch.ones_like(zeros, dtype=torch.bool) if mask is None else mask.clone()
        return cls(running, zeros.long(), zeros)


class HaltProjection(nn.Linear):
    """What λ is the sigmoid of: one λ everywhere at first, the same in every model that learns it anew, also where
    adapters leave it frozen."""

    def __init__(self, size: int, first: float = 0.5) -> None:
        self.first = first
        super().__init__(size, 1)

    def init_parameters(self) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, log(self.first / (1 - self.first)))


class Halting(nn.Module):
    default_threshold: float
    reads_prediction = False

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def threshold(self) -> float:
        return self.config.halting_threshold or self.default_threshold

    def loss(self, progress: Progress) -> Tensor | None:
        """What training adds for each position, [B, T]."""
        return None


class ConvergedHalting(Halting):
    """Stops a position when its last pass changed little: |h_k - h_{k-1}| <= threshold |h_{k-1}| as in Geiping et al.
    2025 (arXiv:2502.05171), or KL(p_k | p_{k-1}) <= threshold. Training makes all passes."""

    default_threshold = 0.05
    in_training = False  # whether positions stop in training too

    @property
    def reads_prediction(self) -> bool:  # type: ignore[override]
        return self.config.halting_measure == "prediction"

    def forward(self, progress: Progress, h: Tensor, before: Tensor | None, logits: Tensor | None, last: bool) -> None:
        """Notes the pass that made h [B, T, D] of `before`, and predicts `logits` [B, T, V]."""
        if self.training:
            return
        if logits is not None:
            old, progress.log_p = progress.log_p, wide(logits).log_softmax(-1)
            if old is not None:
                change = (progress.log_p.exp() * (progress.log_p - old)).sum(-1)
                progress.running = progress.running & (change > self.threshold)
        elif before is not None:
            change = wide(h - before).norm(dim=-1)
            progress.running = progress.running & (change > self.threshold * wide(before).norm(dim=-1))


class LearnedHalting(Halting):
    """PonderNet, Banino et al. 2021 (arXiv:2107.05407): a position stops at pass k with probability

    p_k = λ_k Π_{j<k} (1 - λ_j)    λ_k = σ(w h_k + b)    L = Σ_k p_k L_k + β KL(p | geometric prior)

    Training makes all passes; evaluation, where the paper draws, stops when p_1 + ... + p_k reaches the threshold.
    """

    default_threshold = 0.5
    in_training = False

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        # As the prior has it, so that the divergence from it begins at zero.
        self.halt_proj = HaltProjection(config.hidden_size, first=config.halting_prior)

    def forward(self, progress: Progress, h: Tensor, before: Tensor | None, logits: Tensor | None, last: bool) -> None:
        left = 1 - progress.spent
        p = left if last else left * wide(self.halt_proj(h).squeeze(-1)).sigmoid()
        progress.spent = progress.spent + p
        if self.training:
            progress.probabilities.append(p)
        else:
            progress.running = progress.running & (progress.spent < self.threshold)

    def loss(self, progress: Progress) -> Tensor | None:
        """Divergence from the prior, cut off at K passes."""
        if not self.training:
            return None
        p = torch.stack(progress.probabilities)
        passes = torch.arange(len(p), dtype=p.dtype, device=p.device)
        prior = self.config.halting_prior * (1 - self.config.halting_prior) ** passes
        log_prior = (prior / prior.sum()).log()[:, None, None]
        log_p = p.clamp(min=1e-12).log()  # p is 0 where λ is 1 before, and p log p has no gradient there
        return (p * (log_p - log_prior)).sum(dim=0)


class AdaptiveHalting(Halting):
    """Adaptive computation time, Graves 2016 (arXiv:1603.08983): a position stops when its λ_k sum up to the
    threshold, the last one cut to what is left to 1, and reads Σ_k λ_k h_k. The loss has its passes, and what was left
    for the last one, added."""

    default_threshold = 0.99
    in_training = True

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        self.halt_proj = HaltProjection(config.hidden_size)

    def forward(self, progress: Progress, h: Tensor, before: Tensor | None, logits: Tensor | None, last: bool) -> None:
        left = 1 - progress.spent
        p = wide(self.halt_proj(h).squeeze(-1)).sigmoid()
        ends = left - p <= 1 - self.threshold
        if last:
            ends = torch.ones_like(ends)
        p = torch.where(ends, left, p) * progress.running
        weighted = p[..., None].to(h.dtype) * h
        progress.mean = weighted if progress.mean is None else progress.mean + weighted
        progress.left_over = progress.left_over + torch.where(ends, p, 0.0)
        progress.spent = progress.spent + p
        progress.running = progress.running & ~ends

    def loss(self, progress: Progress) -> Tensor | None:
        """Passes + what was left; only the latter has a gradient."""
        return progress.num_steps + progress.left_over if self.training else None


HALTING: dict[str, type[nn.Module]] = {
    "converged": ConvergedHalting,
    "learned": LearnedHalting,
    "act": AdaptiveHalting,
}
