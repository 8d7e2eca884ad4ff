"""Checkpoints: what travels, what loads where the package is not, what happens to keys that are missing or corrupt."""

import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import PRESETS_MEMORY, assert_close, build, make_tokenizer, tokens
from safetensors.torch import load_file, save_file
from test_heads import HEADS, inputs_of
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from feedback_transformers import (
    FeedbackConfig,
    FeedbackForCausalLM,
    FeedbackForImageClassification,
    FeedbackForQuestionAnswering,
    FeedbackForTokenClassification,
    hub,
)
from feedback_transformers.models.configuration_feedback import AUTO_MAP, MODELING

# Runs where feedback_transformers can't be imported; argv: the folder that holds a folder for each head.
ELSEWHERE = """
    import importlib, json, sys, warnings
    from pathlib import Path

    sys.modules["feedback_transformers"] = None
    try:
        importlib.import_module("feedback_transformers")
    except ImportError:
        pass
    else:
        raise AssertionError("the package is importable")

    import torch, transformers

    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        case = json.loads((folder / "case.json").read_text())
        inputs, expected = torch.load(folder / "case.pt")
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert type(config).__name__ == "FeedbackConfig" and type(config).__module__.startswith("transformers_modules")
        auto = getattr(transformers, case["auto"])
        model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert type(model).__name__ == case["head"], type(model)
        assert not any(info.values()), info
        assert torch.equal(model(**inputs)[0], expected), folder
        base, info = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert type(base).__name__ == "FeedbackModel" and not info["missing_keys"], info

        again = folder / "again"
        model.save_pretrained(again)
        reloaded, info = auto.from_pretrained(again, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(reloaded(**inputs)[0], expected)
        referred = json.loads((again / "config.json").read_text())["auto_map"].values()
        assert {reference.split(".")[0] for reference in referred} <= {file.stem for file in again.glob("*.py")}
        base = transformers.AutoModel.from_pretrained(again, trust_remote_code=True)
        assert type(base).__name__ == "FeedbackModel"
        shifted = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        assert "FeedbackForCausalLM" in shifted.values(), "Trainer smooths the labels it should, of a next token"
        if model.can_generate() and not config.is_encoder_decoder:
            tokens = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
            assert tokens.tolist() == case["generated"]
        print("ok", folder.name)
"""


