"""Classifies images by looking at them several times: a convolutional cell that feeds its state back.

    python examples/run_image_classification.py                  # MNIST-5k, 98.9 % (see benchmarks/LOG.md)
    python examples/run_image_classification.py --train_file my_images --config_overrides image_size=64,patch_size=8

The loss is taken after every feedback step (supervision="all"), so the answer is there early and gets better: the
accuracy of each step is printed, and drawn in accuracy_per_step.png.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feedback_transformers import FeedbackForImageClassification, metrics, visualize
from feedback_transformers.training import StopOnNonFinite, scripts

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

ARCHITECTURE = {
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
}
SIZES = {"hidden_size": 96, "intermediate_size": 128, "image_size": 28, "patch_size": 4, "num_channels": 1}
DEFAULTS: dict[str, Any] = {
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
    "remove_unused_columns": False,  # the pixels are made of the image column
}
SMOKE: dict[str, Any] = {
    "output_dir": "runs/smoke/image-classification",
    "max_steps": 2,
    "max_train_samples": 32,
    "max_eval_samples": 20,
    "per_device_train_batch_size": 16,
    "logging_steps": 1,
    "config_overrides": "hidden_size=16,intermediate_size=32",
}


@dataclass
class ImageArguments(scripts.DataArguments):
    image_column: str = field(default="image", metadata={"help": "The column that holds the images."})
    label_column: str = field(default="label", metadata={"help": "The column that holds the classes."})
    max_shift: float = field(default=2, metadata={"help": "In training, move images by up to so many pixels,"})
    max_turn: float = field(default=10, metadata={"help": "turn them by up to so many degrees,"})
    max_scale: float = field(default=0.1, metadata={"help": "and resize them by up to this share."})


def pixels(images: list, processor: ViTImageProcessorPil, channels: int) -> torch.Tensor:
    """PIL images -> [B, C, H, W]"""
    mode = "L" if channels == 1 else "RGB"
    arrays = [np.atleast_3d(np.asarray(image.convert(mode))) for image in images]
    return processor(arrays, return_tensors="pt", input_data_format="channels_last")["pixel_values"]


def moved(images: torch.Tensor, shift: float, turn: float, scale: float) -> torch.Tensor:
    """Each of the images [B, C, H, W] moved by up to `shift` pixels, turned by up to `turn` degrees, resized by up to
    `scale`; the edge is repeated."""
    angle, size, x, y = torch.empty(4, len(images)).uniform_(-1, 1)
    angle, size = torch.deg2rad(turn * angle), 1 + scale * size
    x, y = 2 * shift / images.shape[-1] * x, 2 * shift / images.shape[-2] * y
    cos, sin = angle.cos() * size, angle.sin() * size
    maps = torch.stack([torch.stack([cos, -sin, x], dim=1), torch.stack([sin, cos, y], dim=1)], dim=1)
    grid = torch.nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def accuracy_per_step(model: FeedbackForImageClassification, dataset: Dataset, collate: Callable) -> list[float]:
    """The share of right answers after each feedback step."""
    model.eval()
    right, count = 0, 0
    for start in range(0, len(dataset), 250):
        batch = collate([dataset[i] for i in range(start, min(start + 250, len(dataset)))])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        outputs = model(batch["pixel_values"], output_feedback_states=True)
        logits = torch.stack(model.step_logits(outputs))  # [K, B, L]
        right = right + (logits.argmax(-1) == batch["labels"]).sum(dim=1)
        count += len(batch["labels"])
    return (torch.as_tensor(right) / count).tolist()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, ImageArguments, TrainingArguments)
    model_args, image_args, training_args = scripts.parse(types, arguments, DEFAULTS, SMOKE)
    set_seed(training_args.seed)
    dataset = image_args.load()
    scripts.check_columns(dataset, texts=False, image_column=image_args.image_column)
    known = model_args.classes(AutoModelForImageClassification)
    dataset = scripts.with_classes(dataset, image_args.label_column, known, training_args.do_train)
    dataset = image_args.limit(dataset, shuffle=True)
    labels = dataset["train"].features[image_args.label_column]
    names = dict(enumerate(labels.names))
    classes = {"id2label": names, "label2id": {name: i for i, name in names.items()}}

    if model_args.model_name_or_path:
        others = bool(known) and labels.names != known  # whose readout begins anew if they are more or fewer
        model = model_args.load(AutoModelForImageClassification, **classes, ignore_mismatched_sizes=others)
    else:
        config = model_args.config(
            ARCHITECTURE,
            **SIZES,
            embedding_type="patches",
            is_causal=False,
            **classes,
        )
        model = AutoModelForImageClassification.from_config(config)
    config = model.config
    size = {"height": config.image_size, "width": config.image_size}
    half = [0.5] * config.num_channels
    processor = ViTImageProcessorPil(size=size, image_mean=half, image_std=half)
    print(f"{model.num_parameters():,} parameters, {len(dataset['train']):,} images of {len(labels.names)} classes")

    def still(rows: dict[str, list]) -> dict[str, Any]:
        images = pixels(rows[image_args.image_column], processor, config.num_channels)
        return {"pixel_values": images, "labels": rows[image_args.label_column]}

    def moving(rows: dict[str, list]) -> dict[str, Any]:
        batch = still(rows)
        most = (image_args.max_shift, image_args.max_turn, image_args.max_scale)
        return {**batch, "pixel_values": moved(batch["pixel_values"], *most)}

    inputs = {split: rows.with_transform(moving if split == "train" else still) for split, rows in dataset.items()}
    accuracy = metrics.load("accuracy")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return accuracy.compute(
            predictions=np.argmax(prediction.predictions, axis=-1), references=prediction.label_ids
        )

    trainer = Trainer(
        model,
        training_args,
        train_dataset=inputs["train"],
        eval_dataset=inputs["validation"],
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        callbacks=[StopOnNonFinite()],
    )

    def every_step(predictions: np.ndarray) -> dict[str, float]:
        shares = accuracy_per_step(model, inputs["test"], default_data_collator)
        visualize.accuracy_per_step({"test": shares}, Path(training_args.output_dir) / "accuracy_per_step.png")
        return {f"test_accuracy_step_{step}": share for step, share in enumerate(shares, start=1)}

    results = scripts.fit(trainer, inputs.get("test"), every_step)
    scripts.publish(
        trainer,
        processor,
        {name: value for name, value in results.items() if "accuracy" in name},
        name="Feedback image classifier",
        dataset=image_args.source,
        description=f"Classifies the images of {image_args.source}; every feedback step is another look.",
        command=scripts.command(__file__, arguments),
    )
    return results


if __name__ == "__main__":
    main()
