"""Published models: what the official code computed from tiny random weights, recorded in tests/published.

Each file holds weights under their official names, inputs, and the outputs of the official code, which its metadata
names. Live models of transformers are compared as they are. The recurrences of the puzzle models are chaotic with
random weights, so that a rounding error grows; with one thread the results are bit-equal.
"""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import assert_close, tokens
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_examples import examples_on_path  # noqa: F401 - a fixture
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertModel,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    HrmTextConfig,
    HrmTextForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from feedback_transformers import (
    FeedbackConfig,
    FeedbackForCausalLM,
    FeedbackForMaskedLM,
    FeedbackForSequenceClassification,
    FeedbackModel,
    cli,
    data,
)
from feedback_transformers.conversion import FAMILIES, convert, family_of, load_official, to_official
from feedback_transformers.conversion.mapping import PairedRows, SwappedColumns

FILES = Path(__file__).parent / "published"
PUZZLES = ("trm", "trm_mlp", "trm_singlez", "hrm")
TEXTS = ("ouro", "huginn", "retrofit_llama", "retrofit_olmo")
FAMILY = {"trm_mlp": "trm", "retrofit_llama": "retrofitted_llama", "retrofit_olmo": "retrofitted_olmo"}


def recorded(name: str) -> tuple[dict, dict, dict]:
    """Return the official config, the official weights, and inputs and outputs."""
    with safe_open(FILES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it can't be iterated
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("state."): tensor for key, tensor in tensors.items() if key.startswith("state.")}
    return config, weights, {key: tensor for key, tensor in tensors.items() if not key.startswith("state.")}


def load(name: str, **fields):
    config, weights, case = recorded(name)
    model = convert(config, weights, **fields).eval()
    if model.config.initial_state == "random":
        model.config.initial_state_scale = 0.0  # as the outputs were recorded
    return model, case


def calls(name: str, case: dict) -> list[tuple[dict, torch.Tensor]]:
    """Return arguments of a text model, and the official logits."""
    if name == "ouro":
        return [({}, case["logits"])]
    return [({"num_feedback_steps": steps}, case[f"logits_num_steps_{steps}"]) for steps in (1, 4, 7)]


def answers(model, case: dict):
    """Return logits and q of each supervision step of a puzzle model."""
    outputs = model(case["input_ids"], prefix_ids=case["puzzle_identifiers"], output_feedback_states=True)
    every = model.config.supervision_interval
    return torch.stack(model.step_logits(outputs))[every - 1 :: every], torch.stack(outputs.halting_logits)


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_logits_are_the_official_ones(name):
    model, case = load(name)
    for arguments, logits in calls(name, case):
        assert_close(model(case["input_ids"], **arguments).logits, logits, 1e-5)


@pytest.mark.parametrize("threshold", [0.3, 0.6])
@torch.no_grad()
def test_exits_are_the_official_ones(threshold):
    model, case = load("ouro", halting_threshold=threshold)
    outputs = model(case["input_ids"])
    assert_close(outputs.logits, case[f"logits_exit_threshold_{threshold}"], 1e-5)
    assert 1 < outputs.num_feedback_steps.float().mean() < 3


@pytest.mark.parametrize("name", PUZZLES)
@torch.no_grad()
def test_every_supervision_step_is_the_official_one(name):
    model, case = load(name)
    logits, q = answers(model, case)
    assert_close(logits, case["logits_by_supervision_step"], 1e-5)
    assert_close(q, case["q_by_supervision_step"], 1e-5)
    assert torch.equal(model(case["input_ids"], prefix_ids=case["puzzle_identifiers"]).logits, logits[-1])


@pytest.mark.parametrize("name", PUZZLES)
@torch.no_grad()
def test_supervision_steps_go_on_from_a_carried_state(name):
    """As the official training does, a call at a time."""
    model, case = load(name)
    expected, state = case["logits_by_supervision_step"], None
    for logits in expected:
        outputs = model(
            case["input_ids"],
            prefix_ids=case["puzzle_identifiers"],
            num_feedback_steps=model.config.supervision_interval,
            feedback_state=state,
        )
        state = outputs.feedback_state.detach()
        assert_close(outputs.logits, logits, 1e-5)


