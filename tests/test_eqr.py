"""EqR: what its official code computed from random weights and given latents, and what its training adds."""

import pytest
import torch
import yaml
from conftest import assert_close, build, tokens
from test_published import recorded

from feedback_transformers import FeedbackConfig, FeedbackForMaskedLM, FeedbackState
from feedback_transformers.conversion import convert, family_of, load_official, to_official
from feedback_transformers.models.feedback_recursions import LowState

each_file = pytest.mark.parametrize("name", ["eqr", "eqr_mlp"])
LEVELS = {"feedback_recursion": "hierarchical", "feedback_connection": "sum", "initial_state": "random"}


def load(name: str, **fields):
    """Return the model, inputs and outputs, and the latents that the official code began with."""
    config, weights, case = recorded(name)
    return convert(config, weights, **fields).eval(), case, FeedbackState(case["z_H"], None, LowState(case["z_L"]))


@each_file
@torch.no_grad()
def test_every_supervision_step_is_the_official_one(name):
    model, case, state = load(name)
    assert model.config.relaxation == 0.8
    outputs = model(case["input_ids"], feedback_state=state, output_feedback_states=True)
    every = model.config.supervision_interval
    assert_close(torch.stack(model.step_logits(outputs))[every - 1 :: every], case["logits_by_supervision_step"], 1e-5)
    assert_close(torch.stack(outputs.halting_logits), case["q_by_supervision_step"], 1e-5)
    assert_close(outputs.feedback_state.h, case["last_z_H"], 1e-5)
    assert_close(outputs.feedback_state.cell[0], case["last_z_L"], 1e-5)


@each_file
@torch.no_grad()
def test_supervision_steps_go_on_from_a_carried_state(name):
    model, case, state = load(name)
    for logits in case["logits_by_supervision_step"]:
        outputs = model(case["input_ids"], num_feedback_steps=model.config.supervision_interval, feedback_state=state)
        state = outputs.feedback_state.detach()
        assert_close(outputs.logits, logits, 1e-5)


@pytest.mark.parametrize("slip", ["relaxation", "latents"])
@torch.no_grad()
def test_a_slip_is_seen(slip):
    model, case, state = load("eqr")
    if slip == "relaxation":
        model.config.relaxation = 0.81
    else:
        state = FeedbackState(case["z_L"], None, LowState(case["z_H"]))
    outputs = model(case["input_ids"], feedback_state=state, num_feedback_steps=2)
    assert (outputs.logits - case["logits_by_supervision_step"][0]).abs().max() > 1e-3


@each_file
@torch.no_grad()
def test_saved_loaded_and_written_back(name, tmp_path):
    config, weights, case = recorded(name)
    model, _, state = load(name)
    model.save_pretrained(tmp_path)
    loaded, info = FeedbackForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    official, back = to_official(loaded, "eqr")
    assert {key: official[key] for key in config if key not in ("batch_size", "expansion", "pos_encodings")} == {
        key: value for key, value in config.items() if key not in ("batch_size", "expansion", "pos_encodings")
    }
    named = {key.removeprefix("inner."): weight for key, weight in weights.items()}
    assert back.keys() == named.keys() and all(torch.equal(back[key], named[key]) for key in named)
    given = {"input_ids": case["input_ids"], "feedback_state": state}
    again = convert(official, back).eval()
    assert torch.equal(again(**given).logits, model(**given).logits)


@pytest.mark.parametrize("name", ["eqr", "eqr_mlp", "trm_mlp"])
def test_a_folder_of_its_training_loads(name, tmp_path):
    config, weights, _ = recorded(name)
    arch = {key: value for key, value in config.items() if key not in ("seq_len", "vocab_size")}
    (tmp_path / "all_config.yaml").write_text(yaml.safe_dump({"arch": {**arch, "halt_max_steps": 2}}))
    torch.save({f"_orig_mod.model.{key}": weight for key, weight in weights.items()}, tmp_path / "step_100")
    if name == "eqr":
        with pytest.raises(ValueError, match="lacks seq_len: add a puzzle's number of cells"):
            load_official(tmp_path)
        (tmp_path / "all_config.yaml").write_text(yaml.safe_dump({"arch": arch, "seq_len": 9}))
    official, read = load_official(tmp_path)
    assert family_of(official, read).name == name.removesuffix("_mlp")
    assert (official["seq_len"], official["vocab_size"]) == (config["seq_len"], 11)
    model = FeedbackForMaskedLM.from_pretrained(tmp_path)
    assert model.config.max_position_embeddings == config["seq_len"] + model.config.num_prefix_tokens


