"""The defaults of the example scripts: an architecture and a training for each task, found on its default data.

Every entry is a flag or a field of FeedbackConfig: `--config_overrides hidden_size=256` changes one of the model, and
`--learning_rate 1e-4` one of the training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """The defaults of a script.

    Args:
        architecture: fields of FeedbackConfig that say what is fed back; a preset replaces them.
        sizes: fields of FeedbackConfig that say how large the model is; they stay with a preset.
        training: flags of the script.
        smoke: flags with --smoke, for a run of seconds.
    """

    architecture: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    smoke: dict[str, Any] = field(default_factory=dict)


TINY = {"logging_steps": 1, "config_overrides": "hidden_size=32,intermediate_size=64"}

CLASSIFICATION = Recipe(
    architecture={
        "feedback_axis": "depth",
        "feedback_type": "transformer",
        "feedback_connection": "gate",
        "is_causal": False,
        "num_feedback_steps": 3,
        "supervision": "all",
        "num_encoder_layers": 1,
        "num_feedback_layers": 1,
        "decoder_type": "mlp",
        "num_decoder_layers": 0,
        "dropout": 0.1,
    },
    sizes={"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "max_position_embeddings": 512},
    training={
        "output_dir": "runs/classification",
        "dataset_name": "movie-sentiment",
        "num_train_epochs": 4,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 128,
        "learning_rate": 1e-3,
        "warmup_steps": 0.1,
        "weight_decay": 0.1,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "auto",  # accuracy, f1_macro or mae, as the labels are
    },
    smoke={
        **TINY,
        "output_dir": "runs/smoke/classification",
        "num_train_epochs": 1,
        "max_train_samples": 32,
        "max_eval_samples": 16,
        "per_device_train_batch_size": 16,
        "vocab_size": 300,
    },
)

SEQ2SEQ = Recipe(
    architecture={
        "feedback_axis": "depth",
        "feedback_type": "transformer",
        "feedback_connection": "gate",
        "num_feedback_steps": 2,
        "num_encoder_layers": 2,
        "num_feedback_layers": 1,
        "num_decoder_layers": 1,
    },
    sizes={"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "max_position_embeddings": 512},
    training={
        "output_dir": "runs/seq2seq",
        "dataset_name": "modern-bible",
        "max_steps": 4000,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "learning_rate": 2e-3,
        "warmup_steps": 0.05,
        "weight_decay": 0.05,
        "adam_beta2": 0.98,
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "steps",
        "eval_steps": 1000,
        "save_steps": 1000,
        "max_eval_samples": 300,
    },
    smoke={
        **TINY,
        "output_dir": "runs/smoke/seq2seq",
        "max_steps": 2,
        "max_train_samples": 16,
        "max_eval_samples": 4,
        "max_target_length": 16,
        "per_device_train_batch_size": 4,
        "vocab_size": 300,
    },
)

SMALL_TEXT = {
    **TINY,
    "block_size": 32,
    "max_train_samples": 64,
    "max_eval_samples": 16,
    "per_device_train_batch_size": 4,
}
SMALL_CHECKPOINT = {name: value for name, value in SMALL_TEXT.items() if name != "config_overrides"}

# Feedback comes from the position before, and is solved by passes in parallel over all positions.
LANGUAGE_MODEL = Recipe(
    architecture={
        "feedback_axis": "time",
        "solver": "jacobi",
        "solver_steps": 4,
        "num_encoder_layers": 1,
        "num_feedback_layers": 2,
        "num_decoder_layers": 1,
        "gradient_steps": 3,
        "trained_feedback_steps": [3, 6],  # the passes that are drawn in training
    },
    sizes={"hidden_size": 128, "intermediate_size": 248, "num_attention_heads": 4, "tie_word_embeddings": False},
    training={
        "output_dir": "runs/clm",
        "dataset_name": "shakespeare",
        "max_steps": 3000,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 64,
        "learning_rate": 3e-3,
        "muon_learning_rate": 1e-2,
        "warmup_steps": 0.05,
        "weight_decay": 0.1,
        "eval_strategy": "steps",
        "eval_steps": 500,
        "save_steps": 500,
        "save_total_limit": 2,
    },
    smoke={**SMALL_TEXT, "output_dir": "runs/smoke/clm", "max_steps": 4, "eval_steps": 2, "save_steps": 2},
)

# The same without Trainer, which names some flags otherwise.
OWN_LOOP = Recipe(
    training={"dataset_name": "shakespeare", "muon_learning_rate": 1e-2},
    smoke={
        **{name: value for name, value in SMALL_TEXT.items() if name != "logging_steps"},
        "output_dir": "runs/smoke/clm-no-trainer",
        "max_train_steps": 4,
        "checkpointing_steps": 2,
    },
)

LORA = Recipe(
    training={
        "output_dir": "runs/lora",
        "dataset_name": "python-docs",
        "max_steps": 500,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "learning_rate": 1e-2,
        "warmup_steps": 0.05,
        "save_strategy": "steps",
        "save_steps": 250,
    },
    smoke={**SMALL_CHECKPOINT, "output_dir": "runs/smoke/lora", "max_steps": 2},
)

RETROFIT = Recipe(
    training={
        "output_dir": "runs/retrofit",
        "dataset_name": "python-docs",
        "max_steps": 500,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 5e-4,
        "warmup_steps": 0.05,
        "save_steps": 100,
        "save_total_limit": 2,
        "logging_steps": 10,
        "max_eval_samples": 100,
        "min_feedback_steps": 1,
    },
    smoke={**SMALL_CHECKPOINT, "output_dir": "runs/smoke/retrofit", "max_steps": 4, "save_steps": 2},
)

CHATS = Recipe(
    training={
        "output_dir": "runs/chats",
        "max_steps": 1000,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "warmup_steps": 0.05,
        "eval_strategy": "steps",
        "eval_steps": 500,
        "save_steps": 500,
        "assistant_only_loss": True,
        "bf16": False,
        "gradient_checkpointing": None,  # not at all: TRL's own default, for large models
        "packing": False,  # the feedback of a chat would reach the next one in its row
    },
    smoke={
        **TINY,
        "output_dir": "runs/smoke/chats",
        "max_steps": 4,
        "eval_steps": 2,
        "save_steps": 2,
        "max_train_samples": 32,
        "max_eval_samples": 8,
        "per_device_train_batch_size": 4,
    },
)

IMAGES = Recipe(
    architecture={
        "feedback_axis": "depth",
        "feedback_type": "conv",
        "feedback_connection": "gate",
        "encoder_type": "cnn",
        "decoder_type": "mlp",
        "num_encoder_layers": 2,
        "num_feedback_layers": 1,
        "num_decoder_layers": 1,
        "num_feedback_steps": 4,
        "supervision": "all",
        "initializer_range": 0.06,
        "dropout": 0.1,
    },
    sizes={"hidden_size": 96, "intermediate_size": 128},
    training={
        "output_dir": "runs/image-classification",
        "dataset_name": "mnist-5k",
        "num_train_epochs": 30,
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 250,
        "learning_rate": 4e-3,
        "warmup_steps": 0.1,
        "weight_decay": 0.1,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "auto",  # loss, accuracy or f1_macro, as the images are
        "remove_unused_columns": False,  # the pixels are made of the image column
    },
    smoke={
        "output_dir": "runs/smoke/image-classification",
        "num_train_epochs": 1,
        "max_train_samples": 32,
        "max_eval_samples": 20,
        "per_device_train_batch_size": 16,
        "logging_steps": 1,
        "config_overrides": "hidden_size=16,intermediate_size=32",
    },
)

OBJECTS = Recipe(
    architecture={
        "feedback_axis": "depth",
        "feedback_type": "conv",
        "feedback_connection": "gate",
        "encoder_type": "cnn",
        "decoder_type": "mlp",
        "is_causal": False,
        "num_encoder_layers": 3,
        "num_feedback_layers": 2,
        "num_decoder_layers": 1,
        "num_feedback_steps": 4,
        "supervision": "all",
        "initializer_range": 0.06,
    },
    sizes={"hidden_size": 96, "intermediate_size": 192},
    training={
        "output_dir": "runs/object-detection",
        "dataset_name": "digit-scenes",
        "num_train_epochs": 12,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "learning_rate": 2e-3,
        "warmup_steps": 0.1,
        "weight_decay": 0.05,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "map",
        "remove_unused_columns": False,  # the pixels are made of the image column
        "label_names": ["labels"],
    },
    smoke={
        "output_dir": "runs/smoke/object-detection",
        "num_train_epochs": 1,
        "max_train_samples": 16,
        "max_eval_samples": 4,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "config_overrides": "hidden_size=16,intermediate_size=32",
    },
)

IMAGE_TO_IMAGE = Recipe(  # untuned
    architecture={
        "feedback_axis": "depth",
        "feedback_type": "conv",
        "feedback_connection": "gate",
        "encoder_type": "cnn",
        "decoder_type": "mlp",
        "is_causal": False,
        "num_encoder_layers": 1,
        "num_feedback_layers": 1,
        "num_decoder_layers": 1,
        "num_feedback_steps": 4,
        "supervision": "all",
    },
    sizes={"hidden_size": 64, "intermediate_size": 128},
    training={
        "output_dir": "runs/image-to-image",
        "dataset_name": "photographs",
        "max_steps": 1000,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 1,  # whole images
        "learning_rate": 1e-3,
        "warmup_steps": 0.05,
        "weight_decay": 0.05,
        "eval_strategy": "steps",
        "eval_steps": 250,
        "save_steps": 250,
        "load_best_model_at_end": True,
        "metric_for_best_model": "psnr",
        "remove_unused_columns": False,  # the pixels are made of the image column
        "label_names": ["labels", "pixel_mask", "pixel_values"],  # what the metric reads
    },
    smoke={
        "output_dir": "runs/smoke/image-to-image",
        "max_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "max_train_samples": 4,
        "max_eval_samples": 2,
        "per_device_train_batch_size": 4,
        "crop": 16,
        "crops_per_image": 2,
        "eval_crop": 32,
        "logging_steps": 1,
        "config_overrides": "hidden_size=16,intermediate_size=32",
    },
)

CAPTIONS = Recipe(  # untuned
    architecture={
        "feedback_axis": "depth",
        "feedback_type": "transformer",
        "feedback_connection": "gate",
        "encoder_type": "cnn",
        "decoder_type": "mlp",
        "num_encoder_layers": 3,
        "num_feedback_layers": 2,
        "num_decoder_layers": 1,
        "num_feedback_steps": 3,
        "supervision": "all",
        "initializer_range": 0.06,
    },
    sizes={"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "max_position_embeddings": 256},
    training={
        "output_dir": "runs/captioning",
        "dataset_name": "digit-captions",
        "num_train_epochs": 12,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 100,
        "learning_rate": 2e-3,
        "warmup_steps": 0.1,
        "weight_decay": 0.05,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "exact_match",
        "label_names": ["labels"],
    },
    smoke={
        "output_dir": "runs/smoke/captioning",
        "num_train_epochs": 1,
        "max_train_samples": 16,
        "max_eval_samples": 4,
        "max_target_length": 8,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "vocab_size": 300,
        "config_overrides": "hidden_size=16,intermediate_size=32",
    },
)

VIDEOS = Recipe(  # untuned
    architecture={
        "feedback_axis": "depth",
        "feedback_type": "conv",
        "feedback_connection": "gate",
        "encoder_type": "cnn",
        "decoder_type": "mlp",
        "is_causal": False,
        "num_encoder_layers": 2,
        "num_feedback_layers": 1,
        "num_decoder_layers": 1,
        "num_feedback_steps": 4,
        "supervision": "all",
        "initializer_range": 0.06,
    },
    sizes={"hidden_size": 64, "intermediate_size": 128},
    training={
        "output_dir": "runs/video-classification",
        "dataset_name": "digit-videos",
        "num_train_epochs": 12,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 100,
        "learning_rate": 3e-3,
        "warmup_steps": 0.1,
        "weight_decay": 0.1,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
        "remove_unused_columns": False,  # the pixels are made of the video column
    },
    smoke={
        "output_dir": "runs/smoke/video-classification",
        "num_train_epochs": 1,
        "max_train_samples": 32,
        "max_eval_samples": 20,
        "per_device_train_batch_size": 16,
        "logging_steps": 1,
        "config_overrides": "hidden_size=16,intermediate_size=32",
    },
)

FORECASTING = Recipe(
    architecture={
        "feedback_axis": "depth",
        "feedback_type": "transformer",
        "feedback_connection": "gate",
        "num_feedback_steps": 3,
        "num_encoder_layers": 1,
        "num_feedback_layers": 1,
        "num_decoder_layers": 1,
    },
    sizes={"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
    training={
        "output_dir": "runs/forecasting",
        "dataset_name": "electricity",
        "max_steps": 1000,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 128,
        "learning_rate": 3e-3,
        "warmup_steps": 0.05,
        "weight_decay": 0.05,
        "eval_strategy": "steps",
        "eval_steps": 500,
        "save_steps": 500,
        "label_names": ["future_values"],
    },
    smoke={
        "output_dir": "runs/smoke/forecasting",
        "max_steps": 2,
        "max_train_samples": 16,
        "max_eval_samples": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "config_overrides": "hidden_size=16,intermediate_size=32",
    },
)
