"""Every method of PEFT opens the feedback of a fresh retrofit, or says in one sentence what would."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaConfig, LlamaForCausalLM

from feedback_transformers import retrofit
from feedback_transformers.models import feedback_loop

IDS = torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(0))
# What the methods need beside their defaults in a model as small as this one.
SMALL = {
    "ADALORA": {"total_step": 10},
    "ADAMSS": {},
    "BEFT": {},
    "BOFT": {},
    "C3A": {"block_size": 4},
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 20},
    "FROD": {"sparse_rate": 0.05},
    "GLORA": {},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "HIRA": {},
    "HRA": {},
    "IA3": {},
    "LILY": {},
    "LN_TUNING": {},
    "LOHA": {},
    "LOKR": {},
    "LORA": {},
    "MISS": {"r": 4},
    "OFT": {},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {"r": 4},
    "PVERA": {},
    "RANDLORA": {},
    "ROAD": {"group_size": 2},
    "SHIRA": {"r": 4},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "UNILORA": {},
    "VBLORA": {"vector_length": 4, "num_vectors": 16},
    "VERA": {},
    "WAVEFT": {"n_frequency": 20},
}
METHODS = {name: (PEFT_TYPE_TO_CONFIG_MAPPING[name], fields) for name, fields in SMALL.items()} | {
    "DoRA": (LoraConfig, {"use_dora": True}),
    "PiSSA": (LoraConfig, {"init_lora_weights": "pissa"}),
    "OLoRA": (LoraConfig, {"init_lora_weights": "olora"}),
    "all-linear DoRA": (LoraConfig, {"use_dora": True, "target_modules": "all-linear"}),
    "named IA3": (
        PEFT_TYPE_TO_CONFIG_MAPPING["IA3"],
        {"target_modules": ["k_proj", "signal_proj"], "feedforward_modules": []},
    ),
    "told DoRA": (LoraConfig, {"use_dora": True, "modules_to_save": ["connection"]}),
}
UNMERGEABLE = ("BEFT", "LILY")  # PEFT merges no bias into a layer without one, and nothing of Lily


def llama(layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers)).eval()


def train(model: torch.nn.Module, steps: int = 4) -> float:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


@torch.no_grad()
def opened(model: PeftModel) -> bool:
    """Whether the connection tells one signal from another."""
    connection, e = model.base_model.model.model.loop.connection, torch.randn(1, 1, 32)
    return not torch.equal(connection(e, torch.randn(1, 1, 32)), connection(e, torch.randn(1, 1, 32)))


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The warnings of the loop, each as often as it is given."""
    sentences: list[str] = []
    monkeypatch.setattr(feedback_loop.logger, "warning_once", sentences.append, raising=False)
    return sentences


@pytest.mark.parametrize("connection", ["gate", "add", "concat"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_opens_the_feedback(method, connection, said, tmp_path):
    config, fields = METHODS[method]
    model = retrofit(llama(), 1, 1, 2, feedback_connection=connection)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config(task_type="CAUSAL_LM", **fields))
    assert not opened(adapted) or method in ("UNILORA", "C3A", "DEFT", "VBLORA", "OSF", "FOURIERFT")  # begin elsewhere
    assert math.isfinite(train(adapted))
    assert opened(adapted) and not said
    logits = adapted(input_ids=IDS).logits
    assert logits.isfinite().all()

    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(retrofit(llama(), 1, 1, 2, feedback_connection=connection), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, logits, atol=1e-5, rtol=1e-4)
    if method not in UNMERGEABLE:
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["DoRA", "IA3", "LORA"])
def test_a_fresh_adapter_leaves_the_retrofit_bit_equal(method):
    original = llama()
    config, fields = METHODS[method]
    adapted = get_peft_model(retrofit(llama(), 1, 1, 2), config(task_type="CAUSAL_LM", **fields)).eval()
    assert torch.equal(adapted(input_ids=IDS).logits, original(IDS).logits) or method == "DoRA"
    torch.testing.assert_close(adapted(input_ids=IDS).logits, original(IDS).logits, atol=1e-6, rtol=0)