@pytest.mark.parametrize("name", TEXTS)
@torch.no_grad()
def test_cached_in_pieces(name):
    model, case = load(name)
    for arguments, logits in calls(name, case):
        cache, made = None, []
        for start, stop in ((0, 4), (4, 5), (5, 9)):
            piece = case["input_ids"][:, start:stop]
            outputs = model(piece, past_key_values=cache, use_cache=True, **arguments)
            cache, made = outputs.past_key_values, [*made, outputs.logits]
        assert_close(torch.cat(made, dim=1), logits, 1e-4)


@pytest.mark.parametrize("name", [*TEXTS, *PUZZLES])
@torch.no_grad()
def test_padding_changes_nothing(name):
    model, case = load(name)
    ids, given = case["input_ids"], {"num_feedback_steps": 2}
    if name in PUZZLES:  # with as few steps as there can be, since rounding errors grow
        ids, given = ids[:, :6], {"num_feedback_steps": 1, "prefix_ids": case["puzzle_identifiers"]}
        model.config.num_low_steps = 1
    alone, width = model(ids, **given).logits, 3
    padded = torch.cat([ids.new_zeros(2, width), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :width] = 0
    assert_close(model(padded, attention_mask=mask, **given).logits[:, width:], alone, 1e-4)


@pytest.mark.parametrize("name", [*TEXTS, *PUZZLES])
@torch.no_grad()
def test_saved_loaded_and_written_back(name, tmp_path):
    config, weights, case = recorded(name)
    model = convert(config, weights).eval()
    given = {"prefix_ids": case["puzzle_identifiers"]} if name in PUZZLES else {}
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded(case["input_ids"], **given).logits, model(case["input_ids"], **given).logits)
    family = FAMILY.get(name, name)
    official, back = to_official(loaded, family)
    named = {key.removeprefix("inner."): weight for key, weight in weights.items()}
    assert back.keys() == named.keys() and all(torch.equal(back[key], named[key]) for key in named)
    again = convert(official, back, family).eval()
    assert torch.equal(again(case["input_ids"], **given).logits, model(case["input_ids"], **given).logits)


@pytest.mark.parametrize("name", TEXTS)
def test_a_published_folder_loads_by_its_type(name, tmp_path):
    config, weights, case = recorded(name)
    kind = "ouro" if name == "ouro" else "huginn_raven"
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    tied = {"lm_head.weight": weights["transformer.wte.weight"].clone()} if name == "huginn" else {}
    rotary = {"freqs_cis": torch.zeros(1, 4, 1, 4, 2)} if name != "ouro" else {}
    save_file({**weights, **tied, **rotary}, tmp_path / "model.safetensors")
    for loaded in (
        FeedbackForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, initial_state_scale=0.0),
    ):
        assert type(loaded) is FeedbackForCausalLM and loaded.config.model_type == "feedback"
        loaded.config.initial_state_scale = 0.0
        for arguments, logits in calls(name, case):
            assert_close(loaded(case["input_ids"], **arguments).logits, logits, 1e-5)
    assert type(AutoModel.from_pretrained(tmp_path)) is FeedbackModel
    classifier = FeedbackForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classifier(case["input_ids"]).logits.shape == (2, 3)
    assert AutoConfig.from_pretrained(tmp_path).model_type == kind
    assert load_official(tmp_path)[1].keys() >= weights.keys()


# A comparison that could not fail would be worth nothing.


