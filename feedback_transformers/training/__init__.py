"""Add what the stock Trainer lacks.

That is drawn passes, a carried state, an average of the weights, distillation, Muon, a stop on NaN, and training that
can be killed.
"""

from .callbacks import SampleFeedbackSteps, draw_steps, own_steps, set_steps, trained_with, with_steps
from .checkpoints import Sigterm, check_complete, last_complete_checkpoint, saving, train_safely
from .collators import DataCollatorForLeftPadding
from .distillation import Distill, divergence
from .non_finite import StopOnNonFinite, first_non_finite
from .optimizers import MuonAdamW
from .supervision import AverageWeights, CarryState

__all__ = [
    "AverageWeights",
    "CarryState",
    "DataCollatorForLeftPadding",
    "Distill",
    "MuonAdamW",
    "SampleFeedbackSteps",
    "Sigterm",
    "StopOnNonFinite",
    "check_complete",
    "divergence",
    "draw_steps",
    "first_non_finite",
    "last_complete_checkpoint",
    "own_steps",
    "saving",
    "set_steps",
    "train_safely",
    "trained_with",
    "with_steps",
]