CLOSED = {
    "other targets": (LoraConfig, {"target_modules": ["q_proj", "v_proj"]}),
    "other targets, DoRA": (LoraConfig, {"target_modules": ["q_proj", "v_proj"], "use_dora": True}),
    "prompts": (PromptTuningConfig, {"num_virtual_tokens": 2}),
    "tokens": (TrainableTokensConfig, {"token_indices": [3, 4]}),
}


@pytest.mark.parametrize("method", CLOSED)
def test_a_closed_connection_that_nothing_trains_is_reported(method, said):
    config, fields = CLOSED[method]
    model = get_peft_model(retrofit(llama(), 1, 1, 2), config(task_type="CAUSAL_LM", **fields))
    model.eval()(input_ids=IDS)
    assert not said
    train(model, 1)
    assert len(said) == 1 and "modules_to_save=['connection']" in said[0]


def test_the_reported_remedy_opens_it(said):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["connection"])
    model = get_peft_model(retrofit(llama(), 1, 1, 2), config)
    train(model)
    assert opened(model) and not said


def test_an_open_connection_is_adapted_as_any_other_part():
    """Its projections are no zeros any more, so DoRA and IA3 take them."""
    model = retrofit(llama(), 1, 1, 2)
    for projection in (model.model.loop.connection.signal_proj, model.model.loop.connection.gate_proj):
        torch.nn.init.normal_(projection.weight, std=0.1)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", use_dora=True))
    assert adapted.peft_config["default"].modules_to_save is None
    assert any("signal_proj.lora_magnitude_vector" in name for name, _ in adapted.named_parameters())
    assert math.isfinite(train(adapted))


def adapted_layers(model: PeftModel) -> list[str]:
    start = "base_model.model.model."
    return [
        n.removeprefix(start).removesuffix(".self_attn.q_proj")
        for n, m in model.named_modules()
        if hasattr(m, "lora_A")
    ]


@pytest.mark.parametrize("pattern", [None, "layers", ["layers"]])
@pytest.mark.parametrize(
    ("number", "layer"),
    [
        (0, ["encoder.layers.0"]),
        (3, ["loop.cell.layers.1"]),
        (5, ["decoder.layers.1"]),
        ([1, 2], ["encoder.layers.1", "loop.cell.layers.0"]),
    ],
)
def test_layers_keep_the_numbers_of_the_original(number, layer, pattern, tmp_path):
    """The weights that are adapted are those that PEFT adapts in the original for the same numbers."""
    fields = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "layers_to_transform": number}
    config = LoraConfig(**fields, layers_pattern=pattern, init_lora_weights=False)
    model = get_peft_model(retrofit(llama(6), 2, 2), config).eval()
    assert adapted_layers(model) == layer
    original = get_peft_model(llama(6), LoraConfig(**fields))
    matched = [p for n, p in original.named_parameters() if "q_proj.base_layer" in n]
    taken = [p for n, p in model.named_parameters() if "q_proj.base_layer" in n]
    assert len(matched) == len(taken) and all(map(torch.equal, taken, matched))

    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(retrofit(llama(6), 2, 2), tmp_path).eval()
    assert adapted_layers(again) == layer
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_pattern_names_the_part():
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=r"loop\.cell\.layers")
    assert adapted_layers(get_peft_model(retrofit(llama(6), 2, 2), config)) == ["loop.cell.layers.1"]


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"names \[6\], but this model has the layers 0 to 5"):
        get_peft_model(retrofit(llama(6), 2, 2), LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 6]))


def test_a_saved_adapter_keeps_its_own_numbers():
    """Those of 0.1.0 counted each part from 0."""
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], inference_mode=True)
    layers = ["encoder.layers.0", "loop.cell.layers.0", "decoder.layers.0"]
    assert adapted_layers(get_peft_model(retrofit(llama(6), 2, 2), config)) == layers


def test_a_second_adapter_is_prepared_too():
    model = get_peft_model(retrofit(llama(6), 2, 2), LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]))
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], layers_to_transform=[5]))
    assert [n for n, m in model.named_modules() if hasattr(m, "lora_A") and "other" in m.lora_A] == [
        "base_model.model.model.decoder.layers.1.self_attn.q_proj"
    ]