@pytest.mark.parametrize("change", ["rotary halves", "columns", "eps", "order of norms"])
@torch.no_grad()
def test_a_slip_is_seen(change):
    model, case = load("huginn")
    loop = model.model.loop
    if change == "rotary halves":
        projection = loop.cell.layers[0].self_attn.q_proj
        projection.weight.copy_(PairedRows(32, head_dim=8, rotated=1).pairs(projection.weight))
    elif change == "columns":
        loop.connection.signal_proj.weight.copy_(SwappedColumns().split(loop.connection.signal_proj.weight)[0])
    elif change == "eps":
        model.model.norm.eps = 1e-5 * 10
    else:
        layer = loop.cell.layers[0]
        layer.attention_norm, layer.mlp_norm = layer.mlp_norm, layer.attention_norm
    difference = model(case["input_ids"], num_feedback_steps=4).logits - case["logits_num_steps_4"]
    assert difference.abs().max() > 1e-4


def test_a_start_at_the_input_is_written_back():
    config, weights, _ = recorded("retrofit_llama")
    model = convert({**config, "initial_state_mode": "embed-init"}, weights)
    assert model.config.initial_state == "input"
    assert to_official(model, "retrofitted_llama")[0]["initial_state_mode"] == "embed-init"


def test_a_missing_and_an_unknown_weight_are_named():
    config, weights, _ = recorded("ouro")
    fewer = {key: weight for key, weight in weights.items() if key != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"This ouro checkpoint lacks model.loop.norm.weight"):
        convert(config, fewer)
    with pytest.raises(ValueError, match=r"The checkpoint holds model.other.weight, which no part of this family has"):
        convert(config, {**weights, "model.other.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="is of no family that loads here: .*ouro, nanbeige"):
        family_of({"model_type": "bloom"}, [])


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("ouro", {"use_sliding_window": True}),
        ("nanbeige", {"loop_share_kv": True}),
        ("nanbeige", {"use_ngram_embedding": True}),
        ("huginn", {"injection_type": "gate"}),
        ("trm", {"pos_encodings": "learned"}),
    ],
)
def test_what_is_not_built_is_refused_by_name(name, asked):
    config = {"num_hidden_layers": 1} if name == "nanbeige" else recorded(name)[0]
    (field,) = asked
    with pytest.raises(ValueError, match=f"asks for {field}=.*not built here"):
        FAMILIES[name].config({**config, **asked})


@pytest.mark.parametrize("config", [{"model_type": "parcae"}, {"_class_name": "ParcaeConfig"}])
def test_a_parcae_is_refused_by_name(config, tmp_path):
    with pytest.raises(ValueError, match="A Parcae has value embeddings .*only its injection is"):
        family_of(config, [])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="A Parcae has value embeddings"):
        FeedbackForCausalLM.from_pretrained(tmp_path)


def test_another_function_is_not_written_as_a_family():
    model = FeedbackForCausalLM(FeedbackConfig(vocab_size=20, hidden_size=32))
    with pytest.raises(ValueError, match="A ouro has num_encoder_layers=0, and this model 1"):
        to_official(model, "ouro")


# Live models


