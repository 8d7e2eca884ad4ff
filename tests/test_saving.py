"""What is set before saving is there after loading, and no file of an earlier save takes its place."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import BOS, build, tiny, tokens
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import PushToHubMixin

from feedback_transformers import FeedbackConfig, FeedbackForCausalLM, FeedbackForConditionalGeneration, retrofit

SEQ2SEQ = {"is_encoder_decoder": True, "decoder_start_token_id": BOS}
HEADS = [(FeedbackForCausalLM, {}), (FeedbackForConditionalGeneration, SEQ2SEQ)]
each_head = pytest.mark.parametrize("head, fields", HEADS, ids=["causal", "seq2seq"])


@each_head
@pytest.mark.parametrize("fresh", [False, True])
def test_generation_config_keeps_the_number_of_passes(head, fields, fresh, tmp_path):
    model = build(head, **fields)
    if fresh:
        model.generation_config = GenerationConfig(decoder_start_token_id=BOS)
    model.generation_config.num_feedback_steps = 1
    model.save_pretrained(tmp_path / "once")
    model = head.from_pretrained(tmp_path / "once")
    model.save_pretrained(tmp_path / "twice")
    loaded, options = head.from_pretrained(tmp_path / "twice"), {"max_new_tokens": 6, "do_sample": False}
    assert loaded.generation_config.num_feedback_steps == 1
    text, steps = tokens(4, 7), []
    loaded.model.loop.register_forward_hook(lambda loop, args, made: steps.append(args[3]))
    found = loaded.generate(text, **options)
    assert set(steps) == {1} and not torch.equal(found, loaded.generate(text, num_feedback_steps=3, **options))


def test_generation_config_of_an_older_save_keeps_the_number_of_passes(tmp_path):
    """0.1.0 wrote `_from_model_config`, at which transformers drops every field that it does not know."""
    build().save_pretrained(tmp_path)
    saved = {"_from_model_config": True, "num_feedback_steps": 2, "pad_token_id": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(saved))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.num_feedback_steps == 2
    asked = FeedbackForCausalLM.from_pretrained(tmp_path, generation_config=GenerationConfig(num_feedback_steps=3))
    assert asked.generation_config.num_feedback_steps == 3


WHOLE, SHARDS = {}, {"max_shard_size": "20KB"}


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("saves", [(WHOLE, SHARDS), (SHARDS, WHOLE), (SHARDS, {"max_shard_size": "40KB"})])
def test_the_last_save_is_loaded(saves, variant, tmp_path):
    models = [build(), FeedbackForCausalLM(tiny(num_feedback_layers=2))]  # and of other architectures
    (tmp_path / "pytorch_model.bin").write_bytes(b"of another program")
    for model, options in zip(models, saves, strict=True):
        model.save_pretrained(tmp_path, variant=variant, **options)
    loaded = FeedbackForCausalLM.from_pretrained(tmp_path, variant=variant)
    for name, weight in models[1].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    names = {file.name for file in tmp_path.glob("model*")}
    noted = {line.split()[1] for line in (tmp_path / "SHA256SUMS").read_text().splitlines()}
    assert {name for name in names if name.endswith(".safetensors")} == noted
    assert any(name.endswith(".json") for name in names) is (saves[1] != WHOLE)
    assert (tmp_path / "pytorch_model.bin").exists()


def test_a_variant_leaves_other_weights_alone(tmp_path):
    whole, half = build(), build(num_feedback_layers=2)
    whole.save_pretrained(tmp_path)
    (tmp_path / "model-of-mine.safetensors").write_bytes(b"")  # not a name that a save writes
    half.save_pretrained(tmp_path, variant="fp16", **SHARDS)
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "model-of-mine.safetensors").exists()
    assert "model-of-mine" not in (tmp_path / "SHA256SUMS").read_text()
    assert FeedbackForCausalLM.from_pretrained(tmp_path, variant="fp16").config.num_feedback_layers == 2


UNREAD = [
    ("rms_norm_eps", 1e-5, "set it in backbone_config={'model_type': 'llama', 'rms_norm_eps'"),
    ("sliding_window", 4, "set it in backbone_config"),
    ("pretraining_tp", 1, "set it in backbone_config"),
    ("num_layers", 3, "did you mean num_feedback_layers"),
    ("hidden_szie", 3, "did you mean hidden_size"),
    ("preset", "gru", "preset is no field"),
]


@pytest.mark.parametrize("name, value, sentence", UNREAD, ids=[name for name, *_ in UNREAD])
def test_an_attribute_that_nothing_reads_is_refused_when_it_is_set(name, value, sentence, tmp_path):
    model = build()
    with pytest.raises(ValueError, match=sentence):
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path)
    FeedbackForCausalLM.from_pretrained(tmp_path)


def test_what_a_config_takes_is_loaded_again(tmp_path):
    config = tiny()
    taken = {"my_note": "kept", "num_hidden_layers": 2, "num_labels": 3, "use_cache": False, "halting": "converged"}
    for name, value in taken.items():
        setattr(config, name, value)
    config.backbone_config.rms_norm_eps = 1e-3
    config.save_pretrained(tmp_path)
    loaded = FeedbackConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in taken} == taken
    assert loaded.backbone_config.rms_norm_eps == 1e-3


@pytest.mark.parametrize("asked", ["eager", {"": "eager"}, {"backbone_config": "eager"}], ids=str)
def test_attention_implementation_reaches_the_borrowed_layers(asked, caplog):
    logging.getLogger("transformers").propagate = True
    model = build()
    expected = model(tokens()).logits
    with caplog.at_level(logging.WARNING):
        model.set_attn_implementation(asked)
    assert not caplog.records
    used = {layer.config._attn_implementation for layer in model.modules() if hasattr(layer, "k_proj")}
    assert used == {"eager"}
    torch.testing.assert_close(model(tokens()).logits, expected)
    with pytest.raises(ValueError, match="is not supported"):
        model.set_attn_implementation("no_such_attention")


def test_attention_that_the_family_does_not_have_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=2, head_dim=16))
    model = retrofit(gemma, 1, 1)
    with pytest.raises(ValueError, match="gemma2 layers support attn_implementation='eager' only"):
        model.set_attn_implementation("sdpa")


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="use generate\\(\\) on a padded batch"):
        build().generate_batch([[5, 6, 7], [8, 9]], max_new_tokens=2)


def test_packed_rows_are_refused_with_the_names_of_trl():
    places = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="packing=False and padding_free=False"):
        build()(tokens(1, 5), position_ids=places)
    with pytest.raises(ValueError, match="packing=False and padding_free=False"):
        build()(tokens(1, 5), seq_idx=torch.zeros(1, 5))


SHARDED = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_push_removes_the_weights_that_it_replaces(variant, tmp_path, monkeypatch):
    """In both directions; other variants and other files of the repository stay."""
    whole = f"model{variant}.safetensors"
    sharded = [name.replace("model-", f"model{variant}-") for name in SHARDED[:2]]
    sharded.append(f"model.safetensors.index{variant}.json")
    others = ["config.json", "model-of-mine.safetensors", "model.bf16.safetensors", "pytorch_model.bin"]
    model, removed = build(), []
    monkeypatch.setattr(
        PushToHubMixin, "_upload_modified_files", lambda *a, **k: SimpleNamespace(pr_revision=None, **k)
    )
    monkeypatch.setattr("feedback_transformers.hub.complete_push", lambda *a: None)
    monkeypatch.setattr(HfApi, "create_commit", lambda self, repo, made, **k: removed.append((made, k["revision"])))
    for i, (before, now) in enumerate([([whole], sharded), (sharded, [whole]), ([whole], [whole])]):
        monkeypatch.setattr(HfApi, "list_repo_files", lambda *a, names=(*before, *now, *others), **k: list(names))
        folder = tmp_path / str(i)
        folder.mkdir()
        for name in now:
            (folder / name).write_bytes(b"")
        removed.clear()
        model._upload_modified_files(folder, "me/it", files_timestamps={}, revision="draft")
        if before == now:
            assert not removed
        else:
            ((deletions, revision),) = removed
            assert [deletion.path_in_repo for deletion in deletions] == sorted(before) and revision == "draft"
