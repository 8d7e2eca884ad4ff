"""Make images of images: larger ones, ones without noise, or ones without holes. Every pass changes what is added.

    python examples/run_image_to_image.py                                   # photographs, twice as large a side
    python examples/run_image_to_image.py --task denoising --noise 25
    python examples/run_image_to_image.py --task inpainting --train_file photos   # a folder of images of any sizes

The given image is made of the real one. It is shrunk (Pillow's bicubic), or gets Gaussian noise, or holes, which are
grey rectangles; nothing else tells the model where they are. The script prints the peak signal-to-noise ratio of each
pass (PSNR, in dB; higher is better), and that of a baseline: the bicubic enlargement, or the given image itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from feedback_transformers import visualize_images
from feedback_transformers.training import StopOnNonFinite, scripts
from feedback_transformers.training.scripts import pairs

import torch
from datasets import DatasetDict
from torch import Tensor
from transformers import AutoModelForImageToImage, EvalPrediction, Trainer, TrainingArguments, set_seed

RECIPE = scripts.recipes.IMAGE_TO_IMAGE


@dataclass
class ImageToImageArguments(scripts.DataArguments):
    task: str = field(default="super-resolution", metadata={"help": f"One of {', '.join(pairs.TASKS)}."})
    upscale: int | None = field(
        default=None, metadata={"help": "For super-resolution, how many times as large a side: 2, the default, or 4."}
    )
    noise: float | None = field(
        default=None, metadata={"help": "For denoising, the standard deviation of the noise in 8-bit steps; else 25."}
    )
    crop: int = field(default=64, metadata={"help": "Train on random squares of the images, so many pixels a side,"})
    crops_per_image: int = field(default=32, metadata={"help": "and on so many of each image in an epoch."})
    eval_crop: int = field(
        default=1024, metadata={"help": "Evaluate on the center of the images, at most so many pixels a side."}
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "Pixels a side of a cell of a new model; else 1 for super-resolution, or 2."}
    )
    image_column: str = field(default="image", metadata={"help": "The column that holds the images, or their paths."})
    skip_corrupt_files: bool = field(
        default=False, metadata={"help": "Leave out images that can't be read, and say how many; else they stop."}
    )
    skip_small_images: bool = field(
        default=False, metadata={"help": "Leave out images smaller than the crop, and say how many; else they stop."}
    )

    @property
    def files(self) -> dict[str, str]:
        """The folders that were given, and those of other splits that lie beside them."""
        return scripts.image_splits(super().files)

    def read(self, words: bool = False) -> DatasetDict:
        """Read folders of images, whatever the folders in them mean, and other data as all scripts do."""
        if self.files and all(Path(name).is_dir() for name in self.files.values()):
            return DatasetDict({split: scripts.read_plain_images(name) for split, name in self.files.items()})
        return super().read(words)

    def check_crops(self, upscale: int) -> None:
        """Raise ValueError for sizes that no image can have."""
        for name, least in {"crop": upscale, "eval_crop": upscale, "crops_per_image": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}: give at least {least}.")
        if self.crop % upscale:
            raise ValueError(f"--crop is {self.crop}: give a multiple of the upscale, {upscale}.")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, ImageToImageArguments, TrainingArguments)
    model_args, data_args, training_args = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    set_seed(training_args.seed)
    training_args.remove_unused_columns, training_args.eval_do_concat_batches = False, False

    # The task
    column, checkpoint = data_args.image_column, model_args.model_name_or_path
    model = model_args.load(AutoModelForImageToImage) if checkpoint else None
    trained = None if model is None else model.config.upscale
    maker = pairs.maker(data_args.task, data_args.upscale, data_args.noise, trained)
    data_args.check_crops(maker.upscale)

    # The images
    dataset = data_args.limit(data_args.load(trains=training_args.do_train), shuffle=True)
    scripts.check_columns(dataset, texts=False, image_column=column)
    dataset, looks = scripts.readable(dataset, column, data_args.files, data_args.skip_corrupt_files)
    rest = list(looks)
    for split, rows in dataset.items():
        sizes, rest = [(look.width, look.height) for look in rest[: len(rows)]], rest[len(rows) :]
        least, names = data_args.crop if split == "train" else maker.upscale, scripts.image_paths(rows, column)
        large = pairs.large_enough(sizes, names, least, data_args.skip_small_images)
        dataset[split] = rows.select(large).select_columns(column)
        print(f"{split}: {len(large):,} images of {data_args.files.get(split, data_args.source)}")

    # The model
    if model is None:
        patch = data_args.patch_size or (1 if maker.upscale > 1 else 2)
        channels = 1 if all(look.grey for look in looks) else 3
        images = {"type": "images", "patch_size": patch, "num_channels": channels}
        sizes = {**RECIPE.sizes, "input_config": images, "upscale": maker.upscale}
        model = AutoModelForImageToImage.from_config(model_args.config(RECIPE.architecture, **sizes))
    maker.channels = model.config.input_config.num_channels
    processor = pairs.pixel_processor(checkpoint, **model_args.hub_options)
    print(f"{maker}; {model.num_parameters():,} parameters")

    def cropped(batch: dict[str, list]) -> dict[str, list[Tensor]]:
        return columns([maker.pair(pairs.random_crop(image, data_args.crop)) for image in batch[column]])

    def still(batch: dict[str, list]) -> dict[str, list[Tensor]]:
        """The noise and the holes of an image are the same each time."""
        numbered = zip(batch[column], batch["number"], strict=True)
        images = [(pairs.center(image, data_args.eval_crop, maker.upscale), number) for image, number in numbered]
        return columns([maker.pair(image, torch.Generator().manual_seed(number)) for image, number in images])

    def columns(made: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
        return {name: [pair[name] for pair in made] for name in made[0]}

    inputs = {}
    for split, rows in dataset.items():
        if split == "train":
            inputs[split] = rows.select([*range(len(rows))] * data_args.crops_per_image).with_transform(cropped)
        else:
            inputs[split] = rows.add_column("number", [*range(len(rows))]).with_transform(still)
    if "validation" not in inputs:
        training_args.do_eval, training_args.eval_strategy = False, "no"

    # Training
    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return pairs.mean_psnr(prediction.predictions, prediction.label_ids, maker)

    trainer = Trainer(
        model,
        training_args,
        train_dataset=inputs.get("train"),
        eval_dataset=inputs.get("validation"),
        processing_class=processor,
        data_collator=pairs.collate,
        compute_metrics=compute_metrics,
        callbacks=[*scripts.drawn_passes(model_args, model, training_args.do_train), StopOnNonFinite()],
    )
    results = scripts.fit(trainer, inputs.get("test"), metric="psnr")
    if not trainer.is_world_process_zero() or not results:
        return results

    # Pictures
    plots, shown = [], inputs.get("test", inputs.get("validation", inputs.get("train")))
    for number in range(min(3, len(shown))):
        plots.append(Path(training_args.output_dir) / f"images_{number}.png")
        pair = shown[number]
        visualize_images.images_over_steps(model, pair["pixel_values"], pair["labels"], plots[-1])
    scripts.publish(
        trainer,
        processor,
        {name: value for name, value in results.items() if "psnr" in name},
        name="Feedback image-to-image model",
        dataset=data_args.source,
        description=f"{str(maker).capitalize()}; every feedback step changes what is added to the image.",
        command=scripts.command(__file__, arguments),
        plots=plots,
    )
    return results


if __name__ == "__main__":
    main()
