"""What the stock Trainer lacks for feedback networks: drawn step counts, distillation, a stop on NaN, and Muon."""

from .callbacks import SampleFeedbackSteps, StopOnNonFinite, draw_steps, set_steps
from .distillation import Distill, divergence
from .optimizers import MuonAdamW

__all__ = [
    "Distill",
    "MuonAdamW",
    "SampleFeedbackSteps",
    "StopOnNonFinite",
    "divergence",
    "draw_steps",
    "set_steps",
]
