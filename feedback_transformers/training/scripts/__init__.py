"""What training scripts share: arguments, data files, passes, results. `examples/` is written with it.

Flags are named as in the example scripts of transformers.
"""

from . import recipes
from .arguments import TRAINING, ModelArguments, command, overrides, parse
from .data_files import DataArguments
from .images import (
    eight_bits,
    image_paths,
    image_processor,
    image_sizes,
    image_splits,
    print_images,
    read_plain_images,
    readable,
)
from .labels import with_classes
from .passes import drawn_passes, measure_passes, print_passes, steps_to_draw
from .results import fit, publish, publish_model, record, set_max_length, train, whole
from .rows import check_columns
from .scores import best_metric, report, score, write_predictions
from .series import one_series
from .targets import PROBLEMS, Targets, balance_classes, known_targets, read_targets

__all__ = [
    "PROBLEMS",
    "TRAINING",
    "DataArguments",
    "ModelArguments",
    "Targets",
    "balance_classes",
    "best_metric",
    "check_columns",
    "command",
    "drawn_passes",
    "eight_bits",
    "fit",
    "image_paths",
    "image_processor",
    "image_sizes",
    "image_splits",
    "known_targets",
    "measure_passes",
    "one_series",
    "overrides",
    "parse",
    "print_images",
    "print_passes",
    "publish",
    "publish_model",
    "read_plain_images",
    "read_targets",
    "readable",
    "recipes",
    "record",
    "report",
    "score",
    "set_max_length",
    "steps_to_draw",
    "train",
    "whole",
    "with_classes",
    "write_predictions",
]
