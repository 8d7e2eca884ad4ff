"""Image to image: the photographs, the pairs that are made of them, the PSNR, the head, and the script."""

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import assert_close, build
from PIL import Image
from test_examples import examples_on_path, run  # noqa: F401 - a fixture
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageToImage

from feedback_transformers import FeedbackForImageToImage, data
from feedback_transformers.data import packages
from feedback_transformers.data.photographs import PHOTOGRAPHS
from feedback_transformers.training.scripts import pairs, recipes
from feedback_transformers.training.scripts.images import read_plain_images
from feedback_transformers.training.scripts.objects import padded

SIZES = (6, 9), (8, 5), (3, 4)  # height and width
IMAGES = {"input_config": {"type": "images", "patch_size": 1, "num_channels": 3}, "pad_token_id": None}


def picture(width=40, height=28, mode="RGB", seed=0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height)).convert(mode)


def fill(folder, count=12):
    """Images of several sizes, modes and endings, some of them deeper."""
    (folder / "deeper").mkdir(parents=True)
    for number in range(count):
        mode, ending = [("RGB", "png"), ("L", "jpg"), ("RGBA", "png"), ("P", "gif")][number % 4]
        place = folder / "deeper" if number % 3 == 0 else folder
        picture(24 + 4 * number, 60 - 3 * number, mode, number).save(place / f"{number}.{ending}")
    return folder


def script(out, *flags, **options):
    return run("run_image_to_image", "--output_dir", out, *flags, **options)


def model_of(**fields) -> FeedbackForImageToImage:
    return build(FeedbackForImageToImage, **{**recipes.IMAGE_TO_IMAGE.architecture, **IMAGES, **fields})


# The photographs


def test_no_photograph_is_in_two_splits():
    dataset = data.load("photographs")
    found = {
        split: {hashlib.sha256(np.asarray(x)).hexdigest() for x in rows["image"]} for split, rows in dataset.items()
    }
    assert all(image.mode == "RGB" and min(image.size) >= 191 for rows in dataset.values() for image in rows["image"])
    names = {split: {name for each in packages.values() for name in each} for split, packages in PHOTOGRAPHS.items()}
    for sets in (found, names):
        assert [len(sets[split]) for split in ("train", "validation", "test")] == [12, 2, 3]
        assert len(set.union(*sets.values())) == 17
    assert not any("motorcycle_right" in name for each in names.values() for name in each), "the same scene"


def test_a_missing_package_of_the_extra(monkeypatch):
    monkeypatch.setattr(packages, "find", lambda *_: None)
    with pytest.raises(ImportError, match="scikit-learn, which is missing: run `python -m pip install scikit-learn`"):
        packages.file("scikit-learn", "sklearn/datasets/images/china.jpg")


# The pairs


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("task", "upscale", "given"),
    [("super-resolution", 2, (14, 20)), ("super-resolution", 4, (7, 10)), ("denoising", 1, (28, 40))],
)
def test_sizes_and_values_of_a_pair(task, upscale, given, channels):
    made = pairs.Pairs(task, upscale, 25, channels).pair(picture())
    assert made["pixel_values"].shape == (channels, *given) and made["labels"].shape == (channels, 28, 40)
    assert all(pixels.min() >= 0 and pixels.max() <= 1 and pixels.std() > 0.05 for pixels in made.values())


def test_the_shrunk_image_is_pillows():
    image = picture()
    made = pairs.Pairs("super-resolution", 2).pair(image)["pixel_values"]
    small = np.asarray(image.resize((20, 14), Image.Resampling.BICUBIC))
    assert np.array_equal((255 * made).round().numpy(), small.transpose(2, 0, 1))


def test_noise_has_its_deviation_and_is_drawn_anew_without_a_seed():
    grey = Image.new("RGB", (128, 128), (128, 128, 128))
    maker = pairs.Pairs("denoising", noise=25)
    made, other = maker.pair(grey), maker.pair(grey)
    assert (made["pixel_values"] - made["labels"]).std().item() == pytest.approx(25 / 255, rel=0.02)
    assert not torch.equal(made["pixel_values"], other["pixel_values"])
    one, same = (maker.pair(grey, torch.Generator().manual_seed(3))["pixel_values"] for _ in range(2))
    assert torch.equal(one, same)


@pytest.mark.parametrize("size", [(128, 96), (6, 5)])
def test_holes_are_grey_and_the_rest_is_real(size):
    made = pairs.Pairs("inpainting").pair(picture(*size) if min(size) > 8 else picture().crop((0, 0, *size)))
    given, real = made["pixel_values"], made["labels"]
    holes = (given != real).any(0)
    assert holes.any() and (given[:, holes] == 0.5).all()
    assert given.shape == real.shape and (min(size) < 8 or holes.float().mean() < 0.25)


def test_crops():
    image = picture(40, 28)
    crops = [pairs.random_crop(image, 16) for _ in range(40)]
    assert {crop.size for crop in crops} == {(16, 16)} and len({crop.tobytes() for crop in crops}) > 20
    whole = {pairs.random_crop(picture(28, 28), 28).tobytes() for _ in range(40)}
    assert len(whole) == 4, "mirrored, upside down, both or none"
    assert pairs.center(image, 20, 4).size == (20, 20) and pairs.center(image, 99, 3).size == (39, 27)
    assert pairs.center(image, 20).getpixel((0, 0)) == image.getpixel((10, 4))


