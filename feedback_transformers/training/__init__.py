"""What the stock Trainer lacks for feedback networks: step counts drawn in training, a stop on NaN, and Muon."""

from .callbacks import SampleFeedbackSteps, StopOnNonFinite, draw_steps
from .optimizers import MuonAdamW

__all__ = ["MuonAdamW", "SampleFeedbackSteps", "StopOnNonFinite", "draw_steps"]
