"""Texts about images: made scenes, questions with one answer, and what a model writes behind a question."""

import csv
import json
import re
from functools import cache

import numpy as np
import pytest
import torch
from conftest import EOS, PAD, assert_close, build, tokens
from PIL import Image
from test_examples import examples_on_path, run  # noqa: F401 - a fixture
from test_inputs import IMAGES, PARTS, filled
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    VisionTextDualEncoderProcessor,
    pipeline,
)

from feedback_transformers import FeedbackForConditionalGeneration, data, visualize_images
from feedback_transformers.data import scenes
from feedback_transformers.data.scenes import Scene, caption, questions
from feedback_transformers.training import scripts
from feedback_transformers.training.scripts import captions

read_once = cache(scenes.splits)
SMALL = {"train": 24, "validation": 6, "test": 12}
RED, BLUE = (220, 30, 30), (30, 30, 220)
QUESTION = ["--question_column", "question", "--text_column", "answer"]


def laid_out(*digits):
    """A scene of digits, each given with its left, top, width and height."""
    return Scene(np.zeros((64, 64), np.uint8), [digit for digit, _ in digits], [box for _, box in digits])


# Scenes


def test_captions_of_scenes_made_by_hand():
    eight, three, one = (8, (2, 30, 10, 12)), (3, (30, 28, 10, 12)), (1, (50, 4, 6, 12))
    assert caption(laid_out(eight)) == "an eight"
    assert caption(laid_out(three, eight)) == "an eight left of a three"
    assert caption(laid_out((3, (30, 40, 10, 12)), (1, (34, 4, 6, 12)))) == "a one above a three"
    assert caption(laid_out(three, one, eight)) == "an eight, a three and a one from left to right"
    tall = [(7, (20, 44, 8, 12)), (7, (22, 2, 8, 12)), (0, (18, 24, 8, 12))]
    assert caption(laid_out(*tall)) == "a seven, a zero and a seven from top to bottom"


def test_questions_of_scenes_made_by_hand():
    """Rows of the three and the seven overlap, so that nothing is asked about what is above the seven."""
    made = laid_out((3, (2, 4, 10, 12)), (7, (40, 8, 10, 12)), (1, (22, 44, 6, 12)))
    assert dict(questions(made)) == {
        "how many digits?": "three",
        "what is below the seven?": "one",
        "what is left of the one?": "three",
        "what is right of the one?": "seven",
    }
    twice = laid_out((7, (2, 4, 10, 12)), (7, (40, 6, 10, 12)), (2, (20, 5, 6, 12)))
    assert dict(questions(twice)) == {
        "how many digits?": "three",
        "what is left of the two?": "seven",
        "what is right of the two?": "seven",
    }
    above = laid_out((4, (10, 2, 10, 12)), (5, (12, 30, 10, 12)))
    assert dict(questions(above)) == {
        "how many digits?": "two",
        "what is above the five?": "four",
        "what is below the four?": "five",
    }


def splits():
    """What scenes.splits returns, read once, with generators as they are at first."""
    return {name: (*drawn[:2], np.random.default_rng(scenes.SEEDS[name])) for name, drawn in read_once().items()}


@cache
def pictures_of(split):
    return {picture.tobytes() for picture in read_once()[split][0]}


