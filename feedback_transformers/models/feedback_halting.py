"""HALTING: rules for when a position has made enough passes.

A stopped position keeps its state. In a causal model, later positions see its keys and values of its last pass.

Shapes: B batch, T positions, D hidden size, V predicted classes, K passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_feedback import FeedbackConfig
from .feedback_cache import wide


@dataclass
class Progress:
    """Progress of the positions of a call."""

    running: Tensor  # [B, T] bool, False for stopped positions and padding
    num_steps: Tensor  # [B, T] passes made
    spent: Tensor  # [B, T] probability of having stopped by now, if that is learned
    probabilities: list[Tensor] = field(default_factory=list)  # of stopping at each pass, [B, T], in training
    mean: Tensor | None = None  # [B, T, D] state that is read in place of the last one
    left_over: Tensor | float = 0.0  # [B, T] weight that was left for a position's last pass
    log_p: Tensor | None = None  # [B, T, V] the last prediction
    passes: int = 0  # made by now
    logits: list[Tensor] = field(default_factory=list)  # [B, 2] of each answer, to stop and to go on

    @classmethod
    def start(cls, e: Tensor, mask: Tensor | None) -> Progress:
        """Return the progress before the first pass of a call with inputs e [B, T, D] and mask [B, T]."""
        zeros = wide(e.new_zeros(e.shape[:2]))
        running = torch.ones_like(zeros, dtype=torch.bool) if mask is None else mask.clone()
        return cls(running, zeros.long(), zeros)


class HaltProjection(nn.Linear):
    """Predict the halting logit [..., D] -> [..., 1].

    It begins constant, so that a new model stops everywhere with the probability `first`.
    """

    def __init__(self, size: int, first: float = 0.5) -> None:
        self.first = first
        super().__init__(size, 1)

    def init_parameters(self) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, log(self.first / (1 - self.first)))


class RightProjection(nn.Linear):
    """Predict from h [B, D] whether an answer is right, [B, 2] logits to stop and to go on.

    It begins with a prediction that it is not, as in TRM's code, so that no row leaves a fresh model's training.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, 2)

    def init_parameters(self) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, -5.0)


class Halting(nn.Module):
    """Base of the halting rules: forward updates a Progress after each pass."""

    default_threshold: float
    reads_prediction = False
    in_training = False  # whether positions also stop in training
    freezes = True  # whether a stopped position keeps its state
    weighs_passes = False  # whether training weighs the losses of all passes

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def threshold(self) -> float:
        """Threshold of the config, or the rule's default."""
        return self.config.halting_threshold or self.default_threshold

    def loss(self, progress: Progress) -> Tensor | None:
        """Return what training adds to the loss of each position, [B, T], or None."""
        return None


