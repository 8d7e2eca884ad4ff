"""Write about images: captions, or answers to questions. Every feedback step looks at the image again.

    python examples/run_captioning.py                            # "a three above a seven", made of real digits
    python examples/run_captioning.py --dataset_name digit-questions --question_column question --text_column answer \
        --output_dir runs/questions                              # "what is left of the seven?" "three"
    python examples/run_captioning.py --train_file photos        # a folder with metadata.jsonl, as below
    python examples/run_captioning.py --model_name_or_path runs/captioning --do_train false \
        --test_file new_photos                                   # writes predictions.csv

A line of photos/metadata.jsonl: {"file_name": "1.jpg", "text": "a cat on a chair"}, and for questions one column more.

A question is the beginning of what the model writes. It is not learned, and at generation it is given as
decoder_input_ids. The share of texts that are written exactly stands beside that of the most common text (to the same
question), which needs no image.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feedback_transformers import data, visualize_images
from feedback_transformers.training import StopOnNonFinite, scripts
from feedback_transformers.training.scripts import captions

from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    EvalPrediction,
    Seq2SeqTrainingArguments,
    VisionTextDualEncoderProcessor,
    set_seed,
)

RECIPE = scripts.recipes.CAPTIONS


@dataclass
class CaptionArguments(scripts.DataArguments):
    image_column: str = field(default="image", metadata={"help": "The column that holds the images, or their paths."})
    text_column: str = field(default="text", metadata={"help": "The column that holds what is written."})
    question_column: str | None = field(
        default=None, metadata={"help": "The column of questions about the images, which the texts answer."}
    )
    vocab_size: int = field(default=1024, metadata={"help": "The most tokens of the tokenizer of a new model."})
    max_target_length: int = field(default=64, metadata={"help": "Longer texts are cut; none longer is written."})
    num_beams: int = field(default=1, metadata={"help": "1 writes greedily."})
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

    @property
    def files(self) -> dict[str, str]:
        """The folders that were given, and those of other splits that lie beside them."""
        return scripts.image_splits(super().files)

    def read(self, words: bool = False) -> Any:
        """Return the data, with a text in every row, and a question where there are some; a test may lack texts."""
        for split in ("train", "validation"):
            captions.check_folder(self.files.get(split))
        dataset = super().read(words=True)
        return captions.with_texts(dataset, self.text_column, self.question_column, self.files, self.drop_empty_rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, CaptionArguments, Seq2SeqTrainingArguments)
    model_args, data_args, training_args = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    training_args.predict_with_generate, training_args.remove_unused_columns = True, False
    training_args.generation_num_beams = data_args.num_beams
    set_seed(training_args.seed)

    # The images, and what is written about them
    checkpoint, options, trains = model_args.model_name_or_path, model_args.hub_options, training_args.do_train
    image, text, question = data_args.image_column, data_args.text_column, data_args.question_column
    dataset = data_args.load(trains=trains)
    scripts.check_columns(dataset, texts=False, image_column=image)
    dataset = data_args.limit(dataset, shuffle=True)
    dataset, looks = scripts.readable(dataset, image, data_args.files, data_args.skip_corrupt_files)
    for split, rows in dataset.items():
        print(f"{split}: {len(rows):,} images of {data_args.files.get(split, data_args.source)}")
    if "validation" not in dataset:
        training_args.do_eval, training_args.eval_strategy = False, "no"

    # The model, and its processor of images and texts
    if checkpoint:
        if data_args.image_size or data_args.num_channels:
            raise ValueError("--image_size and --num_channels are of a new model: leave them out with a checkpoint.")
        model = model_args.load(AutoModelForImageTextToText)
        if model.main_input_name != "pixel_values":
            raise ValueError(f"{checkpoint} reads {model.main_input_name}: give a model with a source of images.")
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
        size, _ = scripts.image_sizes(looks)  # where it was saved without an image processor
    else:
        train = dataset["train"]
        asked = [] if question is None else [*train[question], *(f" {each}" for each in train[text])]
        tokenizer = data.subwords([*train[text], *asked], data_args.vocab_size)
        size, images = scripts.image_sizes(looks, data_args.image_size, data_args.num_channels)
        config = model_args.config(
            RECIPE.architecture,
            **RECIPE.sizes,
            is_encoder_decoder=True,
            source_config=images,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.bos_token_id,
        )
        model = AutoModelForImageTextToText.from_config(config)
    scripts.set_max_length(tokenizer, model)
    model.generation_config.max_new_tokens = data_args.max_target_length
    processor = VisionTextDualEncoderProcessor(scripts.image_processor(size, checkpoint, **options), tokenizer)
    height = processor.image_processor.size["height"]
    scripts.print_images(looks, height, getattr(model.config.source_config, "num_channels", 3))
    print(f"{len(tokenizer):,} tokens, {model.num_parameters():,} parameters")
    writing = captions.Writing(tokenizer, model.config.decoder_start_token_id, data_args.max_target_length)

    def encode(rows: dict[str, list]) -> dict[str, Any]:
        pictures = [scripts.eight_bits(each) for each in rows[image]]
        batch = {"pixel_values": processor.image_processor(pictures, return_tensors="pt")["pixel_values"]}
        nothing = [None] * len(pictures)
        pairs = zip(rows.get(text, nothing), rows.get(question, nothing), strict=True)
        encoded = [writing(*pair) for pair in pairs]
        return {**batch, **{name: [each[name] for each in encoded] for name in encoded[0]}}

    inputs = {split: rows.with_transform(encode) for split, rows in dataset.items()}

    # Training
    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        found, known = writing.texts(prediction.predictions), writing.texts(prediction.label_ids)
        return {"exact_match": captions.exact_match(found, known)}

    trainer = captions.CaptionTrainer(
        model,
        training_args,
        train_dataset=inputs.get("train"),
        eval_dataset=inputs.get("validation"),
        processing_class=processor,
        data_collator=writing.collate,
        compute_metrics=compute_metrics,
        callbacks=[*scripts.drawn_passes(model_args, model, trains), StopOnNonFinite()],
    )
    written: list[str] = []

    def compare(predictions: Any) -> dict[str, float]:
        written.extend(writing.texts(predictions))
        if "train" not in dataset:
            return {}
        blind = captions.without_images(dataset["train"], text, question, dataset["test"])
        return {"test_exact_match_without_the_image": captions.exact_match(blind, list(dataset["test"][text]))}

    known = "test" in dataset and text in dataset["test"].column_names
    results = scripts.fit(trainer, inputs["test"] if known else None, compare, "exact_match")
    if "test" in dataset and training_args.do_predict and not known:
        written = writing.texts(trainer.predict(inputs["test"]).predictions)
    if not trainer.is_world_process_zero():
        return results

    # Pictures and predictions
    output, last = Path(training_args.output_dir), dataset["test" if "test" in dataset else next(iter(dataset))]
    plots = []
    if model.config.in_passes:
        plots.append(output / "captions_over_steps.png")
        shown = [scripts.eight_bits(each) for each in last[:4][image]]
        asked = None if question is None else last[:4][question]
        visualize_images.captions_over_steps(model, processor, shown, plots[-1], asked)
    if written:
        write_texts(dataset["test"], image, question, written, output / "predictions.csv")
    if not trains and not results:
        return results  # nothing but predictions was asked for
    scripts.publish(
        trainer,
        processor,
        {name: value for name, value in results.items() if "exact_match" in name},
        name="Feedback captions" if question is None else "Feedback answers about images",
        dataset=data_args.source,
        description=f"Trained on the images and texts of {data_args.source}.",
        command=scripts.command(__file__, arguments),
        plots=plots,
    )
    return results


def write_texts(rows: Any, image: str, question: str | None, written: list[str], file: Path) -> None:
    """Write a line for each image: its path, the question if there is one, and what the model writes."""
    names, asked = scripts.image_paths(rows, image), [] if question is None else [rows[question]]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as table:
        lines = csv.writer(table)
        lines.writerow(["image", *(["question"] * len(asked)), "text"])
        lines.writerows(zip(names, *asked, written, strict=True))
    print(f"{len(written):,} texts are in {file}")


if __name__ == "__main__":
    main()
