"""A quantized base with feedback and LoRA on top: exact at birth, shared, able to learn, saved and loaded."""

import logging

import pytest
import torch
from conftest import SIZES, assert_close, each_axis, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from test_retrofit import answer, opened
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

from feedback_transformers import FeedbackForCausalLM, retrofit, unretrofit

TORCHAO = {
    "int8": Int8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}
LOADED = {
    **{f"torchao-{name}": TorchAoConfig(config) for name, config in TORCHAO.items()},
    "bitsandbytes-int8": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes-nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}
each_way = pytest.mark.parametrize("way", [*LOADED, *(f"memory-{name}" for name in TORCHAO)])
LAYERS = 3

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says with every product that it casts
pytestmark = pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")


def llama(head=LlamaForCausalLM):
    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128}  # multiples of the blocks of bitsandbytes
    del sizes["num_feedback_steps"]
    return head(LlamaConfig(**sizes, num_hidden_layers=LAYERS, num_key_value_heads=2)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder)
    return folder


def quantized(way, folder):
    if way in LOADED:
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=LOADED[way]).eval()
    model = llama()
    quantize_(model, TORCHAO[way.removeprefix("memory-")])
    return model


def with_lora(model):
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["connection"]))


def kinds(model) -> set[str]:
    return {type(parameter).__name__ for parameter in model.parameters()}


@each_way
@each_axis
def test_exact_at_birth_shared_and_given_back(way, axis, folder):
    before, batch = quantized(way, folder), tokens(2, 19)
    assert len(kinds(before)) == 2, "the layers are quantized, the embeddings are not"
    model = retrofit(before, 1, 1, 3, axis)
    old = {id(parameter) for parameter in before.parameters()}
    assert all("loop.connection." in name for name, p in model.named_parameters() if id(p) not in old)
    expected = answer(before, batch)
    assert (expected - answer(llama(), batch)).abs().max() > 1e-3
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    made = before.generate(batch, **options)
    for steps in (1, 3, 5):
        assert_close(answer(model, batch, num_feedback_steps=steps), expected)
        assert torch.equal(model.generate(batch, num_feedback_steps=steps, **options), made)
    assert (answer(opened(model), batch) - expected).abs().max() > 1e-3
    again = unretrofit(model)
    assert type(again) is type(before)
    assert [id(parameter) for parameter in again.parameters()] == [id(parameter) for parameter in before.parameters()]
    assert torch.equal(answer(again, batch), expected)


@each_way
def test_lora(way, folder, tmp_path):
    axis = "time" if way.endswith("int8") else "depth"
    before, batch = quantized(way, folder), tokens(2, 19)
    model = retrofit(before, 1, 1, 3, axis)
    expected = answer(before, batch)
    adapted = with_lora(model)
    assert_close(answer(adapted, batch), expected)
    adapted.train()(batch, labels=batch).loss.backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    learning = [name for name in gradients if "lora_B" in name or "signal_proj.weight" in name]
    assert len(learning) >= LAYERS * 7 + 1
    assert all(gradients[name].abs().max() > 0 for name in learning)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    changed = answer(adapted.eval(), batch)
    assert (changed - expected).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(retrofit(before, 1, 1, 3, axis), tmp_path).eval()
    assert torch.equal(answer(again, batch), changed)
    assert torch.equal(answer(unretrofit(again.unload()), batch), expected)


@pytest.mark.parametrize("way", LOADED)
def test_saves_and_loads(way, folder, tmp_path):
    """In training mode, as bitsandbytes evaluates a loaded model in bfloat16 on some CPUs."""
    before, batch = quantized(way, folder).train(), tokens(2, 19)
    model = opened(retrofit(before, 1, 1, 3))
    model.save_pretrained(tmp_path)
    loaded, info = FeedbackForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert kinds(loaded) == kinds(model)
    assert torch.equal(answer(loaded.train(), batch), answer(model, batch))
    given_back = unretrofit(loaded)
    assert torch.equal(answer(given_back, batch), answer(before, batch))
    given_back.save_pretrained(tmp_path / "original")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    assert torch.equal(answer(loaded.train(), batch), answer(before, batch))


@pytest.mark.parametrize(
    ("way", "adapted"), [("torchao-int8", False), ("torchao-int4", True), ("bitsandbytes-nf4", True)]
)
def test_trainer(way, adapted, folder, tmp_path):
    model = retrofit(quantized(way, folder), 1, 1, 3)
    connection = model.model.loop.connection
    if adapted:
        model = with_lora(model)
    else:
        model.requires_grad_(False)
        connection.requires_grad_(True)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 19)]
    arguments = TrainingArguments(
        tmp_path, max_steps=6, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.1


def test_quantized_while_loading(folder, tmp_path):
    model, batch = retrofit(folder, 1, 1, 3), tokens(2, 19)
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(TORCHAO["int8"], modules_to_not_convert=["model.loop.connection", "lm_head"])
    loaded = FeedbackForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert kinds(loaded.model.loop.connection) == {"Parameter"}
    assert torch.equal(answer(loaded, batch), answer(quantized("torchao-int8", folder), batch))


def test_classifier_quantized_with_its_readout():
    before, batch = llama(LlamaForSequenceClassification), tokens(2, 19)
    quantize_(before, TORCHAO["int8"])
    model = retrofit(before, 1, 1, 3)
    assert_close(answer(model, batch), answer(before, batch))
    assert torch.equal(answer(unretrofit(model), batch), answer(before, batch))


def test_refuses_what_it_cannot_do(folder, tmp_path):
    with pytest.raises(ValueError, match="quantized in memory can't be saved whole: save its adapters"):
        retrofit(quantized("memory-int8", folder), 1).save_pretrained(tmp_path)
    before = quantized("bitsandbytes-nf4", folder)
    before.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="An evaluation packed these 4-bit weights"):
        retrofit(before, 1)
