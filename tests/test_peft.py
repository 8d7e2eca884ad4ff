"""LoRA reaches every projection of every cell, and is never silently ignored."""

import json

import pytest
import torch
from conftest import COMBINATIONS, PRESETS_MEMORY, assert_close, build, each_cell, each_combination, tokens
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from feedback_transformers import (
    FeedbackForCausalLM,
    FeedbackForQuestionAnswering,
    FeedbackForSequenceClassification,
    FeedbackForTokenClassification,
)
from feedback_transformers.adapters import LORA_TARGETS
from feedback_transformers.models.feedback_cells import CELLS


def adapt(model, target_modules=None, random: bool = False, **fields) -> PeftModel:
    """The model with an adapter, whose B is 0 as usual or, if asked, random."""
    fields = {"task_type": "CAUSAL_LM", **fields}
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=target_modules, **fields))
    if random:
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    return adapted.eval()


def adapter_gradients(adapted: PeftModel, batch: torch.Tensor) -> dict[str, float]:
    adapted.train()
    adapted(input_ids=batch, labels=batch).loss.backward()
    adapted.eval()
    return {name: p.grad.abs().max().item() for name, p in adapted.named_parameters() if "lora_" in name}


@each_combination
def test_default_targets(fields):
    """Every adapter learns: all gradients of B are non-zero, and with a random B the output changes."""
    model, batch = build(**fields), tokens(2, 8)
    before = model(batch).logits.detach()
    adapted = adapt(model)
    assert_close(adapted(input_ids=batch).logits, before, 1e-5)  # the fused kernel against the plain path
    gradients = adapter_gradients(adapted, batch)
    passes_once = fields["feedback_axis"] == "depth" and fields["feedback_signal"] == "none"
    silent = [
        name
        for name, size in gradients.items()
        if "lora_B" in name and size == 0 and not (passes_once and "state_proj" in name)
    ]
    assert gradients and not silent
    targets = {name.split(".lora_")[0].split(".")[-1] for name in gradients}
    linear = {
        name.split(".")[-1] for name, module in build(**fields).model.named_modules() if isinstance(module, nn.Linear)
    }
    assert linear <= targets <= set(LORA_TARGETS)


@each_cell
@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("axis", ["time", "depth"])
def test_save_reload_merge_generate(cell, targets, axis, tmp_path):
    fields = {"feedback_type": cell, "feedback_axis": axis, "feedback_interval": 1}
    batch = tokens(2, 9)
    adapted = adapt(build(**fields), targets, random=True)
    logits = adapted(input_ids=batch).logits
    assert (logits - build(**fields)(batch).logits).abs().max() > 1e-2
    new = adapted.generate(input_ids=batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(adapted.generate(input_ids=batch, max_new_tokens=4, do_sample=False, use_cache=False), new)

    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(build(**fields), tmp_path).eval()
    assert_close(reloaded(input_ids=batch).logits, logits, 1e-6)
    with reloaded.disable_adapter():
        assert_close(reloaded(input_ids=batch).logits, build(**fields)(batch).logits, 1e-6)
    merged = reloaded.merge_and_unload()
    assert_close(merged(batch).logits, logits, 1e-5)
    assert not any("lora" in name for name, _ in merged.named_modules())
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(again(batch).logits, merged(batch).logits)


SINGLE = {
    **{cell: {"feedback_type": cell} for cell in CELLS},
    "memory": PRESETS_MEMORY,
    "gpt2": {"feedback_type": "transformer", "backbone_config": {"model_type": "gpt2"}},
}
PROJECTIONS = [
    (kind, axis, name)
    for kind, fields in SINGLE.items()
    for axis in (("time",) if kind == "memory" else ("time", "depth"))
    for name, module in build(**{**fields, "feedback_axis": axis}).model.loop.named_modules()
    if isinstance(module, (nn.Linear, nn.Conv1d, Conv1D))
]


@pytest.mark.parametrize(("kind", "axis", "name"), PROJECTIONS)
def test_an_adapter_on_each_projection_alone_is_heard(kind, axis, name):
    """With and without a cache, and with padding: no path ignores it."""
    fields = {**SINGLE[kind], "feedback_axis": axis}
    batch, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    plain = build(**fields)
    adapted = adapt(build(**fields), [f"model.loop.{name}"], random=True)
    assert sum("lora_B" in n for n, _ in adapted.named_parameters()) == 1
    for arguments in ({}, {"use_cache": False}, {"attention_mask": mask}):
        before, after = plain(batch, **arguments).logits, adapted(input_ids=batch, **arguments).logits
        assert (after - before)[1].abs().max() > 1e-4
    assert all(size > 0 for n, size in adapter_gradients(adapted, batch).items())


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_merged_but_not_unloaded(cell):
    """Merging changes the weights, and unmerging brings them back; the fast path must follow both."""
    batch = tokens()
    adapted = adapt(build(feedback_type=cell, feedback_axis="time"), random=True)
    logits = adapted(input_ids=batch).logits
    adapted.merge_adapter()
    assert_close(adapted(input_ids=batch).logits, logits, 1e-5)
    adapted.unmerge_adapter()
    assert_close(adapted(input_ids=batch).logits, logits, 1e-5)


@pytest.mark.parametrize("signal", ["state", "output"])
@pytest.mark.parametrize("axis", ["time", "depth"])
def test_an_adapter_on_the_embeddings_is_heard_on_the_way_back(signal, axis):
    model = build(feedback_signal=signal, feedback_axis=axis, tie_word_embeddings=False)
    adapted = adapt(model, ["embed_tokens"], random=True).eval()
    with torch.no_grad():
        before = adapted(input_ids=tokens()).logits
        assert_close(adapted.merge_and_unload()(tokens()).logits, before)


@pytest.mark.parametrize("axis", ["time", "depth"])
def test_target_parameters_of_the_diagonal(axis, tmp_path):
    """The one projection that is no module PEFT knows."""
    fields, batch = {"feedback_type": "diagonal_gru", "feedback_axis": axis}, tokens()
    before = build(**fields)(batch).logits
    adapted = adapt(build(**fields), [], target_parameters=["diagonal.weight"], random=True)
    logits = adapted(input_ids=batch).logits
    assert (logits - before).abs().max() > 1e-4
    assert all(size > 0 for size in adapter_gradients(adapted, batch).values())
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(build(**fields), tmp_path).eval()
    assert_close(reloaded(input_ids=batch).logits, logits, 1e-5)
    assert_close(reloaded.merge_and_unload()(batch).logits, logits, 1e-5)


def test_auto_peft_model(tmp_path):
    base = tmp_path / "base"
    build().save_pretrained(base)
    from transformers import AutoModelForCausalLM

    adapted = adapt(AutoModelForCausalLM.from_pretrained(base), random=True)
    adapted.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_close(loaded(input_ids=tokens()).logits, adapted(input_ids=tokens()).logits, 1e-6)


def test_two_adapters_and_the_models_own_adapter_methods():
    model, batch = build(feedback_type="gru", feedback_axis="time"), tokens()
    before = model(batch).logits
    model.add_adapter(LoraConfig(r=2, target_modules=["input_proj"], init_lora_weights=False), "one")
    one = model(batch).logits
    model.add_adapter(LoraConfig(r=2, target_modules=["input_proj"], init_lora_weights=False), "two")
    model.set_adapter("two")
    two = model(batch).logits
    assert min((one - before).abs().max(), (two - before).abs().max(), (one - two).abs().max()) > 1e-3
    model.disable_adapters()
    assert_close(model(batch).logits, before, 1e-6)


@each_cell
@pytest.mark.parametrize("axis", ["time", "depth"])
def test_gradient_checkpointing(cell, axis):
    """Frozen embeddings, so that the checkpoints' inputs need no gradient of their own."""
    gradients, batch = [], tokens()
    for enable in (False, True):
        adapted = adapt(build(feedback_type=cell, feedback_axis=axis), random=False).train()
        torch.manual_seed(5)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.2)
        if enable:
            adapted.base_model.model.activation_checkpointing_enable()
        adapted(input_ids=batch, labels=batch).loss.backward()
        gradients.append([p.grad for name, p in adapted.named_parameters() if "lora_" in name])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("signal", ["state", "output"])
