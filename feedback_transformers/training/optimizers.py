"""Train the matrices inside a model with Muon and the rest with AdamW, as one optimizer that Trainer takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Use PyTorch's Muon (Jordan et al. 2024) for weight matrices; AdamW for embeddings, readout, gains and biases,
    and for the diagonal maps of recurrences, whose rows are gains.

    Trainer takes it as `optimizers=(MuonAdamW(model), None)`, and makes a schedule that scales both learning rates.
    """

    def __init__(
        self, model: nn.Module, lr: float = 3e-3, muon_lr: float = 1e-2, weight_decay: float = 0.1, **adamw: Any
    ) -> None:
        ends = [getattr(model, "get_output_embeddings", lambda: None)()]
        for m in model.modules():  # by name, as a checkpoint may bring its own code
            kinds = {kind.__name__ for kind in type(m).__mro__}
            if "FeedbackHead" in kinds:
                ends += [part for name, part in m.named_children() if name != "model"]
            elif "FeedbackModel" in kinds:
                ends.append(m.embeddings)
            elif kinds & {"Embedding", "Diagonal"}:
                ends.append(m)
        outer = {id(p) for end in ends if end is not None for p in end.parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        inner = [p for p in trained if p.ndim == 2 and id(p) not in outer]
        if not inner:
            raise ValueError("This model has no weight matrix to train with Muon: use AdamW.")
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1 and (p.ndim > 2 or id(p) in outer)]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        # match_rms_adamw: updates as large as those of AdamW, so that its weight decay fits
        self.muon = torch.optim.Muon(inner, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, **{"betas": (0.9, 0.95), **adamw})
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        split = len(self.muon.param_groups)
        parts = ((self.muon, self.param_groups[:split]), (self.adamw, self.param_groups[split:]))
        for optimizer, groups in parts:  # ours are the groups and the state that schedules and checkpoints know
            optimizer.param_groups, optimizer.state = groups, self.state
            optimizer.step()
        return loss