@pytest.fixture
def few(monkeypatch):
    """Make small splits, and return the scenes that are made."""
    made, original = [], scenes.scene

    def recorded(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(scenes, "COUNTS", SMALL)
    monkeypatch.setattr(scenes, "splits", splits)
    monkeypatch.setattr(scenes, "scene", recorded)
    return made


@pytest.mark.parametrize("name", ["digit-scenes", "digit-captions", "digit-questions", "digit-videos"])
@pytest.mark.parametrize("split", SMALL)
def test_digits_of_a_split_are_those_of_its_split(name, split, monkeypatch):
    """Whatever is cut out for a picture or a video is a digit of that split of MNIST-5k, and of no other."""
    drawn, original = [], scenes.cut_out

    def recorded(picture, side):
        drawn.append(picture.tobytes())
        return original(picture, side)

    monkeypatch.setattr(scenes, "COUNTS", {**dict.fromkeys(SMALL, 0), split: 8})
    monkeypatch.setattr(scenes, "splits", splits)
    monkeypatch.setattr(scenes, "cut_out", recorded)
    assert {each: len(rows) for each, rows in data.load(name).items()} == scenes.COUNTS
    assert len(drawn) >= 8 and set(drawn) <= pictures_of(split)
    assert not any(set(drawn) & pictures_of(other) for other in SMALL if other != split)


def test_made_data_sets(few):
    """Columns and splits; the same when made again; and each question is one of its scene, with its answer."""
    dataset = data.load("digit-questions")
    made = list(few)
    assert {split: (rows.num_rows, str(rows.split)) for split, rows in dataset.items()} == {
        split: (count, split) for split, count in SMALL.items()
    }
    rows = [row for split in dataset.values() for row in split]
    for row, each in zip(rows, made, strict=True):
        assert np.array_equal(row["image"], each.canvas)
        assert 2 <= len(each.digits) <= 3 and row["image"].size == (64, 64)
        assert (row["question"], row["answer"]) in questions(each)
    again = data.load("digit-questions")
    assert all(dataset[split].to_dict() == again[split].to_dict() for split in dataset)
    texts = data.load("digit-captions")
    assert texts["train"].column_names == ["image", "text"] and texts["train"][0]["text"].startswith("a")


# Writing behind a question


@pytest.mark.parametrize("parts", ["transformer", "conv", "along", "converged"])
def test_answers_of_a_batch_are_those_of_each_question(parts):
    fields = {**PARTS[parts], "decoder_type": "transformer", "source_config": IMAGES, "is_encoder_decoder": True}
    ids = {"pad_token_id": PAD, "decoder_start_token_id": 1, "eos_token_id": EOS}
    model, images = filled(build(FeedbackForConditionalGeneration, **fields, **ids)), torch.randn(2, 1, 8, 12)
    asked = [torch.tensor([1, *tokens(1, length, start)[0]]) for length, start in ((7, 20), (3, 50))]
    labels = [torch.tensor([-100] * (len(question) - 1) + [9, 8, EOS]) for question in asked]
    batch = captions.beginnings(
        *(
            torch.nn.utils.rnn.pad_sequence(rows, True, value)
            for rows, value in (([torch.cat([q, torch.tensor([9, 8])]) for q in asked], PAD), (labels, -100))
        ),
        PAD,
    )
    assert batch.tolist() == [asked[0].tolist(), [PAD] * 4 + asked[1].tolist()]
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    written = model.generate(pixel_values=images, decoder_input_ids=batch, **options)
    assert torch.equal(written.sequences[:, :8], batch)
    for row, question in enumerate(asked):
        alone = model.generate(pixel_values=images[[row]], decoder_input_ids=question[None], **options)
        for step, logits in enumerate(alone.logits):
            assert_close(written.logits[step][row], logits[0], 1e-4)
        new = alone.sequences[0, len(question) :].tolist()
        assert written.sequences[row, 8 : 8 + len(new)].tolist() == new
    other = model.generate(pixel_values=images, decoder_input_ids=batch.flip(0), **options)
    assert (other.logits[0] - written.logits[0]).abs().max() > 1e-3, "the question counts"
    logits = model(pixel_values=images, decoder_input_ids=batch).logits
    assert_close(logits[1, 4:], model(pixel_values=images[[1]], decoder_input_ids=asked[1][None]).logits[0], 1e-4)


def test_what_a_model_learns_is_the_answer_alone():
    tokenizer = data.subwords(["how many? two", "a three"], 300)
    writing = captions.Writing(tokenizer, tokenizer.bos_token_id, 5)
    row = writing("two", "how many?")
    count = len(tokenizer("how many?")["input_ids"])
    assert row["labels"][:count].tolist() == [-100] * count and row["labels"][-1] == tokenizer.eos_token_id
    assert len(row["labels"]) <= count + 5 and row["decoder_input_ids"][0] == tokenizer.bos_token_id
    assert row["decoder_input_ids"][1:][count:].tolist() == row["labels"][count:-1].tolist()
    assert writing.texts(row["labels"][None]) == ["two"]
    assert writing(None, "how many?")["decoder_input_ids"].tolist() == row["decoder_input_ids"][: count + 1].tolist()
    assert len(writing("a three " * 9)["labels"]) == 5


def test_the_text_that_needs_no_image():
    rows = {"q": ["a?", "a?", "b?", "b?", "b?"], "t": ["x", "x", "y", "y", "x"]}
    assert captions.without_images(rows, "t", "q", {"q": ["b?", "a?", "new?"]}) == ["y", "x", "x"]
    assert captions.without_images(rows, "t", None, [{}, {}]) == ["x", "x"]


# The whole way


def folder_of(root, count=12, question=False, texts=True):
    """A folder of red and blue images with metadata.jsonl."""
    root.mkdir(parents=True)
    lines = []
    for i in range(count):
        color, name = ((RED, "red"), (BLUE, "blue"))[i % 2]
        Image.new("RGB", (20 + i, 18), color).save(root / f"{i}.png")
        line = {"file_name": f"{i}.png"}
        if question:
            asked = ("what colour is it?", "how many colours?")[i // 2 % 2]
            line |= {"question": asked} | ({"answer": name if "what" in asked else "one"} if texts else {})
        elif texts:
            line["text"] = f"a {name} image"
        lines.append(json.dumps(line) + "\n")
    (root / "metadata.jsonl").write_text("".join(lines))
    return root


def script(train, out, *flags, **options):
    return run("run_captioning", "--train_file", train, "--output_dir", out, *flags, **options)


def lines_of(file):
    return file.read_text().splitlines()


def test_captions_of_a_folder(tmp_path, capsys):
    """Train, reload both processors, caption loose images by the checkpoint alone, and run the card's snippet."""
    folder, out = folder_of(tmp_path / "photos"), tmp_path / "out"
    results = script(folder, out, "--test_file", folder_of(tmp_path / "test", 4), "--max_steps", 2)
    assert {"test_exact_match", "test_exact_match_without_the_image"} <= results.keys()
    assert {f"test_exact_match_step_{k}" for k in range(1, 7)} <= results.keys()
    assert "the model reads them as 18 x 18, in colour" in capsys.readouterr().out
    assert AutoImageProcessor.from_pretrained(out).size["height"] == 18
    assert len(AutoTokenizer.from_pretrained(out)) == AutoConfig.from_pretrained(out).vocab_size
    written = lines_of(out / "predictions.csv")
    assert written[0] == "image,text" and len(written) == 5
    with Image.open(out / "captions_over_steps.png") as picture:
        assert picture.width > picture.height
    (tmp_path / "test" / "metadata.jsonl").unlink()
    asked = ["--model_name_or_path", out, "--do_train", "false", "--output_dir", tmp_path / "again"]
    assert run("run_captioning", *asked, "--test_file", tmp_path / "test") == {}
    assert lines_of(tmp_path / "again" / "predictions.csv") == written
    (said,) = pipeline("image-text-to-text", model=str(out))(str(tmp_path / "test" / "0.png"), text="")
    assert " ".join(said["generated_text"].split()) == next(csv.reader(written[1:]))[1]
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-to-text" in card and "AutoModelForImageTextToText" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("<this repository>", str(out)).replace("picture.png", str(folder / "0.png"))
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.startswith("<s>")


def test_questions_are_learned_and_the_pipeline_answers(tmp_path):
    """Both the image and the question tell the answer."""
    folder, out = folder_of(tmp_path / "photos", 16, question=True), tmp_path / "out"
    flags = ["--validation_file", folder, "--test_file", folder, "--num_train_epochs", 30, "--learning_rate", 1e-2]
    flags += ["--save_strategy", "no", "--load_best_model_at_end", "false", "--eval_strategy", "no"]
    flags += ["--max_train_samples", 16, "--max_eval_samples", 16]
    flags += ["--config_overrides", "hidden_size=32,intermediate_size=64,num_feedback_steps=2,num_encoder_layers=1"]
    results = script(folder, out, *QUESTION, *flags)
    assert results["test_exact_match"] == 1 and results["test_exact_match_without_the_image"] == 0.75
    written = lines_of(out / "predictions.csv")
    assert written[0] == "image,question,text" and written[2].endswith("1.png,what colour is it?,blue")
    pipe = pipeline("image-text-to-text", model=str(out))
    answers = {"what colour is it?": "red", "how many colours?": "one"}
    for asked, answer in answers.items():
        (found,) = pipe(str(folder / "0.png"), text=asked)
        assert found["generated_text"] == f"{asked} {answer}"
    together = pipe([str(folder / "0.png")] * 2, text=list(answers))
    assert [found["generated_text"] for found in together] == [" ".join(pair) for pair in answers.items()]
    assert isinstance(AutoProcessor.from_pretrained(out), VisionTextDualEncoderProcessor)
    new = folder_of(tmp_path / "new", 16, question=True, texts=False)
    asked = ["--model_name_or_path", out, "--do_train", "false", "--test_file", new, "--max_eval_samples", 16]
    assert run("run_captioning", *asked, *QUESTION, "--output_dir", tmp_path / "again") == {}
    ends = [
        [line.partition(".png")[2] for line in lines_of(each / "predictions.csv")]
        for each in (out, new.parent / "again")
    ]
    assert ends[0] == ends[1]


def test_questions_about_digits(few, tmp_path):
    results = run("run_captioning", "--dataset_name", "digit-questions", *QUESTION, "--output_dir", tmp_path)
    assert 0 <= results["test_exact_match_without_the_image"] <= 1
    assert lines_of(tmp_path / "predictions.csv")[1].startswith("row 0,")
    assert AutoConfig.from_pretrained(tmp_path).source_config.num_channels == 1


def test_the_picture_of_captions(tmp_path):
    tokenizer = data.subwords(["how many $? two"], 300)
    processor = VisionTextDualEncoderProcessor(scripts.image_processor(8), tokenizer)
    ids = {"pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 3, "vocab_size": 300}
    model = build(FeedbackForConditionalGeneration, source_config="images", is_encoder_decoder=True, **ids)
    model.generation_config.max_new_tokens = 3
    images = [Image.new("RGB", (9, 9), color) for color in (RED, BLUE)]
    figure = visualize_images.captions_over_steps(
        model, processor, images, tmp_path / "it.png", ["how many $?", "a"], num_feedback_steps=4
    )
    shown = [axis.texts[0].get_text() for axis in figure.axes]
    assert len(shown) == 2 and all(re.findall(r"^(\d): ", text, re.M) == list("1234") for text in shown)
    assert figure.axes[0].get_title() == r"how many \$?" and (tmp_path / "it.png").stat().st_size > 500
    along = build(
        FeedbackForConditionalGeneration, source_config="images", is_encoder_decoder=True, feedback_axis="time", **ids
    )
    with pytest.raises(ValueError, match="There is one step to show"):
        visualize_images.captions_over_steps(along, processor, images)


# What is wrong, in one sentence


def test_folders_that_are_refused(tmp_path):
    folder, out = folder_of(tmp_path / "photos"), tmp_path / "out"
    with pytest.raises(ValueError, match="has no column 'caption', only 'image', 'text': give --text_column"):
        script(folder, out, "--text_column", "caption")
    with pytest.raises(ValueError, match="has no column 'question', only .*: give --question_column"):
        script(folder, out, "--question_column", "question")
    lines = lines_of(folder / "metadata.jsonl")
    (folder / "metadata.jsonl").write_text("\n".join([*lines[:3], json.dumps({"file_name": "3.png"}), *lines[4:]]))
    with pytest.raises(ValueError, match=r"1 of 12 rows .* has no text \(line 4\): fill them, or leave them out"):
        script(folder, out)
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "5.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"1 of 12 images can't be read \(.*5.png"):
        script(folder, out)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match="photos has no metadata.jsonl: write one with a line such as"):
        script(folder, out)
    assert not (out / "model.safetensors").exists()


def test_checkpoints_that_are_refused(tmp_path):
    ids = {"pad_token_id": PAD, "decoder_start_token_id": 1, "eos_token_id": EOS}
    build(FeedbackForConditionalGeneration, is_encoder_decoder=True, **ids).save_pretrained(tmp_path / "texts")
    folder = folder_of(tmp_path / "photos")
    with pytest.raises(ValueError, match="texts reads input_ids: give a model with a source of images"):
        script(folder, tmp_path / "out", "--model_name_or_path", tmp_path / "texts")
    with pytest.raises(ValueError, match="are of a new model: leave them out"):
        script(folder, tmp_path / "out", "--model_name_or_path", tmp_path / "texts", "--image_size", 8)
