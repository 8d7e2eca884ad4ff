"""Images of one's own: folders, modes, damaged files, sizes and channels, and the pipeline on what is saved."""

import json
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import build
from datasets import Dataset, DatasetDict
from PIL import Image
from test_examples import examples_on_path, run  # noqa: F401 - a fixture
from transformers import AutoConfig, AutoImageProcessor, pipeline
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from feedback_transformers import FeedbackForImageClassification, data
from feedback_transformers.training import scripts
from feedback_transformers.training.scripts.images import Look, image_sizes, image_splits, look_at, read_images

RED, BLUE = (220, 30, 30), (30, 30, 220)
GREY = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


def picture(color=RED, size=(20, 30), seed=0) -> Image.Image:
    """A colour [H, W, 3] with noise; red and blue are equally bright."""
    noise = np.random.default_rng(seed).normal(0, 10, (*size, 3))
    return Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8))


def fill(folder, count=6, ending="png", **colors):
    for name, color in colors.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture(color, (18 + i, 40 - i), i).save(folder / name / f"{i}.{ending}")
    return folder


def script(train, out, *flags, **options):
    return run("run_image_classification", "--train_file", train, "--output_dir", out, *flags, **options)


# The whole way


def test_red_and_blue_photographs_and_the_pipeline(tmp_path, capsys):
    """As a newcomer gives them: no flags for size, channels or splits."""
    folder = fill(tmp_path / "photos", red=RED, blue=BLUE)
    picture(BLUE).save(folder / "blue" / "extra.jpg")
    flags = ["--num_train_epochs", 6, "--learning_rate", 1e-2, "--config_overrides", "hidden_size=16"]
    results = script(folder, tmp_path / "out", *flags)
    assert results["eval_accuracy"] == 1
    said = capsys.readouterr().out
    assert "13 images of 30 x 18 to 40 x 23 pixels, in colour; the model reads them as 20 x 20, in colour" in said
    assert "train: 11 images" in said and "validation: 2 images" in said and "the best loss" in said
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.input_config.num_channels, config.input_config.patch_size) == (3, 2)
    assert config.id2label == {0: "blue", 1: "red"}
    measured = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert {f"eval_accuracy_step_{k}" for k in range(1, 9)} <= measured.keys()
    assert "macro avg" in (tmp_path / "out" / "classification_report.txt").read_text()
    classify = pipeline("image-classification", model=str(tmp_path / "out"))
    found = [classify(str(folder / color / "3.png"))[0]["label"] for color in ("red", "blue")]
    assert found == ["red", "blue"]


