"""Classify images by looking at them several times: a convolutional cell that feeds its state back.

    python examples/run_image_classification.py                  # MNIST-5k, 98.9 % (see benchmarks/LOG.md)
    python examples/run_image_classification.py --train_file photos
    python examples/run_image_classification.py --model_name_or_path runs/image-classification --do_train false \
        --test_file new_photos                                   # writes predictions.csv

The folder `photos` holds a folder of images for each class: photos/cat, photos/dog. It may hold photos/train/cat,
photos/validation/cat and so on instead. Size and colours are read from the images and printed.

The loss is taken after every feedback step (supervision="all"), so the answer is there early and gets better: the
accuracy after each step is printed, and drawn in accuracy_per_step.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from feedback_transformers import visualize
from feedback_transformers.training import StopOnNonFinite, scripts

import torch
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

RECIPE = scripts.recipes.IMAGES
FEW = 100  # images for validation, below which many checkpoints have the same accuracy and the loss tells them apart


@dataclass
class ImageArguments(scripts.DataArguments):
    image_column: str = field(default="image", metadata={"help": "The column that holds the images, or their paths."})
    label_column: str = field(default="label", metadata={"help": "The column that holds the classes."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels a side that a new model reads; else read from the images, at most 128."},
    )
    num_channels: int | None = field(
        default=None, metadata={"help": "1 for grey, 3 for colours; else read from the images."}
    )
    skip_corrupt_files: bool = field(
        default=False, metadata={"help": "Leave out images that can't be read, and say how many; else they stop."}
    )
    class_weights: Literal["none", "balanced"] = field(
        default="none", metadata={"help": "balanced lets all classes weigh the same in the loss."}
    )
    max_shift: float = field(default=2, metadata={"help": "In training, move images by up to so many pixels,"})
    max_turn: float = field(default=10, metadata={"help": "turn them by up to so many degrees,"})
    max_scale: float = field(default=0.1, metadata={"help": "and resize them by up to this share."})

    @property
    def files(self) -> dict[str, str]:
        """The folders that were given, and those of other splits that lie beside them."""
        return scripts.image_splits(super().files)


def moved(images: torch.Tensor, shift: float, turn: float, scale: float) -> torch.Tensor:
    """Move each of the images [B, C, H, W] by up to `shift` pixels, turn it by up to `turn` degrees, and resize it by
    up to `scale`. The edge is repeated."""
    angle, size, x, y = torch.empty(4, len(images)).uniform_(-1, 1)
    angle, size = torch.deg2rad(turn * angle), 1 + scale * size
    x, y = 2 * shift / images.shape[-1] * x, 2 * shift / images.shape[-2] * y
    cos, sin = angle.cos() * size, angle.sin() * size
    maps = torch.stack([torch.stack([cos, -sin, x], dim=1), torch.stack([sin, cos, y], dim=1)], dim=1)
    grid = torch.nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, ImageArguments, TrainingArguments)
    model_args, image_args, training_args = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    set_seed(training_args.seed)

    # The images and their classes
    column, checkpoint = image_args.image_column, model_args.model_name_or_path
    dataset = image_args.load(labels={"label_column": [image_args.label_column]}, trains=training_args.do_train)
    scripts.check_columns(dataset, texts=False, image_column=column)
    known = scripts.known_targets(model_args, AutoModelForImageClassification)
    dataset, targets = scripts.read_targets(
        dataset, [image_args.label_column], known=known, trains=training_args.do_train
    )
    if len(targets.names) < 2 and targets.problem != "regression":
        raise ValueError(f"There is one class, {targets.names[0]}: give the images of a second one to tell it from.")
    dataset = image_args.limit(dataset, shuffle=True)
    dataset, looks = scripts.readable(dataset, column, image_args.files, image_args.skip_corrupt_files)
    if "validation" not in dataset:
        training_args.do_eval, training_args.eval_strategy = False, "no"
    for split, images in dataset.items():
        print(f"{split}: {len(images):,} images of {image_args.files.get(split, image_args.source)}")
    print(f"An image has {targets}")

    # The model and its image processor
    if checkpoint:
        if image_args.image_size or image_args.num_channels:
            raise ValueError("--image_size and --num_channels are of a new model: leave them out with a checkpoint.")
        others = known is not None and targets != known  # the readout begins anew if it has another size
        model = model_args.load(AutoModelForImageClassification, **targets.labels, ignore_mismatched_sizes=others)
        size, _ = scripts.image_sizes(looks)  # where it was saved without an image processor
    else:
        size, images = scripts.image_sizes(looks, image_args.image_size, image_args.num_channels)
        sizes = {**RECIPE.sizes, "input_config": images, "is_causal": False}
        config = model_args.config(RECIPE.architecture, **sizes, **targets.labels)
        model = AutoModelForImageClassification.from_config(config)
    processor = scripts.image_processor(size, checkpoint, **model_args.hub_options)
    scripts.print_images(looks, processor.size["height"], model.config.input_config.num_channels)
    rows = dataset["train"] if training_args.do_train else next(iter(dataset.values()))
    print(f"{model.num_parameters():,} parameters")
    if image_args.class_weights == "balanced":
        scripts.balance_classes(model, targets, rows["labels"])

    def still(rows: dict[str, list]) -> dict[str, Any]:
        images = processor([scripts.eight_bits(image) for image in rows[column]], return_tensors="pt")
        return {**images, **({"labels": rows["labels"]} if "labels" in rows else {})}

    def moving(rows: dict[str, list]) -> dict[str, Any]:
        batch = still(rows)
        most = (image_args.max_shift, image_args.max_turn, image_args.max_scale)
        return {**batch, "pixel_values": moved(batch["pixel_values"], *most)}

    inputs = {split: rows.with_transform(moving if split == "train" else still) for split, rows in dataset.items()}

    # Training
    if training_args.do_train:
        best = training_args.metric_for_best_model
        if best == "auto":
            few = len(dataset["validation"]) < FEW
            best = "loss" if few else scripts.best_metric(targets, rows["labels"])
        training_args.metric_for_best_model = best
        training_args.greater_is_better = not best.endswith(("loss", "mae", "rmse"))
        print(f"The best checkpoint is the one with the best {best}")

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return scripts.score(targets.problem, prediction.predictions, prediction.label_ids)

    trainer = Trainer(
        model,
        training_args,
        train_dataset=inputs.get("train"),
        eval_dataset=inputs.get("validation"),
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=compute_metrics,
        callbacks=[*scripts.drawn_passes(model_args, model, training_args.do_train), StopOnNonFinite()],
    )
    tested = "test" in dataset and "labels" in dataset["test"].column_names
    metric = "mae" if targets.problem == "regression" else "accuracy"
    results = scripts.fit(trainer, inputs["test"] if tested else None, metric=metric)

    # A report on each class, pictures, and predictions
    output, plots = Path(training_args.output_dir), []
    for split in ("test", "validation"):
        if split not in dataset or not (training_args.do_predict if split == "test" else training_args.do_eval):
            continue
        found = trainer.predict(inputs[split])
        if not trainer.is_world_process_zero():
            continue
        if split == "test":
            names = scripts.image_paths(dataset["test"], column)
            scripts.write_predictions(targets, found.predictions, names, output / "predictions.csv", "image")
        if found.label_ids is not None and not plots:
            plots = scripts.report(targets, found.predictions, found.label_ids, output)
    shares = {name: value for name, value in results.items() if "_accuracy_step_" in name}
    if shares and trainer.is_world_process_zero():
        split = next(iter(shares)).partition("_")[0]
        visualize.accuracy_per_step({split: list(shares.values())}, output / "accuracy_per_step.png")

    if not training_args.do_train and not results:
        return results  # nothing but predictions was asked for
    scripts.publish(
        trainer,
        processor,
        {name: value for name, value in results.items() if any(key in name for key in ("accuracy", "f1", "mae"))},
        name="Feedback image classifier",
        dataset=image_args.source,
        description=f"Classifies the images of {image_args.source}; every feedback step is another look.",
        command=scripts.command(__file__, arguments),
        plots=plots,
    )
    return results


if __name__ == "__main__":
    main()