# PSNR


def test_psnr_by_hand():
    real = torch.full((3, 4, 4), 0.5)
    assert pairs.psnr(real + 0.1, real) == pytest.approx(20, abs=1e-4)
    assert pairs.psnr(real + 0.01, real) == pytest.approx(40, abs=1e-3)
    half = real.clone()
    half[:, :2] += 0.2  # half of the pixels: a mean squared error of 0.02
    assert pairs.psnr(half, real) == pytest.approx(-10 * np.log10(0.02), abs=1e-4)
    assert pairs.psnr(real + 7, real) == pytest.approx(-10 * np.log10(0.25), abs=1e-4), "pixels end at 1"
    assert pairs.psnr(real, real) == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize("upscale", [1, 2])
def test_the_mean_psnr_is_one_of_images_without_their_padding(upscale):
    maker = pairs.Pairs("super-resolution" if upscale > 1 else "inpainting", upscale)
    rows = [maker.pair(picture(*size, seed=row)) for row, size in enumerate([(40, 28), (24, 32), (36, 20)])]
    made = [torch.rand_like(row["labels"]) for row in rows]
    batches = [rows[:2], rows[2:]]
    predictions = []
    for start, batch in ((0, batches[0]), (2, batches[1])):
        predictions.append(torch.rand_like(pairs.collate(batch)["labels"]).numpy())
        for row in range(len(batch)):
            _, height, width = batch[row]["labels"].shape
            predictions[-1][row, :, :height, :width] = made[start + row]
    collated = [pairs.collate(batch) for batch in batches]
    references = [
        tuple(batch[name].numpy() for name in ("labels", "pixel_mask", "pixel_values")) for batch in collated
    ]
    found = pairs.mean_psnr(predictions, references, maker)
    base = [maker.baseline(row["pixel_values"]) for row in rows]
    name = "psnr_bicubic" if upscale > 1 else "psnr_given"
    for key, images in {"psnr": made, name: base}.items():
        errors = [(np.clip(x.numpy(), 0, 1) - row["labels"].numpy()) ** 2 for x, row in zip(images, rows, strict=True)]
        assert found[key] == pytest.approx(np.mean([10 * np.log10(1 / x.mean()) for x in errors]), abs=1e-3)


# The head


def test_a_readout_of_zeros_leaves_the_bicubic_enlargement():
    model, pixels = model_of(upscale=2).eval(), torch.rand(2, 3, 7, 9)
    torch.nn.init.zeros_(model.readout.weight)
    torch.nn.init.zeros_(model.readout.bias)
    wanted = F.interpolate(pixels, scale_factor=2, mode="bicubic", align_corners=False)
    assert_close(model(pixels).reconstruction, wanted)
    alone = pairs.Pairs("super-resolution", 2).baseline(pixels[1])
    assert_close(alone, wanted[1])


@pytest.mark.parametrize("fields", [{"upscale": 2}, {"upscale": 4, "feedback_signal": "output"}, {}])
def test_a_padded_batch_is_each_image_alone(fields):
    model, scale = model_of(**fields).eval(), fields.get("upscale", 1)
    rows = [{"pixel_values": torch.rand(3, h, w), "labels": torch.rand(3, scale * h, scale * w)} for h, w in SIZES]
    with torch.no_grad():
        together = model(**pairs.collate(rows))
        alone = [model(row["pixel_values"][None], labels=row["labels"][None]) for row in rows]
    for made, one in zip(together.reconstruction, alone, strict=True):
        _, height, width = one.reconstruction[0].shape
        assert_close(made[:, :height, :width], one.reconstruction[0])
        assert not made[:, height:].any() and not made[:, :, width:].any()
    assert_close(together.loss, torch.stack([one.loss for one in alone]).mean())


@pytest.mark.parametrize("fields", [{"upscale": 2}, {"upscale": 1, "feedback_signal": "output"}])
def test_the_last_step_is_the_reconstruction(fields):
    model = model_of(**fields).eval()
    pixels, mask = padded([torch.rand(3, h, w) for h, w in SIZES])
    inputs = {"pixel_values": pixels, "pixel_mask": mask}
    outputs = model(**inputs, num_feedback_steps=3, output_feedback_states=True)
    steps = model.step_logits(outputs)
    assert len(steps) == 3
    assert_close(steps[-1], outputs.reconstruction)
    assert_close(steps[1], model(**inputs, num_feedback_steps=2).reconstruction)


def test_saved_and_loaded(tmp_path):
    model, pixels = model_of(upscale=2).eval(), torch.rand(1, 3, 6, 8)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageToImage.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels).reconstruction, model(pixels).reconstruction)


# The script, on a folder of one's own


