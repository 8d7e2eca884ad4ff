"""What every version of the package wrote (checkpoints/make.py) is read by this one, and computes what it did."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import assert_close
from safetensors.torch import load_file, save_file

import feedback_transformers
from feedback_transformers.models.configuration_feedback import MODELING

CHECKPOINTS = Path(__file__).with_name("checkpoints")
WRITTEN = sorted(file.parent for file in CHECKPOINTS.glob("*/*/case.safetensors"))


def load(folder: Path):
    """The model in `folder`, inputs and the output that its version computed."""
    config = transformers.AutoConfig.from_pretrained(folder)
    auto, *_ = [auto for auto, name in MODELING.items() if name.endswith(f".{config.architectures[0]}")]
    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    inputs = load_file(folder / "case.safetensors")
    return model, inputs, inputs.pop("expected")


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_checkpoint_computes_what_it_did(folder, tmp_path):
    model, inputs, expected = load(folder)
    with torch.no_grad():
        assert_close(model(**inputs)[0], expected, 1e-5)
    model.save_pretrained(tmp_path)  # and goes on in the format of this version
    save_file(inputs | {"expected": expected}, tmp_path / "case.safetensors")
    again, inputs, expected = load(tmp_path)
    with torch.no_grad():
        assert_close(again(**inputs)[0], expected, 1e-5)


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_every_weight_of_a_checkpoint_counts(folder):
    """So that a weight read wrongly could not go unnoticed above."""
    model, inputs, expected = load(folder)
    idle = []
    for name, parameter in model.named_parameters():
        kept = parameter.data.clone()
        with torch.no_grad():
            parameter.mul_(1.5).add_(0.1)
            output = model(**inputs)[0]
            parameter.copy_(kept)
        if torch.allclose(output, expected, atol=1e-5, rtol=0):
            idle.append(name)
    # Halting decides when to stop, which may come out the same; a bias of keys adds the same to every score.
    assert all("halt" in name or name.endswith("k_proj.bias") for name in idle), idle


def test_this_version_has_a_checkpoint():
    version = feedback_transformers.__version__
    assert (CHECKPOINTS / version).is_dir(), f"Run python tests/checkpoints/make.py: there is none of {version}."
