"""Videos: digits that move as their label says, GIFs of one's own, and the script that classifies them."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_captioning import splits
from test_examples import examples_on_path, run  # noqa: F401 - a fixture
from transformers import AutoConfig, AutoImageProcessor

from feedback_transformers import data
from feedback_transformers.data import scenes
from feedback_transformers.training import scripts
from feedback_transformers.training.scripts import videos


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(scenes, "COUNTS", {"train": 32, "validation": 20, "test": 40})
    monkeypatch.setattr(scenes, "splits", splits)


def middle(frame):
    """The centre of mass of a frame [H, W], as x and y."""
    rows, columns = np.indices(frame.shape)
    return np.array([(columns * frame).sum(), (rows * frame).sum()]) / frame.sum()


def test_digits_move_where_their_label_says(few):
    ways = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    rows = data.load("digit-videos")["test"]
    assert len(rows.features["label"].names) == 40 and len(set(rows["label"])) > 10
    for row in rows:
        frames, name = (
            np.stack([np.array(frame, dtype=float) for frame in row["video"]]),
            rows.features["label"].int2str(row["label"]),
        )
        assert frames.shape == (8, 36, 36)
        steps = np.diff([middle(frame) for frame in frames], axis=0)
        along = steps @ ways[name.split()[1]]
        assert (along >= 0.5).sum() >= 6 and (along >= 0).all(), name
        assert np.allclose(steps - along[:, None] * ways[name.split()[1]], 0), "and nowhere else"
        assert all(frame.sum() == frames[0].sum() for frame in frames), "nothing leaves the canvas"


# Files


def gif(file, frames=6, way=1, size=(16, 20), color=True):
    """Write a bright square that moves over a dark ground, to the right with `way` 1 and to the left with -1."""
    file.parent.mkdir(parents=True, exist_ok=True)
    made = np.zeros((frames, *size, 3), np.uint8)
    for k in range(frames):
        x = 2 * k if way > 0 else size[1] - 6 - 2 * k
        made[k, 4:10, x : x + 6] = (220, 60, 20) if color else 200
    pictures = [Image.fromarray(frame) for frame in made]
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=80)
    return made


def clips(root, count=6, **options):
    for name, way in (("right", 1), ("left", -1)):
        for i in range(count):
            gif(root / name / f"{i}.gif", 4 + i % 4, way, (16 + i, 20), **options)
    return root


def value(file):
    return {"bytes": None, "path": str(file)}


def test_frames_are_evenly_sampled(tmp_path):
    assert videos.sampled(9, 5) == [0, 2, 4, 6, 8] and videos.sampled(2, 4) == [0, 0, 1, 1]
    made = gif(tmp_path / "a.gif", 9, size=(16, 24))
    read = videos.frames_of(value(tmp_path / "a.gif"), 5)
    assert read.dtype == np.uint8 and np.abs(read.astype(int) - made[::2]).max() <= 8  # a palette of 256 colours
    array = np.arange(6 * 4).reshape(6, 2, 2).astype(np.uint8)
    assert np.array_equal(videos.frames_of(array.tolist(), 3), array[[0, 2, 5], ..., None])
    in_memory = {"bytes": (tmp_path / "a.gif").read_bytes(), "path": None}
    assert np.array_equal(videos.frames_of(in_memory, 5), read)


def test_looks_of_videos(tmp_path):
    gif(tmp_path / "color.gif", size=(12, 30))
    gif(tmp_path / "grey.gif", color=False)
    look = videos.look_at(value(tmp_path / "color.gif"))
    assert (look.width, look.height, look.grey) == (30, 12, False)
    assert videos.look_at(value(tmp_path / "grey.gif")).grey
    Image.new("RGB", (8, 8)).save(tmp_path / "still.gif")
    Image.new("RGB", (8, 8)).save(tmp_path / "still.jpg")
    for name in ("still.gif", "still.jpg"):
        assert "it has 1 frame; a video has at least two" in videos.look_at(value(tmp_path / name)).fault
    whole = (tmp_path / "color.gif").read_bytes()
    for count in range(1, len(whole)):
        assert videos.look_at({"bytes": whole[:count], "path": None}).fault, count
    assert videos.look_at(None).fault == "there is no video"


def test_pixels_of_grey_arrays_and_of_colours(tmp_path):
    processor = scripts.image_processor(10)
    array = np.random.default_rng(0).integers(0, 256, (6, 10, 10)).astype(np.uint8)
    pixels = videos.pixels(processor, [array.tolist(), array.tolist()], 6)
    assert pixels.shape == (2, 6, 1, 10, 10)
    assert torch.allclose(pixels[1, :, 0], torch.tensor(array / 127.5 - 1, dtype=torch.float32), atol=1e-5)
    gif(tmp_path / "a.gif")
    assert videos.pixels(processor, [value(tmp_path / "a.gif")], 3).shape == (1, 3, 3, 10, 10)


# The script


def script(train, out, *flags, **options):
    return run("run_video_classification", "--train_file", train, "--output_dir", out, *flags, **options)


def lines_of(file):
    return file.read_text().splitlines()


def test_digit_videos(few, tmp_path):
    results = run("run_video_classification", "--output_dir", tmp_path)
    assert {f"test_accuracy_step_{k}" for k in range(1, 9)} <= results.keys()
    assert results["test_accuracy"] <= min(results["test_accuracy_digit"], results["test_accuracy_motion"])
    config = AutoConfig.from_pretrained(tmp_path)
    read = {"type": "videos", "num_channels": 1, "patch_size": 6, "tubelet_size": 2, "positions": "grid"}
    assert config.input_config.to_dict() == read and config.id2label[0] == "zero left"
    assert len(lines_of(tmp_path / "predictions.csv")) == 21
    assert lines_of(tmp_path / "predictions.csv")[1].startswith("row 0,")


def test_the_parts_of_a_label():
    example = importlib.import_module("run_video_classification")
    names = ["one left", "one up", "two left", "two up"]
    measured = example.accuracy_of_parts(names, np.array([0, 1, 3, 3]), np.array([0, 0, 0, 1]))
    assert measured == {"accuracy_digit": 0.5, "accuracy_motion": 0.5}


def test_a_folder_of_gifs(tmp_path, capsys):
    """Which way a square moves is learned; then loose GIFs are classified by the checkpoint alone."""
    folder, out = clips(tmp_path / "clips"), tmp_path / "out"
    flags = ["--num_frames", 4, "--patch_size", 4, "--num_train_epochs", 60, "--learning_rate", 1e-2]
    flags += ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    results = script(folder, out, *flags, "--test_file", folder, "--validation_file", folder)
    assert results["test_accuracy"] == 1 and "test_accuracy_digit" not in results
    said = capsys.readouterr().out
    assert "12 videos" in said and "in colour; the model reads them as" in said and "4 frames of each" in said
    assert AutoConfig.from_pretrained(out).id2label == {0: "left", 1: "right"}
    assert AutoImageProcessor.from_pretrained(out).size["height"] == 18
    gif(tmp_path / "new" / "a.gif", way=-1)
    gif(tmp_path / "new" / "b.gif")
    asked = ["--model_name_or_path", out, "--do_train", "false", "--test_file", tmp_path / "new", "--num_frames", 4]
    assert run("run_video_classification", *asked, "--output_dir", tmp_path / "again") == {}
    lines = [line.split(",") for line in lines_of(tmp_path / "again" / "predictions.csv")]
    assert lines[0] == ["video", "prediction", "probability"]
    assert [(line[0], line[1]) for line in lines[1:]] == [
        (str(tmp_path / "new" / "a.gif"), "left"),
        (str(tmp_path / "new" / "b.gif"), "right"),
    ]
    assert "pipeline_tag: video-classification" in (out / "README.md").read_text()


def test_a_table_of_paths(tmp_path):
    clips(tmp_path / "clips", color=False)
    rows = [f"clips/{name}/{i}.gif,{name}" for name in ("left", "right") for i in range(6)]
    (tmp_path / "clips.csv").write_text("\n".join(["video,label", *rows]))
    results = script(tmp_path / "clips.csv", tmp_path / "out", "--num_train_epochs", 1)
    assert "eval_accuracy" in results
    assert AutoConfig.from_pretrained(tmp_path / "out").input_config.num_channels == 1


# What is wrong, in one sentence


def test_folders_that_are_refused(tmp_path, capsys):
    folder, out = clips(tmp_path / "clips"), tmp_path / "out"
    Image.new("RGB", (8, 8)).save(folder / "left" / "0.gif")
    with pytest.raises(ValueError, match=r"1 of 12 videos can't be read \(.*left/0.gif: it has 1 frame; a video has"):
        script(folder, out)
    (folder / "right" / "2.gif").write_bytes((folder / "right" / "2.gif").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"2 of 12 videos .*right/2.gif: .*mend or delete them, or leave them out"):
        script(folder, out)
    script(folder, out, "--skip_corrupt_files", "true")
    assert "Left out 2 videos that can't be read" in capsys.readouterr().out
    (folder / "up").mkdir()
    with pytest.raises(ValueError, match="class folder .*up holds no images, but no files: fill it or delete it"):
        script(folder, out)
    (folder / "up" / "a.mp4").write_bytes(b"film")
    with pytest.raises(ValueError, match=r"up holds no images, but 1 files of other kinds \(.mp4\)"):
        script(folder, out)


def test_other_bad_inputs(tmp_path):
    with pytest.raises(ValueError, match="--num_frames is 1: give at least 2, to see what moves"):
        script(tmp_path, tmp_path / "out", "--num_frames", 1)
    (tmp_path / "a.csv").write_text("clip,label\n" + "x.gif,a\nx.gif,b\n" * 10)
    with pytest.raises(ValueError, match="has no column 'video', only 'clip', 'label': give --video_column"):
        script(tmp_path / "a.csv", tmp_path / "out")
    with pytest.raises(ValueError, match=r"20 of 20 videos can't be read \(.*No such file"):
        script(tmp_path / "a.csv", tmp_path / "out", "--video_column", "clip")
    (tmp_path / "b.jsonl").write_text('{"video": [1, 2], "label": "a"}\n{"video": [2, 3], "label": "b"}\n' * 10)
    with pytest.raises(ValueError, match="The column 'video' holds .*: give GIFs, their paths, lists of images"):
        script(tmp_path / "b.jsonl", tmp_path / "out")
