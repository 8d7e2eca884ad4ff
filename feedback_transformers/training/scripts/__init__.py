"""What training scripts share: arguments, data files, passes, results. `examples/` is written with it.

Flags are named as in the example scripts of transformers.
"""

from .arguments import TRAINING, ModelArguments, command, overrides, parse
from .data_files import DataArguments
from .labels import with_classes
from .passes import drawn_passes, measure_passes, print_passes, steps_to_draw
from .results import fit, publish, publish_model, record, train, whole
from .rows import check_columns

__all__ = [
    "TRAINING",
    "DataArguments",
    "ModelArguments",
    "check_columns",
    "command",
    "drawn_passes",
    "fit",
    "measure_passes",
    "overrides",
    "parse",
    "print_passes",
    "publish",
    "publish_model",
    "record",
    "steps_to_draw",
    "train",
    "whole",
    "with_classes",
]
