"""Classify videos by looking at all frames several times: a convolutional cell over time, height and width.

    python examples/run_video_classification.py                  # which digit moves, and where to
    python examples/run_video_classification.py --train_file clips
    python examples/run_video_classification.py --model_name_or_path runs/video-classification --do_train false \
        --test_file new_clips                                    # writes predictions.csv

The folder `clips` holds a folder of GIFs for each class: clips/jump, clips/run. It may hold clips/train/jump,
clips/validation/jump and so on instead. Of each video --num_frames frames are evenly sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feedback_transformers import visualize
from feedback_transformers.training import StopOnNonFinite, scripts
from feedback_transformers.training.scripts import videos

import numpy as np
from transformers import (
    AutoModelForVideoClassification,
    EvalPrediction,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

RECIPE = scripts.recipes.VIDEOS


@dataclass
class VideoArguments(scripts.DataArguments):
    video_column: str = field(default="video", metadata={"help": "The column that holds the videos, or their paths."})
    label_column: str = field(default="label", metadata={"help": "The column that holds the classes."})
    num_frames: int = field(default=8, metadata={"help": "Frames of each video, evenly sampled."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels a side that a new model reads; else read from the videos, at most 128."},
    )
    num_channels: int | None = field(
        default=None, metadata={"help": "1 for grey, 3 for colours; else read from the videos."}
    )
    patch_size: int = field(default=6, metadata={"help": "Pixels a side of a position of a new model."})
    tubelet_size: int = field(default=2, metadata={"help": "Frames of a position of a new model."})
    skip_corrupt_files: bool = field(
        default=False,
        metadata={"help": "Leave out videos that can't be read or have one frame, and say how many; else they stop."},
    )

    def __post_init__(self) -> None:
        if self.num_frames < 2:
            raise ValueError(f"--num_frames is {self.num_frames}: give at least 2, to see what moves.")

    @property
    def files(self) -> dict[str, str]:
        """The folders that were given, and those of other splits that lie beside them."""
        return scripts.image_splits(super().files)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """Return the data set; GIFs of a folder, which is one of images, are in the column of videos too."""
        dataset, column = super().load(*args, **kwargs), self.video_column
        for split, rows in dataset.items():
            if column not in rows.column_names and "image" in rows.column_names:
                dataset[split] = rows.rename_column("image", column)
        return dataset


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, VideoArguments, TrainingArguments)
    model_args, data_args, training_args = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    set_seed(training_args.seed)

    # The videos and their classes
    column, label, checkpoint = data_args.video_column, data_args.label_column, model_args.model_name_or_path
    dataset = data_args.load(labels={"label_column": [label]}, trains=training_args.do_train)
    scripts.check_columns(dataset, texts=False, video_column=column)
    known = scripts.known_targets(model_args, AutoModelForVideoClassification)
    dataset, targets = scripts.read_targets(dataset, [label], known=known, trains=training_args.do_train)
    if len(targets.names) < 2 and targets.problem != "regression":
        raise ValueError(f"There is one class, {targets.names[0]}: give the videos of a second one to tell it from.")
    dataset = data_args.limit(dataset, shuffle=True)
    dataset, looks = videos.readable_videos(dataset, column, data_args.files, data_args.skip_corrupt_files)
    if "validation" not in dataset:
        training_args.do_eval, training_args.eval_strategy = False, "no"
    for split, rows in dataset.items():
        print(f"{split}: {len(rows):,} videos of {data_args.files.get(split, data_args.source)}")
    print(f"A video has {targets}")

    # The model, and the processor of its frames
    if checkpoint:
        if data_args.image_size or data_args.num_channels:
            raise ValueError("--image_size and --num_channels are of a new model: leave them out with a checkpoint.")
        others = known is not None and targets != known  # the readout begins anew if it has another size
        model = model_args.load(AutoModelForVideoClassification, **targets.labels, ignore_mismatched_sizes=others)
        size, _ = scripts.image_sizes(looks)  # where it was saved without an image processor
    else:
        size, images = scripts.image_sizes(looks, data_args.image_size, data_args.num_channels)
        cells = {"patch_size": data_args.patch_size, "tubelet_size": data_args.tubelet_size}
        sizes = {**RECIPE.sizes, "input_config": {**images, "type": "videos", **cells}}
        model = AutoModelForVideoClassification.from_config(
            model_args.config(RECIPE.architecture, **sizes, **targets.labels)
        )
    processor = scripts.image_processor(size, checkpoint, **model_args.hub_options)
    scripts.print_images(looks, processor.size["height"], model.config.input_config.num_channels, "videos")
    print(f"{data_args.num_frames} frames of each, {model.num_parameters():,} parameters")

    def encode(rows: dict[str, list]) -> dict[str, Any]:
        batch = {"pixel_values": videos.pixels(processor, rows[column], data_args.num_frames)}
        return {**batch, **({"labels": rows["labels"]} if "labels" in rows else {})}

    inputs = {split: videos.undecoded(rows, column).with_transform(encode) for split, rows in dataset.items()}

    # Training
    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        found = scripts.score(targets.problem, prediction.predictions, prediction.label_ids)
        if not data_args.files and data_args.dataset_name == "digit-videos":
            found |= accuracy_of_parts(targets.names, prediction.predictions.argmax(-1), prediction.label_ids)
        return found

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
            names = videos.video_paths(dataset["test"], column)
            scripts.write_predictions(targets, found.predictions, names, output / "predictions.csv", "video")
        if found.label_ids is not None and not plots:
            plots = scripts.report(targets, found.predictions, found.label_ids, output)
    shares = [value for name, value in results.items() if "_accuracy_step_" in name]
    if shares and trainer.is_world_process_zero():
        plots.append(output / "accuracy_per_step.png")
        visualize.accuracy_per_step({data_args.source: shares}, plots[-1])

    if not training_args.do_train and not results:
        return results  # nothing but predictions was asked for
    scripts.publish(
        trainer,
        processor,
        {name: value for name, value in results.items() if any(key in name for key in ("accuracy", "f1", "mae"))},
        name="Feedback video classifier",
        dataset=data_args.source,
        description=f"Classifies the videos of {data_args.source}; every feedback step looks at all frames again.",
        command=scripts.command(__file__, arguments),
        plots=plots,
    )
    return results


def accuracy_of_parts(names: list[str], answers: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return how often each word of the class is right, the digit and the motion of "three left"."""
    parts = np.array([name.split() for name in names])
    right = (parts[answers] == parts[labels]).mean(0)
    return {"accuracy_digit": float(right[0]), "accuracy_motion": float(right[1])}


if __name__ == "__main__":
    main()