def filled(model):
    """Return a model whose every parameter is random, so that no part hides behind zeros or ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1) * 0.5)
    return model.eval()


@pytest.mark.parametrize("passes", [1, 2, 4])
@torch.no_grad()
def test_nanbeige_is_a_llama_in_a_loop(passes):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "rope_theta": 7e7}
    config = LlamaConfig(**sizes, tie_word_embeddings=False, attn_implementation="eager")
    llama, ids = filled(LlamaForCausalLM(config)), torch.arange(3, 21).view(2, 9)
    states = llama.model.embed_tokens(ids)
    for _ in range(passes):
        states = llama.model(inputs_embeds=states).last_hidden_state
    official = {**config.to_dict(), "model_type": "nanbeige", "num_loops": passes}
    ours = convert(official, llama.state_dict()).eval()
    assert_close(ours(ids).logits, llama.lm_head(states), 1e-5)


@pytest.mark.parametrize("prefix", [False, True])
@torch.no_grad()
def test_hrm_text_of_transformers(prefix):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    config = HrmTextConfig(**sizes, num_hidden_layers=2, H_cycles=2, L_cycles=3, embedding_scale=3.0)
    official, ids = filled(HrmTextForCausalLM(config)), torch.arange(3, 21).view(2, 9)
    ours = convert(config.to_dict(), official.state_dict()).eval()
    types = {"token_type_ids": (torch.arange(9) < 5).long().expand(2, 9)} if prefix else {}
    assert_close(ours(ids, **types).logits, official(ids, **types).logits, 1e-5)
    plain = ours(ids).logits
    assert (plain - ours(ids, token_type_ids=(torch.arange(9) < 5).long().expand(2, 9)).logits).abs().max() > 1e-3
    padded = torch.cat([ids.new_zeros(2, 3), ids], dim=1)
    mask = (torch.arange(12) >= 3).long().expand(2, 12)
    kinds = {key: torch.cat([value.new_zeros(2, 3), value], dim=1) for key, value in types.items()}
    expected = official(ids, **types).logits
    assert_close(ours(padded, attention_mask=mask, **kinds).logits[:, 3:], expected, 1e-5)
    first = ours(ids[:, :6], **{key: value[:, :6] for key, value in types.items()}, use_cache=True)
    second = ours(ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(torch.cat([first.logits, second.logits], dim=1), expected, 1e-4)
    back_config, back = to_official(ours, "hrm_text")
    again = HrmTextForCausalLM(HrmTextConfig(**back_config)).eval()
    again.load_state_dict(back)
    assert torch.equal(again(ids, **types).logits, official(ids, **types).logits)


@torch.no_grad()
def test_base_models_load_as_base_models(tmp_path):
    """Those of transformers and of remote code save their weights without a prefix."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    albert, ids = filled(AlbertModel(AlbertConfig(**sizes, embedding_size=16, num_hidden_layers=3))), tokens(2, 9) % 50
    albert.save_pretrained(tmp_path / "albert")
    ours = FeedbackModel.from_pretrained(tmp_path / "albert")
    assert_close(ours(ids).last_hidden_state, albert(ids).last_hidden_state, 1e-5)
    classifier = FeedbackForSequenceClassification.from_pretrained(tmp_path / "albert", num_labels=3)
    assert torch.equal(classifier.model(ids).last_hidden_state, ours(ids).last_hidden_state)
    with pytest.raises(ValueError, match="albert checkpoint lacks lm_head"):
        FeedbackForMaskedLM.from_pretrained(tmp_path / "albert")
    config, weights, case = recorded("ouro")
    body = {name.removeprefix("model."): weight for name, weight in weights.items() if name.startswith("model.")}
    whole, base = (convert(config, given, head=FeedbackModel).eval() for given in (weights, body))
    assert torch.equal(whole(case["input_ids"])[0], base(case["input_ids"])[0])


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_albert_of_transformers(layers, tmp_path):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"embedding_size": 16, "num_hidden_layers": 5, "inner_group_num": layers, "max_position_embeddings": 40}
    official, ids = filled(AlbertForMaskedLM(AlbertConfig(**sizes))), torch.arange(3, 21).view(2, 9)
    ours = convert(official.config.to_dict(), official.state_dict()).eval()
    types = (torch.arange(9) > 4).long().expand(2, 9)
    expected = official(ids, token_type_ids=types).logits
    assert_close(ours(ids, token_type_ids=types).logits, expected, 1e-5)
    assert_close(ours(inputs_embeds=ours.get_input_embeddings()(ids), token_type_ids=types).logits, expected, 1e-5)
    padded, mask = torch.cat([ids.new_zeros(2, 3), ids], dim=1), (torch.arange(12) >= 3).long().expand(2, 12)
    kinds = torch.cat([types.new_zeros(2, 3), types], dim=1)
    assert_close(ours(padded, attention_mask=mask, token_type_ids=kinds).logits[:, 3:], expected, 1e-5)
    official.save_pretrained(tmp_path / "theirs")
    FeedbackForMaskedLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    loaded = FeedbackForMaskedLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded(ids).logits, ours(ids).logits)
    config, back = to_official(loaded, "albert")
    again = AlbertForMaskedLM(AlbertConfig(**config)).eval()
    assert set(again.load_state_dict(back, strict=False).missing_keys) == {
        "predictions.decoder.weight",
        "predictions.decoder.bias",
    }
    again.tie_weights()
    assert torch.equal(again(ids).logits, official(ids).logits)
    loaded.resize_token_embeddings(60)
    assert loaded(ids).logits.shape == (2, 9, 60) and loaded.lm_head.bias.shape == (60,)
    with pytest.raises(ValueError, match="asks for num_hidden_groups=2"):
        FAMILIES["albert"].config({**official.config.to_dict(), "num_hidden_groups": 2})