def test_the_pipeline_of_grey_images(tmp_path):
    """The script's own default data: the files are grey, and a pipeline opens every file in colour."""
    run("run_image_classification", "--output_dir", tmp_path / "out")
    assert AutoConfig.from_pretrained(tmp_path / "out").input_config.num_channels == 1
    digit = data.load("mnist-5k")["test"]["image"][0]
    digit.save(tmp_path / "digit.png")
    classify = pipeline("image-classification", model=str(tmp_path / "out"), top_k=10)
    found = {answer["label"]: answer["score"] for answer in classify(str(tmp_path / "digit.png"))}
    pixels = torch.tensor(np.asarray(digit, dtype=np.float32) / 127.5 - 1).view(1, 1, 28, 28)
    with torch.no_grad():
        expected = classify.model(pixels.to(classify.model.device)).logits.softmax(-1)[0]
    assert [found[str(label)] for label in range(10)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_grey_model_reads_the_brightness_of_colours():
    model = build(FeedbackForImageClassification, input_config={"type": "images", "num_channels": 1}, is_causal=False)
    image = picture(size=(8, 8))
    colours = torch.tensor(np.asarray(image, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    grey = torch.tensor(np.asarray(image.convert("L"), dtype=np.float32))[None, None] / 127.5 - 1
    assert torch.allclose(model(colours).logits, model(grey).logits, atol=0.01)  # Pillow rounds to whole numbers
    same = model(grey.expand(1, 3, 8, 8)).logits
    assert torch.allclose(same, model(grey).logits, atol=1e-5)
    whole = model((127.5 * colours + 127.5).to(torch.uint8)).logits
    assert torch.allclose(whole, model(127.5 * colours + 127.5).logits, atol=1e-3)


def test_a_split_beside_train_and_images_to_predict(tmp_path, capsys):
    """As train/, validation/ and test/ in one folder, the last without classes; then by the checkpoint alone."""
    for split in ("train", "val"):
        fill(tmp_path / "photos" / split, count=2, red=RED, blue=BLUE)
    fill(tmp_path / "photos", count=3, test=RED)
    out, sizes = tmp_path / "out", ["--config_overrides", "hidden_size=16"]
    script(tmp_path / "photos", out, *sizes, "--image_size", 16, "--num_channels", 1, "--class_weights", "balanced")
    said = capsys.readouterr().out
    assert f"validation: 4 images of {tmp_path / 'photos' / 'val'}" in said and "train: 4 images" in said
    assert "the model reads them as 16 x 16, grey" in said and "Weights: blue 1.00, red 1.00" in said
    lines = (out / "predictions.csv").read_text().splitlines()
    assert lines[0] == "image,prediction,probability" and len(lines) == 4
    assert lines[1].startswith(str(tmp_path / "photos" / "test" / "0.png"))
    asked = ["--model_name_or_path", out, "--do_train", "false", "--output_dir", tmp_path / "again"]
    run("run_image_classification", *asked, "--test_file", tmp_path / "photos" / "test")
    assert (tmp_path / "again" / "predictions.csv").read_text().splitlines() == lines
    with pytest.raises(ValueError, match="are of a new model: leave them out"):
        run("run_image_classification", *asked, "--test_file", tmp_path / "photos" / "test", "--image_size", 8)


def test_a_table_of_paths(tmp_path):
    """Beside the images, in any order, with an image that is missing."""
    fill(tmp_path / "photos", red=RED, blue=BLUE)
    rows = [f"photos/{color}/{i}.png,{color}" for i in range(6) for color in ("red", "blue")]
    (tmp_path / "photos.csv").write_text("\n".join(["image,label", *rows, "photos/red/9.png,red"]))
    flags = ["--config_overrides", "hidden_size=16"]
    with pytest.raises(ValueError, match=r"1 of 13 images can't be read \(.*photos/red/9.png: .*No such file"):
        script(tmp_path / "photos.csv", tmp_path / "out", *flags)
    results = script(tmp_path / "photos.csv", tmp_path / "out", *flags, "--skip_corrupt_files")
    assert "eval_accuracy" in results


# Damaged files


def damaged(folder):
    whole = (folder / "red" / "0.png").read_bytes()
    picture().save(folder / "red" / "half.jpg")
    for name, content in {
        "cut.png": whole[: len(whole) // 2],
        "empty.png": b"",
        "page.jpg": b"<html>404</html>",
        "half.jpg": (folder / "red" / "half.jpg").read_bytes()[:-200],
    }.items():
        (folder / "red" / name).write_bytes(content)


def test_damaged_files_are_named_before_training_and_left_out_by_a_flag(tmp_path, capsys):
    damaged(fill(tmp_path / "photos", red=RED, blue=BLUE))
    sizes = ["--config_overrides", "hidden_size=16"]
    with pytest.raises(ValueError, match="4 of 16 images can't be read") as error:
        script(tmp_path / "photos", tmp_path / "out", *sizes)
    for name in ("cut.png", "empty.png", "page.jpg", "half.jpg"):
        assert str(tmp_path / "photos" / "red" / name) in str(error.value)
    assert "--skip_corrupt_files" in str(error.value) and not (tmp_path / "out").exists()
    script(tmp_path / "photos", tmp_path / "out", *sizes, "--skip_corrupt_files")
    assert "Left out 4 images that can't be read" in capsys.readouterr().out


def test_any_damage_is_found_rather_than_raised():
    """Whatever Pillow raises for it: cut files, and files with other bytes in them."""
    generator = np.random.default_rng(0)
    whole = png(24, 24)
    assert look_at({"bytes": whole, "path": None}).fault is None
    for cut in range(0, len(whole) - 13, 37):  # the last chunk, IEND, holds nothing
        assert look_at({"bytes": whole[:cut], "path": None}).fault
    for place in generator.integers(0, len(whole), 60):
        look_at({"bytes": whole[:place] + bytes([generator.integers(256)]) + whole[place + 1 :], "path": None})
    assert look_at(None).fault and look_at({"bytes": png(1 << 17, 1 << 17), "path": None}).fault


def png(width: int, height: int) -> bytes:
    """A PNG file that says it has this size, with at most 24 rows in it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = np.random.default_rng(0).integers(0, 256, (min(height, 24), 1 + 3 * min(width, 24)), dtype=np.uint8)
    rows[:, 0] = 0
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


# Modes


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_becomes_colours(mode):
    image = picture().convert("L").convert(mode) if mode in ("1", "LA") else picture().convert(mode)
    found = scripts.eight_bits(image)
    assert (found.mode, found.size) == ("RGB", image.size)
    assert np.array_equal(np.asarray(found), np.asarray(image.convert("RGB"))), "as a pipeline reads it"


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled(mode, tmp_path):
    deep = Image.fromarray(GREY.astype(np.uint16) * 256 + 7)
    deep = deep.convert("I").convert(mode) if mode != "I;16" else deep
    assert deep.mode == mode
    assert np.array_equal(np.asarray(scripts.eight_bits(deep))[..., 0], GREY)
    deep.convert("I").save(tmp_path / "deep.tif")
    assert look_at({"bytes": (tmp_path / "deep.tif").read_bytes(), "path": None}).deep


def test_a_palette_with_transparency_is_read_without_a_warning():
    image = picture().convert("P")
    image.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scripts.eight_bits(image).mode == "RGB"
    with pytest.raises(ValueError, match="floating-point numbers of an unknown range"):
        scripts.eight_bits(picture().convert("L").convert("F"))


def test_a_checkpoint_keeps_its_own_image_processor(tmp_path):
    ViTImageProcessorPil(image_mean=[0.1, 0.2, 0.3], image_std=0.25).save_pretrained(tmp_path / "own")
    own = scripts.image_processor(32, str(tmp_path / "own"))
    assert list(own.image_mean) == [0.1, 0.2, 0.3] and own.size["height"] == 224 and own.do_convert_rgb
    ViTImageProcessorPil(image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path / "grey")  # of version 0.1.0
    assert scripts.image_processor(32, str(tmp_path / "grey")).image_mean == 0.5
    scripts.image_processor(32, str(tmp_path / "nothing")).save_pretrained(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"].startswith("ViTImageProcessor")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "new")
    pixels = loaded([picture(), picture().convert("RGBA"), picture().convert("L")], return_tensors="pt")
    assert pixels["pixel_values"].shape == (3, 3, 32, 32)


# Sizes


@pytest.mark.parametrize(
    ("looks", "given", "expected"),
    [
        ([Look(28, 28, grey=True)] * 3, {}, (28, 4, 1)),
        ([Look(4000, 3000)] * 3, {}, (128, 16, 3)),
        ([Look(64, 80), Look(64, 100), Look(900, 900)], {}, (64, 8, 3)),
        ([Look(101, 300)], {}, (96, 8, 3)),
        ([Look(8, 8, grey=True), Look(8, 8)], {}, (8, 1, 3)),
        ([Look(3, 900)], {}, (3, 1, 3)),
        ([Look(50, 50, grey=True)], {"image_size": 224, "num_channels": 3}, (224, 32, 3)),
        ([Look(50, 50)], {"image_size": 32, "num_channels": 1}, (32, 4, 1)),
    ],
)
def test_sizes_are_read_from_the_images(looks, given, expected):
    size, images = image_sizes(looks, **given)
    assert (size, images["patch_size"], images["num_channels"]) == expected


# Folders


def test_folders_that_are_refused(tmp_path):
    fill(tmp_path / "photos", count=2, red=RED, blue=BLUE)
    (tmp_path / "photos" / "green").mkdir()
    with pytest.raises(ValueError, match="class folder .*green holds no images, but no files: fill it or delete it"):
        read_images(str(tmp_path / "photos"))
    (tmp_path / "photos" / "green" / "a.heic").write_bytes(b"phone")
    with pytest.raises(ValueError, match=r"green holds no images, but 1 files of other kinds \(.heic\)"):
        read_images(str(tmp_path / "photos"))
    (tmp_path / "photos" / "green" / "a.heic").rename(tmp_path / "photos" / "red" / "a.heic")
    (tmp_path / "photos" / "green").rmdir()
    picture().save(tmp_path / "photos" / "loose.png")
    with pytest.raises(ValueError, match="1 images lie in .*photos itself, the first loose.png: move them"):
        read_images(str(tmp_path / "photos"))
    fill(tmp_path, count=2, flat=RED)
    with pytest.raises(ValueError, match="flat holds 2 images and no folders: put the images of each class in a fold"):
        read_images(str(tmp_path / "flat"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images: put"):
        read_images(str(tmp_path / "empty"))
    fill(tmp_path / "one", red=RED, count=12)
    with pytest.raises(ValueError, match="There is one class, red"):
        script(tmp_path / "one", tmp_path / "out")


def test_what_lies_between_images_is_left_out(tmp_path, capsys):
    folder = fill(tmp_path / "photos", count=2, red=RED, blue=BLUE)
    picture().save(folder / "red" / "LOUD.JPG", "JPEG")
    (folder / "red" / "deeper").mkdir()
    picture().save(folder / "red" / "deeper" / "0.png")
    for hidden in ("._0.png", ".DS_Store"):
        (folder / "red" / hidden).write_bytes(b"x")
    (folder / "__MACOSX").mkdir()
    (folder / "red" / "notes.txt").write_text("x")
    rows = read_images(str(folder))
    assert rows.features["label"].names == ["blue", "red"] and list(rows["label"]) == [0] * 2 + [1] * 4
    assert "Left out 1 files" in (said := capsys.readouterr().out) and ".txt: 1" in said


def test_splits_that_lie_beside_each_other(tmp_path):
    for name in ("train", "Validation", "test"):
        fill(tmp_path / "photos" / name, count=1, red=RED)
    root = tmp_path / "photos"
    found = {split: str(root / name) for split, name in (("train", "train"), ("validation", "Validation"))}
    found["test"] = str(root / "test")
    assert image_splits({"train": str(root)}) == image_splits({"train": str(root / "train")}) == found
    assert image_splits({"train": str(root / "train"), "test": "x"}) == {**found, "test": "x"}
    (root / "bus").mkdir()  # then these are classes: of vehicles
    assert image_splits({"train": str(root)}) == {"train": str(root)}
    assert image_splits({"train": "a.csv"}) == {"train": "a.csv"} and image_splits({}) == {}


def test_a_column_without_images():
    rows = DatasetDict(train=Dataset.from_dict({"image": [1.0, 2.0]}))
    with pytest.raises(ValueError, match="holds neither images nor paths of images: give --image_column"):
        scripts.readable(rows, "image", {}, False)
    with pytest.raises(ValueError, match="None of the 1 images of the train data can be read"):
        scripts.readable(DatasetDict(train=Dataset.from_dict({"image": ["x.png"]})), "image", {}, True)