@pytest.mark.parametrize(
    ("head", "task"),
    [
        (FeedbackForSequenceClassification, "SEQ_CLS"),
        (FeedbackForTokenClassification, "TOKEN_CLS"),
        (FeedbackForQuestionAnswering, "QUESTION_ANS"),
    ],
)
def test_classifier_keeps_its_head(head, task, signal, tmp_path):
    """Which is drawn anew each time that the language model below is loaded, as is the way back of its prediction."""
    build(feedback_type="gru", feedback_signal=signal).save_pretrained(tmp_path / "below")
    adapted = adapt(head.from_pretrained(tmp_path / "below"), random=True, task_type=task)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any(f".{head.readout_name}." in name for name in trained)
    assert any(f".feedback_{head.readout_name}." in name for name in trained) == (signal == "output")
    adapted.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)
    again = PeftModel.from_pretrained(head.from_pretrained(tmp_path / "below"), tmp_path / "adapter").eval()
    assert_close(again(input_ids=tokens())[0], adapted(input_ids=tokens())[0], 1e-6)


@pytest.mark.parametrize("halting", ["learned", "act"])
def test_a_halting_that_is_new_is_the_same_each_time(halting, tmp_path):
    build().save_pretrained(tmp_path)
    logits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = FeedbackForCausalLM.from_pretrained(tmp_path, halting=halting, num_feedback_steps=4)
        logits.append(model(tokens()).logits)
    assert torch.equal(*logits)


def test_combinations_are_all_there():
    assert len(COMBINATIONS) == 189


@pytest.mark.parametrize(
    "fields",
    [
        {"feedback_axis": "time", "feedback_type": "lstm"},
        {"feedback_axis": "time", "solver": "jacobi"},
        {"feedback_type": "transformer"},
    ],
    ids=["time", "jacobi", "depth"],
)
@pytest.mark.parametrize("targets", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [*range(50)]}])
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_each_row_feeds_back_with_its_own_adapter(fields, targets):
    """The table that a prediction is fed back through is that of the row's adapter."""
    model = build(feedback_signal="output", tie_word_embeddings=False, **fields)
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["lm_head"], **targets})
    adapted = get_peft_model(model, config, adapter_name="first")
    adapted.add_adapter("second", config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "trainable_tokens_delta" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted.eval()
    batch, names = tokens(4, 7), ["first", "__base__", "second", "first"]
    with torch.no_grad():
        mixed = adapted(input_ids=batch, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with adapted.disable_adapter():
                    alone = adapted(input_ids=batch[row : row + 1]).logits
            else:
                adapted.set_adapter(name)
                alone = adapted(input_ids=batch[row : row + 1]).logits
            assert_close(mixed[row], alone[0])
    assert (mixed[0] - adapted(input_ids=batch[:1], adapter_names=["second"]).logits[0]).abs().max() > 1e-2
