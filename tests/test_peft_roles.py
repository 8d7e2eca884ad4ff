"""What PEFT knows a model of transformers by: default modules, tied embeddings, encoders, checkpoints."""

import copy
import warnings

import pytest
import torch
from conftest import build, each_cell, tokens
from peft import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from peft.utils import constants
from transformers import LlamaConfig, LlamaForCausalLM

from feedback_transformers import (
    FeedbackForMaskedLM,
    FeedbackForQuestionAnswering,
    FeedbackForSequenceClassification,
    FeedbackForTokenClassification,
)
from feedback_transformers.adapters import TABLE

TABLES = [name for name in vars(constants) if TABLE.fullmatch(name)]


@pytest.mark.parametrize("table", TABLES)
def test_every_table_that_knows_llama_knows_feedback_models(table):
    assert "feedback" in vars(constants)[table]


def test_the_tables_are_found():
    assert sum("llama" in vars(constants)[table] for table in TABLES) >= 30


DEFAULTS = {
    "adalora": AdaLoraConfig(task_type="CAUSAL_LM", total_step=10),
    "ia3": IA3Config(task_type="CAUSAL_LM"),
    "oft": OFTConfig(task_type="CAUSAL_LM"),
    "vera": VeraConfig(task_type="CAUSAL_LM"),
}


@each_cell
@pytest.mark.parametrize("axis", ["time", "depth"])
@pytest.mark.parametrize("method", DEFAULTS)
def test_defaults_reach_the_loop_of_every_cell(method, cell, axis):
    model = get_peft_model(build(feedback_type=cell, feedback_axis=axis), copy.deepcopy(DEFAULTS[method]))
    batch = tokens()
    model(input_ids=batch, labels=batch).loss.backward()
    learned = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is not None and p.grad.any()]
    assert any(".loop.cell." in name for name in learned)
    assert any(".loop.connection." in name for name in learned)


def test_lora_reaches_the_input_of_a_decaying_connection():
    model = get_peft_model(build(feedback_connection="decay"), LoraConfig(task_type="CAUSAL_LM"))
    assert hasattr(model.base_model.model.model.loop.connection.input_proj, "lora_A")


@pytest.mark.parametrize("ensure", [False, True])
def test_tied_embeddings_are_treated_as_those_of_llama(ensure):
    """Both layers are adapted with ensure_weight_tying, and PEFT warns where only one is."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "tie_word_embeddings": True}
    seen = []
    for model in (LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)), build(**sizes)):
        config = LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=ensure, init_lora_weights=False)
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            adapted = get_peft_model(model, config).eval()
            layers = [name.split(".")[-1] for name, part in adapted.named_modules() if hasattr(part, "base_layer")]
            adapted.merge_and_unload()  # which warns too
        warned = sorted({str(each.message).split(".")[0] for each in given if "tie" in str(each.message)})
        seen.append((sorted(layers), warned))
    assert seen[0] == seen[1]
    assert seen[0][0] == (["embed_tokens", "lm_head"] if ensure else ["embed_tokens"])


@pytest.mark.parametrize(
    ("head", "fields"),
    [
        (type(build()), {}),
        (FeedbackForMaskedLM, {"is_causal": False}),
        (FeedbackForSequenceClassification, {}),
        (FeedbackForTokenClassification, {}),
        (FeedbackForQuestionAnswering, {}),
    ],
)
def test_no_head_passes_for_an_encoder_decoder(head, fields):
    """As in transformers, get_encoder gives the model itself, and get_decoder the model below the head."""
    model = build(head, **fields)
    assert model.get_encoder() is model and model.model.get_encoder() is model.model
    assert model.get_decoder() is model.model and model.model.get_decoder() is model.model


def test_adapters_of_a_mixed_batch_with_beams():
    """Each row is written by its own adapter: as in a batch that has that adapter alone."""
    model = get_peft_model(build(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name="a")
    model.eval()
    batch = tokens(3, 5)
    arguments = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    mixed = model.generate(input_ids=batch, adapter_names=["a", "__base__", "a"], **arguments)
    alone = model.generate(input_ids=batch, **arguments)
    with model.disable_adapter():
        base = model.generate(input_ids=batch, **arguments)
    assert torch.equal(mixed, torch.stack([alone[0], base[1], alone[2]]))


ACTIVATED = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [7], "init_lora_weights": False}


@pytest.mark.parametrize(
    "fields",
    [
        {"feedback_axis": "depth"},
        {"feedback_axis": "depth", "num_feedback_steps": 16},  # which checkpoints segments of passes
        {"feedback_axis": "time", "solver": "jacobi", "solver_steps": 2},
    ],
)
def test_activated_lora_learns_the_same_from_checkpoints(fields):
    batch, gradients = tokens(), []
    batch[:, 4] = 7
    for checkpoints in (False, True):
        model = build(**fields)
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(**ACTIVATED, target_modules=["q_proj", "signal_proj"])).train()
        adapted(input_ids=batch, labels=batch).loss.backward()
        gradients.append([p.grad for name, p in adapted.named_parameters() if "lora_" in name])
    assert any(gradient.any() for gradient in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-5, rtol=1e-4)


def test_activated_lora_position_by_position_is_refused():
    with pytest.raises(ValueError, match="leave alora_invocation_tokens out"):
        get_peft_model(build(feedback_axis="time", feedback_type="gru"), LoraConfig(**ACTIVATED))