# Sizes without weights


def test_ouro_has_the_published_number_of_parameters():
    official = {
        "model_type": "ouro",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "intermediate_size": 5632,
        "vocab_size": 49152,
        "rope_theta": 1e6,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        model = FeedbackForCausalLM(FAMILIES["ouro"].config(official))
    assert model.num_parameters() == 2_667_974_657


# What the originals lack


@pytest.mark.parametrize("name", TEXTS)
def test_generates_in_batches_with_padding(name):
    model, case = load(name)
    ids = case["input_ids"][:, :6]
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)[:, -4:]
    padded = torch.cat([ids.new_zeros(2, 3), ids], dim=1)
    mask = (torch.arange(9) >= 3).long().expand(2, 9)
    for use_cache in (True, False):
        written = model.generate(padded, attention_mask=mask, use_cache=use_cache, **asked)
        assert torch.equal(written[:, -4:], alone)


@pytest.mark.parametrize("name", [*TEXTS, *PUZZLES])
def test_lora_adapts_every_projection_by_default(name):
    model, case = load(name)
    given = {"prefix_ids": case["puzzle_identifiers"]} if name in PUZZLES else {}
    adapted = get_peft_model(model, LoraConfig(r=2)).train()
    adapted(input_ids=case["input_ids"], labels=case["input_ids"] % 11, **given).loss.backward()
    projections = [n for n, m in model.named_modules() if n.endswith("_proj") and "halt_proj" not in n]
    learned = {n.split(".lora_B")[0] for n, p in adapted.named_parameters() if "lora_B" in n and p.grad.any()}
    assert projections and learned == {f"base_model.model.{name}" for name in projections}


@pytest.mark.parametrize("name", ["trm", "hrm"])
def test_a_puzzle_model_trains_as_a_masked_language_model(name):
    model, case = load(name)
    assert type(model) is FeedbackForMaskedLM
    loss = model.train()(case["input_ids"], prefix_ids=case["puzzle_identifiers"], labels=case["input_ids"]).loss
    loss.backward()
    assert loss.isfinite() and model.model.prefixes.weight.grad.any()


# Scripts and the command line


def write(folder: Path, name: str) -> dict:
    """Write a published text model to a folder; return its inputs and outputs."""
    folder.mkdir(exist_ok=True)
    config, weights, case = recorded(name)
    kind = "ouro" if name == "ouro" else "huginn_raven"
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    save_file(weights, folder / "model.safetensors")
    return case


def test_the_command_line_converts_both_ways(tmp_path, capsys):
    case = write(tmp_path / "theirs", "ouro")
    cli.main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")])
    assert "a model of the family ouro, as a FeedbackForCausalLM" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_close(model(case["input_ids"]).logits, case["logits"], 1e-5)
    cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "ouro"])
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("theirs", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    written = json.loads((tmp_path / "back/config.json").read_text())
    expected = recorded("ouro")[0]
    assert all(expected[key] == value for key, value in written.items() if key not in ("model_type", "architectures"))
    with pytest.raises(SystemExit, match="A nanbeige has norm_placement='family', and this model 'sandwich'"):
        cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "no"), "--to", "nanbeige"])