@pytest.mark.parametrize(
    "asked", [{"pos_encodings": "rope2d"}, {"pos_encodings": None}, {"L_init_std": 0.5}], ids=lambda asked: str(asked)
)
def test_what_is_not_built_is_refused_by_name(asked):
    config, weights, _ = recorded("eqr")
    with pytest.raises(ValueError, match=f"asks for {next(iter(asked))}=.*not built here"):
        convert({**config, **asked}, weights)


# What begins at random


def test_the_preset_begins_as_its_authors_begin():
    """At normal draws that are cut at two standard deviations, and have one of 1 then."""
    config = FeedbackConfig.preset("eqr", vocab_size=11, hidden_size=256, num_low_steps=1, num_feedback_steps=3)
    model = FeedbackForMaskedLM(config)
    e = torch.empty(1, 64, 256)
    context = type("Places", (), {"position_ids": torch.arange(64)[None]})()
    for training in (True, False):
        h, _, (low,) = model.train(training).model.loop.initial(e, context)
        for drawn in (h, low):
            assert drawn.std().item() == pytest.approx(1, abs=0.02)
            assert 2.2 < drawn.abs().max() <= 2 * config.initial_state_scale
        assert abs(torch.corrcoef(torch.stack([h.flatten(), low.flatten()]))[0, 1]) < 0.05
    assert "model.loop.cell.low_state" not in model.state_dict()


@torch.no_grad()
def test_both_latents_are_drawn_by_place_and_seed():
    model, batch = build(**LEVELS), tokens(2, 5)
    given = {"num_feedback_steps": 1, "use_cache": False}
    first = model(batch, **given).logits
    assert torch.equal(model(batch, **given).logits, first)
    loop, seen = model.model.loop, {}
    loop.register_forward_pre_hook(lambda _, args: seen.update(e=args[0], context=args[1]))
    model(batch, **given)
    begun = loop.initial(seen["e"], seen["context"])
    assert_close(model(batch, feedback_state=begun, **given).logits, first, 1e-6)
    assert_close(model(batch, feedback_state=FeedbackState(begun.h), **given).logits, first, 1e-6)
    model.config.initial_state_seed = 1
    again = loop.initial(seen["e"], seen["context"])
    assert (again.cell[0] - begun.cell[0]).abs().max() > 0.1


# Relaxation and noise


@pytest.mark.parametrize("recursion", ["hierarchical", "refinement"])
@torch.no_grad()
def test_relaxation_goes_a_part_of_the_way(recursion):
    """One step of each latent by hand, from the stacks of a model without."""
    fields = {**LEVELS, "feedback_recursion": recursion, "num_low_steps": 1, "feedback_type": "mlp"}
    model = build(**fields, relaxation=0.3)
    loop, seen = model.model.loop, {}
    loop.register_forward_pre_hook(lambda _, args: seen.update(e=args[0], context=args[1]))
    made = model(tokens(2, 5), num_feedback_steps=1, use_cache=False).feedback_state
    begun, e, context = loop.initial(seen["e"], seen["context"]), seen["e"], seen["context"]
    x = loop.connect(e, begun.h, context)
    if recursion == "hierarchical":
        (low,) = begun.cell
        low = 0.7 * low + 0.3 * loop.cell.think(low + x, context)
        assert_close(made.cell[0], low, 1e-6)
        expected = 0.7 * begun.h + 0.3 * loop.cell.answer(begun.h + low, context)
    else:
        z = 0.7 * begun.h + 0.3 * loop.cell(x, context)
        expected = 0.7 * z + 0.3 * loop.cell(z, context)
    assert_close(made.h, expected, 1e-6)


@pytest.mark.parametrize("recursion", ["hierarchical", "refinement"])
@torch.no_grad()
def test_noise_is_added_in_training_only(recursion):
    fields = {**LEVELS, "initial_state": "learned", "feedback_recursion": recursion}
    quiet, noisy, batch = build(**fields), build(**fields, state_noise=0.1), tokens()
    assert torch.equal(noisy(batch).logits, quiet(batch).logits)
    quiet.train(), noisy.train()
    state = quiet(batch, num_feedback_steps=2).feedback_state
    given = {"num_feedback_steps": 1, "feedback_state": state}
    change = noisy(batch, **given).feedback_state.h - quiet(batch, **given).feedback_state.h
    assert change.std() > 0.09
    assert torch.equal(quiet(batch, **given).logits, quiet(batch, **given).logits)