@pytest.mark.parametrize("task", pairs.TASKS)
def test_a_folder_of_mixed_images(task, tmp_path, capsys):
    folder = fill(tmp_path / "photos")
    results = script(
        tmp_path / "out", "--train_file", folder, "--task", task, "--eval_crop", 99, "--max_train_samples", 99
    )
    assert "train: 10 images" in (said := capsys.readouterr().out) and task in said
    name = "eval_psnr_bicubic" if task == "super-resolution" else "eval_psnr_given"
    measured = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert {"eval_psnr", name, *(f"eval_psnr_step_{k}" for k in range(1, 9))} <= measured.keys()
    assert measured["eval_psnr_step_4"] == pytest.approx(measured["eval_psnr"]), "the same noise or holes each time"
    assert all(np.isfinite(value) for key, value in results.items() if "psnr" in key)
    card = (tmp_path / "out" / "README.md").read_text()
    assert task.capitalize() in card and "images_1.png" in card
    model = AutoModelForImageToImage.from_pretrained(tmp_path / "out")
    scale = 2 if task == "super-resolution" else 1
    assert (model.config.upscale, model.config.input_config.patch_size) == (scale, 1 if scale == 2 else 2)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = picture(37, 21, "P")
    pixels = processor(image, return_tensors="pt").pixel_values
    assert_close(pixels[0], pairs.Pairs(task).pixels(image))
    assert model(pixels.to(model.device)).reconstruction.shape == (1, 3, 21 * scale, 37 * scale)


def test_splits_beside_each_other_grey_images_and_a_checkpoint(tmp_path, capsys):
    for split in ("train", "validation", "test"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        for number in range(3):
            picture(40 + number, 33, "L", number).save(tmp_path / "photos" / split / f"{number}.png")
    results = script(tmp_path / "out", "--train_file", tmp_path / "photos", "--upscale", 4)
    assert "test_psnr_step_8" in results
    model = AutoModelForImageToImage.from_pretrained(tmp_path / "out")
    assert (model.config.upscale, model.config.input_config.num_channels) == (4, 1)
    assert f"test: 2 images of {tmp_path / 'photos' / 'test'}" in capsys.readouterr().out
    again = ["--model_name_or_path", tmp_path / "out", "--do_train", "false"]
    only = script(tmp_path / "again", *again, "--test_file", tmp_path / "photos" / "test")
    assert only["test_psnr"] == pytest.approx(results["test_psnr"], abs=1e-4)
    with pytest.raises(ValueError, match="upscale of the checkpoint is 4 and that of the task is 1: give another"):
        script(tmp_path / "again", *again, "--test_file", tmp_path / "photos" / "test", "--task", "denoising")


# What is wrong, in one sentence


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task", "colouring"], "Unknown task 'colouring': choose one of super-resolution, denoising, inpainting"),
        (["--task", "denoising", "--upscale", 2], "--upscale is of super-resolution: leave it out"),
        (["--noise", 25], "--noise is of denoising: leave it out"),
        (["--upscale", 3], "--upscale is 3: give 2 or 4"),
        (["--task", "denoising", "--noise", 0], "--noise is 0: give a number above 0"),
        (["--crop", 15], "--crop is 15: give a multiple of the upscale, 2"),
        (["--eval_crop", 1], "--eval_crop is 1: give at least 2"),
        (["--crops_per_image", 0], "--crops_per_image is 0: give at least 1"),
    ],
)
def test_wrong_flags(flags, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        script(tmp_path / "out", "--train_file", tmp_path, *flags)
    assert not (tmp_path / "out").exists()


def test_images_smaller_than_the_crop_are_named_or_left_out_by_a_flag(tmp_path, capsys):
    flags = ["--train_file", fill(tmp_path / "photos"), "--validation_file", tmp_path / "photos", "--crop", 32]
    flags += ["--max_train_samples", 99, "--task", "denoising"]
    with pytest.raises(
        ValueError, match=r"4 of 12 images are smaller than 32 x 32 pixels \(.*\.\w+: 24 x 60"
    ) as error:
        script(tmp_path / "out", *flags)
    assert "--skip_small_images" in str(error.value) and not (tmp_path / "out").exists()
    script(tmp_path / "out", *flags, "--skip_small_images")
    assert "Left out 4 of 12 images" in (said := capsys.readouterr().out) and "train: 8 images" in said
    with pytest.raises(ValueError, match="12 of 12 images are smaller than 64 x 64 .*give larger ones, or a smaller"):
        script(tmp_path / "out", *flags, "--skip_small_images", "--crop", 64)


def test_corrupt_images_and_folders_without_any(tmp_path):
    folder = fill(tmp_path / "photos")
    (folder / "cut.png").write_bytes((folder / "2.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"1 of 13 images can't be read \(.*cut.png"):
        script(tmp_path / "out", "--train_file", folder, "--max_train_samples", 99)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images that Pillow reads, and no other files: give a folder"):
        read_plain_images(str(tmp_path / "empty"))
    (tmp_path / "empty" / "a.heic").write_bytes(b"phone")
    with pytest.raises(ValueError, match=r"no images that Pillow reads, but 1 files of other kinds \(.heic\)"):
        script(tmp_path / "out", "--train_file", tmp_path / "empty")
