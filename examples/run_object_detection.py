"""Find objects by looking several times: every pass refines classes and boxes, which are fed back.

    python examples/run_object_detection.py                        # 1 to 5 digits on canvases of several sizes
    python examples/run_object_detection.py --train_file photos    # a folder with metadata.jsonl, as below
    python examples/run_object_detection.py --model_name_or_path runs/object-detection --do_train false \
        --test_file new_photos                                     # writes predictions.csv

A line of photos/metadata.jsonl: {"file_name": "1.jpg", "objects": {"bbox": [[left, top, width, height]], "category":
["cat"]}}, in pixels. Boxes are cut at the edges of their image.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feedback_transformers import visualize_images
from feedback_transformers.training import StopOnNonFinite, scripts
from feedback_transformers.training.scripts import objects

import torch
from transformers import AutoModelForObjectDetection, EvalPrediction, Trainer, TrainingArguments, set_seed

RECIPE = scripts.recipes.OBJECTS


@dataclass
class DetectionArguments(scripts.DataArguments):
    objects_column: str = field(
        default="objects", metadata={"help": "The column with `bbox` and `category` of the objects of each image."}
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Shrink or enlarge images so that their longer side has so many pixels."}
    )
    patch_size: int = field(default=4, metadata={"help": "Pixels a side of a cell of a new model."})
    drop_bad_boxes: bool = field(
        default=False, metadata={"help": "Leave out boxes without an area in their image; else they stop."}
    )
    skip_corrupt_files: bool = field(
        default=False, metadata={"help": "Leave out images that can't be read, and say how many; else they stop."}
    )
    threshold: float = field(default=0.5, metadata={"help": "The least score of an object in predictions.csv."})


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, DetectionArguments, TrainingArguments)
    model_args, data_args, training_args = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    set_seed(training_args.seed)
    training_args.remove_unused_columns, training_args.eval_do_concat_batches = False, False

    # The images and their objects
    column, checkpoint = data_args.objects_column, model_args.model_name_or_path
    dataset = data_args.limit(data_args.load(trains=training_args.do_train), shuffle=True)
    dataset, looks = scripts.readable(dataset, "image", data_args.files, data_args.skip_corrupt_files)
    known = {split: rows for split, rows in dataset.items() if column in rows.column_names}
    if training_args.do_train and "train" not in known:
        raise ValueError(f"The data has no column {column!r}: give --objects_column.")
    model = model_args.load(AutoModelForObjectDetection) if checkpoint else None
    key = objects.category_key(known, column) if known else "category"
    if model is None:
        names = objects.class_names(known, column, key)
        grey = all(look.grey for look in looks)
        images = {"type": "images", "patch_size": data_args.patch_size, "num_channels": 1 if grey else 3}
        sizes = {**RECIPE.sizes, "input_config": images, "id2label": dict(enumerate(names))}
        model = AutoModelForObjectDetection.from_config(model_args.config(RECIPE.architecture, **sizes))
    names = list(model.config.id2label.values())
    numbered = objects.numbered_names(known, column, key) if known else None
    boxes = objects.Boxes(names, column, key, data_args.drop_bad_boxes, numbered)
    annotated = {split: boxes.check(rows, split) for split, rows in known.items()}
    for split, rows in dataset.items():
        count = f", {sum(map(len, annotated[split])):,} objects" if split in annotated else ""
        print(f"{split}: {len(rows):,} images{count}")
    if boxes.cut or boxes.dropped:
        print(f"{boxes.cut:,} boxes were cut at the edge of their image, and {len(boxes.dropped):,} left out")
    processor = objects.detection_processor(checkpoint, data_args.image_size, **model_args.hub_options)
    print(f"{len(names)} classes; {model.num_parameters():,} parameters")

    def encoded(split: str) -> Any:
        rows, found = dataset[split], annotated.get(split)
        numbered = rows.select_columns("image").add_column("number", list(range(len(rows))))

        def transform(batch: dict[str, list]) -> dict[str, list]:
            own = None if found is None else [found[number] for number in batch["number"]]
            return objects.encode(processor, batch["image"], own)

        return numbered.with_transform(transform)

    inputs = {split: encoded(split) for split in dataset}
    if "validation" not in inputs:
        training_args.do_eval, training_args.eval_strategy = False, "no"

    # Training
    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return objects.average_precision(prediction.predictions, prediction.label_ids)

    trainer = Trainer(
        model,
        training_args,
        train_dataset=inputs.get("train"),
        eval_dataset=inputs.get("validation"),
        processing_class=processor,
        data_collator=objects.collate,
        compute_metrics=compute_metrics,
        callbacks=[*scripts.drawn_passes(model_args, model, training_args.do_train), StopOnNonFinite()],
    )
    results = scripts.fit(trainer, inputs["test"] if "test" in annotated else None, metric="map_50")
    if not trainer.is_world_process_zero():
        return results

    # Pictures and predictions
    output = Path(training_args.output_dir)
    last = "test" if "test" in dataset else next(iter(dataset))
    plots = []
    for number, image in enumerate(dataset[last]["image"][:3]):
        plots.append(output / f"boxes_{number}.png")
        visualize_images.boxes_over_steps(model, processor, scripts.eight_bits(image), plots[-1])
    if "test" in dataset and training_args.do_predict:
        paths = scripts.image_paths(dataset["test"], "image")
        write_boxes(model, processor, dataset["test"]["image"], paths, data_args.threshold, output / "predictions.csv")
    if not training_args.do_train and not results:
        return results  # nothing but predictions was asked for
    scripts.publish(
        trainer,
        processor,
        {name: value for name, value in results.items() if "map" in name},
        name="Feedback object detector",
        dataset=data_args.source,
        description=f"Finds the objects of {data_args.source}; every feedback step refines classes and boxes.",
        command=scripts.command(__file__, arguments),
        plots=plots,
    )
    return results


@torch.no_grad()
def write_boxes(model: Any, processor: Any, images: Any, names: list[str], threshold: float, file: Path) -> None:
    """Write a line for each object found: image, class, score, and left, top, right and bottom in pixels."""
    with file.open("w", newline="", encoding="utf-8") as text:
        lines = csv.writer(text)
        lines.writerow(["image", "label", "score", "left", "top", "right", "bottom"])
        for name, image in zip(names, images, strict=True):
            pixels = objects.encode(processor, [image], None)["pixel_values"][0][None]
            outputs = model.eval()(pixels.to(model.device))
            (found,) = processor.post_process_object_detection(outputs, threshold, [image.size[::-1]])
            for score, label, box in zip(*(found[key].tolist() for key in ("scores", "labels", "boxes")), strict=True):
                lines.writerow([name, model.config.id2label[label], f"{score:.4f}", *(f"{x:.1f}" for x in box)])
    print(f"Predictions are in {file}")


if __name__ == "__main__":
    main()