def test_verify_says_what_was_compared(tmp_path, capsys):
    write(tmp_path / "ouro", "ouro")
    cli.main(["verify", str(tmp_path / "ouro")])
    printed = capsys.readouterr().out
    assert "family ouro, 27 weights, each of which has its place" in printed
    assert "NOT compared with the official code: it is not here, and the checkpoint brings none" in printed
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
    filled(HrmTextForCausalLM(HrmTextConfig(**sizes, num_hidden_layers=1))).save_pretrained(tmp_path / "hrm")
    cli.main(["verify", str(tmp_path / "hrm")])
    printed = capsys.readouterr().out
    assert "the largest difference is" in printed and "Not compared: its tokenizer" in printed


THEIR_CODE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class NanbeigeForCausalLM(PreTrainedModel):
    config_class = LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids):
        states = self.model.embed_tokens(input_ids)
        for _ in range(self.config.num_loops):
            states = self.model(inputs_embeds=states).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(states))
"""


def test_verify_runs_code_that_is_trusted(tmp_path, capsys):
    """And only that."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    llama = filled(LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, tie_word_embeddings=False)))
    llama.save_pretrained(tmp_path)
    code = {"AutoModelForCausalLM": "modeling_nanbeige.NanbeigeForCausalLM"}
    config = {**llama.config.to_dict(), "model_type": "nanbeige", "num_loops": 3, "auto_map": code}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_nanbeige.py").write_text(THEIR_CODE)
    cli.main(["verify", str(tmp_path)])
    assert "NOT compared with the official code: give --trust_remote_code to run what" in capsys.readouterr().out
    cli.main(["verify", str(tmp_path), "--trust_remote_code"])
    found = re.search("the largest difference is (.*)[.]", capsys.readouterr().out)
    assert float(found[1]) < 1e-5


@pytest.mark.parametrize("kind", ["ouro", "hrm_text"])
def test_a_script_trains_a_published_folder(kind, tmp_path, examples_on_path):  # noqa: F811
    if kind == "ouro":
        write(tmp_path / "it", "ouro")
    else:
        sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
        HrmTextForCausalLM(HrmTextConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path / "it")
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 200)
    data.characters([(tmp_path / "text.txt").read_text()]).save_pretrained(tmp_path / "it")
    script = importlib.import_module("run_clm")
    arguments = {"model_name_or_path": "it", "train_file": "text.txt", "output_dir": "out", "max_steps": 2}
    arguments = {key: str(tmp_path / value) if key != "max_steps" else value for key, value in arguments.items()}
    script.main([word for key, value in arguments.items() for word in (f"--{key}", str(value))] + ["--smoke"])
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(trained) is FeedbackForCausalLM and trained.config.feedback_connection == "replace"


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": "mistral", "sliding_window": 4}, "model_type"),
    ],
)
def test_layers_that_a_layout_cannot_tell_are_not_written(changed, what):
    model = FeedbackForCausalLM(
        FeedbackConfig.preset(
            "nanbeige", vocab_size=20, hidden_size=32, backbone_config={"model_type": "llama", **changed}
        )
    )
    with pytest.raises(ValueError, match=f"The layers of a nanbeige have {what}="):
        to_official(model, "nanbeige")


def test_auto_classes_pass_on_what_is_asked(tmp_path):
    write(tmp_path, "ouro")
    GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[3, 4]).save_pretrained(tmp_path)
    auto = AutoModelForSequenceClassification
    assert auto.from_pretrained(tmp_path, num_labels=5).num_labels == 5
    assert FeedbackForSequenceClassification.from_pretrained(tmp_path, num_labels=5).num_labels == 5
    names = {0: "bad", 1: "so-so", 2: "good"}
    assert auto.from_pretrained(tmp_path, id2label=names).config.id2label == names
    model = AutoModelForCausalLM.from_pretrained(tmp_path, total_ut_steps=2, dtype=torch.bfloat16)
    assert model.config.num_feedback_steps == 2 and model.dtype == torch.bfloat16
    assert model.generation_config.temperature == 0.7 and model.generation_config.eos_token_id == [3, 4]
    model, info = FeedbackForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, backbone_config={"attention_dropout": 0.1}, halting_threshold=0.5
    )
    assert not any(info.values()) and model.config.backbone_config.attention_dropout == 0.1
    assert model.config.halting_threshold == 0.5