def run_elsewhere(script: str, *arguments: object, folder) -> str:
    """Runs a script in a process with another working directory, its own module cache and no way to this package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.update(HF_MODULES_CACHE=str(folder / "modules"), HF_HOME=str(folder / "home"), HF_HUB_OFFLINE="1")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_head_loads_where_the_package_is_not(tmp_path):
    root = tmp_path / "checkpoints"
    for head, fields in HEADS.items():
        model, inputs = build(head, feedback_type="gru", feedback_signal="output", **fields), inputs_of(head)
        folder = root / head.__name__
        hub.export(model, folder)
        auto, *_ = [auto for auto, reference in MODELING.items() if reference.endswith(f".{head.__name__}")]
        case = {"head": head.__name__, "auto": auto}
        if model.can_generate() and not model.config.is_encoder_decoder:
            case["generated"] = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False).tolist()
        (folder / "case.json").write_text(json.dumps(case))
        torch.save((inputs, model(**inputs)[0].detach()), folder / "case.pt")
    printed = run_elsewhere(ELSEWHERE, root, folder=tmp_path)
    assert printed.split() == [word for head in sorted(head.__name__ for head in HEADS) for word in ("ok", head)]


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_auto_map_is_complete_and_its_files_travel(head, tmp_path):
    build(head, **HEADS[head]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == AUTO_MAP
    for reference in AUTO_MAP.values():
        file, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"{file}.py").read_text()
    for file in tmp_path.glob("*.py"):
        assert not re.search(r"^\s*(from|import) feedback_transformers|^\s*from \. import", file.read_text(), re.M), (
            file
        )


def test_push_to_hub_from_save_pretrained_uploads_the_code(tmp_path, monkeypatch):
    """What is in the folder at the moment of the upload is what the Hub gets."""
    uploaded = []
    monkeypatch.setattr(
        FeedbackForCausalLM, "_upload_modified_files", lambda *a, **k: uploaded.extend(os.listdir(a[1]))
    )
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: type("Repo", (), {"repo_id": "me/it"}))
    build().save_pretrained(tmp_path / "it", push_to_hub=True)
    assert {"config.json", "model.safetensors", "modeling_feedback.py", "feedback_loop.py"} <= set(uploaded)


def test_the_config_alone_carries_its_code(tmp_path):
    build().config.save_pretrained(tmp_path)
    script = """
        import sys
        sys.modules["feedback_transformers"] = None
        from transformers import AutoConfig, AutoModelForCausalLM
        config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
        print(type(AutoModelForCausalLM.from_config(config, trust_remote_code=True)).__name__)
    """
    assert run_elsewhere(script, tmp_path, folder=tmp_path).strip() == "FeedbackForCausalLM"


def test_export_with_tokenizer_and_card(tmp_path):
    model = build()
    folder = hub.export(
        model, tmp_path / "it", make_tokenizer(), {"perplexity": 4.25}, name="It", dataset="topics", command="make it"
    )
    assert AutoTokenizer.from_pretrained(folder)("an").input_ids == make_tokenizer()("an").input_ids
    card = (folder / "README.md").read_text()
    for part in ("library_name: transformers", "pipeline_tag: text-generation", "4.25", "topics", "make it"):
        assert part in card
    assert f"{model.num_parameters():,}" in card


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks .* make a feedback model of that with feedback_transformers.retrofit"):
        FeedbackForCausalLM.from_pretrained(tmp_path)


def test_what_cannot_go_along_is_refused(tmp_path):
    with pytest.raises(TypeError, match="results holds loss='low', which is not a number"):
        hub.describe(build(), results={"loss": "low"})
    with pytest.raises(FileNotFoundError, match="There is no plot nowhere.png"):
        hub.describe(build(), plots=["nowhere.png"])
    with pytest.raises(TypeError, match="A card has no licence; it takes name, dataset, license"):
        hub.describe(build(), licence="mit")
    with pytest.raises(TypeError, match="Give a feedback model, not a LlamaForCausalLM"):
        hub.describe(LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=2)))
    with pytest.raises(TypeError, match="A card has no licence"):
        hub.CardCallback(Trainer(build(), TrainingArguments(tmp_path, use_cpu=True)), dataset="me/it", licence="mit")


def test_numbers_of_numpy_are_results():
    model = build()
    hub.describe(model, results={"accuracy": np.float32(0.5), "steps": 3})
    assert repr(model.sharing.results) == "{'accuracy': 0.5, 'steps': 3}"


def test_registration_is_idempotent():
    import feedback_transformers

    feedback_transformers._register()
    assert type(AutoConfig.for_model("feedback")) is FeedbackConfig


# Missing keys

KINDS = {  # key -> mean and standard deviation of a fresh one, with initializer_range=0.1
    "gru": {
        "model.embeddings.embed_tokens.weight": (0.0, 0.1),
        "model.encoder.layers.0.self_attn.q_proj.weight": (0.0, 0.1),
        "model.encoder.layers.0.input_layernorm.weight": (1.0, 0.0),
        "model.loop.connection.scale": (1.0, 0.0),
        "model.loop.connection.norm.weight": (1.0, 0.0),
        "model.loop.connection.gate_proj.weight": (0.0, 0.1),
        "model.loop.connection.gate_proj.bias": (0.0, 0.0),
        "model.loop.cell.layers.0.0.input_proj.weight": (0.0, 0.1),
        "model.loop.cell.layers.0.0.state_proj.bias": (0.0, 0.0),
        "model.norm.weight": (1.0, 0.0),
    },
    "diagonal_gru": {"model.loop.cell.layers.0.0.diagonal.weight": (0.0, 0.5)},
    "conv": {
        "model.loop.cell.layers.0.conv.weight": (0.0, 0.1),
        "model.loop.cell.layers.0.conv.bias": (0.0, 0.0),
        "model.loop.cell.layers.0.out_proj.weight": (0.0, 0.1),
    },
    "memory": {"model.loop.cell.layer_weights": (0.0, 0.0)},
    "gpt2": {
        "model.positions.weight": (0.0, 0.1),
        "model.encoder.layers.0.attn.c_attn.weight": (0.0, 0.1),
        "model.encoder.layers.0.attn.c_attn.bias": (0.0, 0.0),
        "model.encoder.layers.0.mlp.c_proj.weight": (0.0, 0.1),
        "model.encoder.layers.0.ln_1.weight": (1.0, 0.0),
        "model.encoder.layers.0.ln_1.bias": (0.0, 0.0),
    },
}
FIELDS = {"memory": PRESETS_MEMORY, "gpt2": {"backbone_config": {"model_type": "gpt2"}}}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in KINDS.items() for key in keys])
def test_missing_key_is_initialised(kind, key, tmp_path):
    """And what was in the file stays as it was, its siblings in the same module included."""
    model = build(**FIELDS.get(kind, {"feedback_type": kind}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=f"lacks .* of the model, such as {key}"):
        FeedbackForCausalLM.from_pretrained(tmp_path)
    wanted = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    loaded, info = FeedbackForCausalLM.from_pretrained(tmp_path, **wanted)
    expected = {key} | ({"lm_head.weight"} if "tokens" in key else set())
    assert key in info["missing_keys"] and set(info["missing_keys"]) <= expected
    mean, std = KINDS[kind][key]
    fresh = loaded.state_dict()[key]
    assert_close(fresh.mean(), torch.tensor(mean), 0.3 * std)
    if fresh.numel() > 1:
        assert_close(fresh.std(), torch.tensor(std), 0.3 * std)
    for name, value in loaded.state_dict().items():
        if name not in expected:
            assert (value == 7.0).all(), name
    assert loaded(tokens()).logits.isfinite().all()


def test_head_on_a_base_checkpoint_says_what_is_new(tmp_path):
    from feedback_transformers import FeedbackForSequenceClassification, FeedbackModel

    build(FeedbackModel).save_pretrained(tmp_path)
    model, info = FeedbackForSequenceClassification.from_pretrained(tmp_path, num_labels=4, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert_close(model.classifier.weight.std(), torch.tensor(0.1), 0.02)
    assert model.classifier.bias.abs().max() == 0


# Corrupt checkpoints


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_corrupt_weights_are_refused(damage, tmp_path):
    build().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"truncated": content[: len(content) // 2], "garbage": b"\xff" * 5000, "empty": b""}[damage])
    with pytest.raises(Exception, match="not the file that was saved"):
        FeedbackForCausalLM.from_pretrained(tmp_path)


def test_weights_of_another_size_are_refused(tmp_path):
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vocab_size"] = 40
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="(?i)mismatch"):
        FeedbackForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("head", "names"),
    [
        (FeedbackForTokenClassification, {"feedback_classifier.": "feedback."}),
        (FeedbackForQuestionAnswering, {"qa_outputs.": "classifier.", "feedback_qa_outputs.": "feedback."}),
    ],
)
def test_names_of_weights_before_a_release(head, names, tmp_path):
    """What was saved under them loads, and is saved under the new ones."""
    model = build(head, feedback_signal="output")
    model.save_pretrained(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    weights = load_file(tmp_path / "model.safetensors")
    for new, old in names.items():
        for key in [key for key in weights if key.startswith(new)]:
            weights[key.replace(new, old)] = weights.pop(key)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    again = head.from_pretrained(tmp_path)
    assert torch.equal(again(tokens())[0], model(tokens())[0])


def test_newer_format_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["format_version"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="upgrade feedback_transformers"):
        FeedbackForCausalLM.from_pretrained(tmp_path)


def test_broken_config_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "feedback", "vocab')
    with pytest.raises(OSError, match="valid JSON"):
        FeedbackForCausalLM.from_pretrained(tmp_path)


def test_image_model_keeps_its_patches(tmp_path):
    model = build(FeedbackForImageClassification, **HEADS[FeedbackForImageClassification])
    model.save_pretrained(tmp_path)
    loaded = FeedbackForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.embeddings.projection.weight, model.model.embeddings.projection.weight)


def test_export_refuses_an_adapted_model(tmp_path):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(TypeError, match="merge_and_unload"):
        hub.export(get_peft_model(build(), LoraConfig()), tmp_path)