class ConvergedHalting(Halting):
    """Stop a position in evaluation when its last pass changed it little; training makes all passes.

    |h_k - h_{k-1}| <= threshold · |h_{k-1}|, or KL(p_k | p_{k-1}) <= threshold with halting_measure="prediction". The
    rules are in the spirit of Geiping et al. 2025 (arXiv:2502.05171).
    """

    default_threshold = 0.05

    @property
    def reads_prediction(self) -> bool:  # type: ignore[override]
        return self.config.halting_measure == "prediction"

    def forward(self, progress: Progress, h: Tensor, before: Tensor | None, logits: Tensor | None, last: bool) -> None:
        """Stop positions after the pass that made h [B, T, D] from `before`, and that predicts `logits` [B, T, V]."""
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
    """Stop a position at pass k with a learned probability (PonderNet, Banino et al. 2021, arXiv:2107.05407).

    p_k = λ_k Π_{j<k} (1 - λ_j)    λ_k = σ(w h_k + b)    L = Σ_k p_k L_k + β KL(p | geometric prior)

    Training makes all passes. Evaluation stops when p_1 + ... + p_k reaches the threshold; the paper draws the pass.
    """

    default_threshold = 0.5
    weighs_passes = True

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        # Begins at the prior, so that the divergence from it begins at zero.
        self.halt_proj = HaltProjection(config.hidden_size, first=config.halting_prior or 0.5)

    def forward(self, progress: Progress, h: Tensor, before: Tensor | None, logits: Tensor | None, last: bool) -> None:
        left = 1 - progress.spent
        p = left if last else left * wide(self.halt_proj(h).squeeze(-1)).sigmoid()
        progress.spent = progress.spent + p
        if self.training:
            progress.probabilities.append(p)
        else:
            progress.running = progress.running & (progress.spent < self.threshold)

    def loss(self, progress: Progress) -> Tensor | None:
        """Return the divergence from the prior, cut off at K passes, or without one minus the entropy of p, [B, T]."""
        if not self.training:
            return None
        p = torch.stack(progress.probabilities)
        if self.config.halting_prior is None:
            return (p * p.clamp(min=1e-12).log()).sum(dim=0)
        passes = torch.arange(len(p), dtype=p.dtype, device=p.device)
        prior = self.config.halting_prior * (1 - self.config.halting_prior) ** passes
        log_prior = (prior / prior.sum()).log()[:, None, None]
        log_p = p.clamp(min=1e-12).log()  # p is 0 after a λ of 1, where p log p has no gradient
        return (p * (log_p - log_prior)).sum(dim=0)


class AdaptiveHalting(Halting):
    """Stop a position when its λ_k sum up to the threshold (adaptive computation time, Graves 2016, arXiv:1603.08983).

    The last λ is cut, so that they sum up to 1, and the position reads Σ_k λ_k h_k. The number of passes and the last
    λ are added to the loss.
    """

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
        """Return the number of passes plus the last λ, [B, T]; only the latter has a gradient."""
        return progress.num_steps + progress.left_over if self.training else None


class SelectHalting(LearnedHalting):
    """Make all passes, and read the one at which learned halting would have stopped (Ouro, arXiv:2510.25741).

    The keys and values that later positions see are those of all passes, so that exits change nothing else.
    """

    default_threshold = 1.0
    freezes = False

    def forward(self, progress: Progress, h: Tensor, before: Tensor | None, logits: Tensor | None, last: bool) -> None:
        waits = progress.running
        super().forward(progress, h, before, logits, last)
        if not self.training:
            progress.mean = h if progress.mean is None else torch.where(waits[..., None], h, progress.mean)


class SequenceHalting(Halting):
    """Make all passes, and let the first position of a row say after which answer the row is done (HRM, TRM).

    q = W z_1 + b, to stop and to go on. With a threshold, a row is read at its first answer with σ(q_stop) at or above
    it; without one, at its last. The papers' evaluations make all passes.
    """

    default_threshold = float("inf")
    freezes = False

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        self.halt_proj = RightProjection(config.hidden_size)

    def forward(self, progress: Progress, h: Tensor, before: Tensor | None, logits: Tensor | None, last: bool) -> None:
        waits, interval = progress.running, self.config.supervision_interval
        progress.passes += 1
        progress.mean = h if progress.mean is None else torch.where(waits[..., None], h, progress.mean)
        if progress.passes % interval and not last:
            return
        q = self.halt_proj(h[:, 0])
        progress.logits.append(q)
        if not self.training:
            progress.running = waits & (wide(q[:, :1]).sigmoid() < self.threshold)


HALTING: dict[str, type[nn.Module]] = {
    "converged": ConvergedHalting,
    "learned": LearnedHalting,
    "act": AdaptiveHalting,
    "select": SelectHalting,
}


def halting_rule(config: FeedbackConfig) -> Any:
    """Return the class of the config's rule; NoneType where all passes are made and the last is read."""
    if config.halting == "select" and config.halting_scope == "sequence":
        return SequenceHalting
    return HALTING.get(config.halting, type(None))
