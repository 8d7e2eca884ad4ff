"""What the stock Trainer lacks for feedback networks: step counts drawn in training, and a stop on NaN."""

from .callbacks import SampleFeedbackSteps, StopOnNonFinite, draw_steps

__all__ = ["SampleFeedbackSteps", "StopOnNonFinite", "draw_steps"]
