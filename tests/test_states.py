"""The state of a recursion: where it begins, and that it goes out of one call and into another."""

import pytest
import torch
from conftest import assert_close, build, dataset, pad, tokens
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from feedback_transformers import (
    FeedbackForImageClassification,
    FeedbackForMaskedLM,
    FeedbackForSequenceClassification,
    FeedbackState,
)
from feedback_transformers.models.feedback_cache import FeedbackCache
from feedback_transformers.models.feedback_states import BLOCK, INITIAL_STATES

LEVELS = {"feedback_connection": "sum", "initial_state": "learned"}
KINDS = {
    "transformer": {},
    "gru": {"feedback_type": "gru"},
    "lstm": {"feedback_type": "lstm", "num_feedback_layers": 2},
    "output": {"feedback_signal": "output"},
    "rnn decoder": {"feedback_signal": "output", "decoder_type": "rnn"},
    "hierarchical": {"feedback_recursion": "hierarchical", **LEVELS},
    "layerwise": {"feedback_recursion": "layerwise", "num_feedback_layers": 3},
    "layerwise gru": {"feedback_recursion": "layerwise", "num_feedback_layers": 2, "feedback_type": "gru"},
    "refinement": {"feedback_recursion": "refinement", **LEVELS},
    "relaxed": {"feedback_recursion": "hierarchical", "relaxation": 0.7, **LEVELS},
    "relaxed, random": {"feedback_recursion": "hierarchical", "relaxation": 0.7, **LEVELS, "initial_state": "random"},
    "relaxed refinement": {"feedback_recursion": "refinement", "relaxation": 0.7, **LEVELS},
    "jacobi": {"feedback_axis": "time", "solver": "jacobi"},
    "jacobi, interval": {"feedback_axis": "time", "solver": "jacobi", "feedback_interval": 3},
    "jacobi, output": {"feedback_axis": "time", "solver": "jacobi", "feedback_signal": "output"},
    "gauss_seidel": {"feedback_axis": "time", "solver": "gauss_seidel", "solver_block_size": 4},
    "none": {"feedback_signal": "none", "feedback_type": "gru"},
    "both sides": {"is_causal": False},
    "random": {"initial_state": "random"},
}
each_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)


def head_of(fields: dict):
    return build(FeedbackForMaskedLM, **fields) if fields.get("is_causal") is False else build(**fields)


@each_kind
@torch.no_grad()
def test_k_passes_and_then_the_others_are_all_passes(fields):
    """Bit-equal, also in rows with padding."""
    model = head_of(fields)
    batch, mask = pad(tokens(3, 11), [11, 8, 4], "left")
    for given in ({"input_ids": tokens()}, {"input_ids": batch, "attention_mask": mask}):
        whole = model(**given, num_feedback_steps=5, use_cache=False)
        state = None
        for steps in (2, 1, 2):
            part = model(**given, num_feedback_steps=steps, feedback_state=state, use_cache=False)
            state = part.feedback_state
        real = mask.bool() if "attention_mask" in given else slice(None)
        assert torch.equal(part.logits[real], whole.logits[real])
        assert torch.equal(state.h[real], whole.feedback_state.h[real])
        fewer = model(**given, num_feedback_steps=3, use_cache=False).logits
        assert (fewer - whole.logits).abs().max() > 1e-4 or fields.get("feedback_signal") == "none"


@each_kind
@torch.no_grad()
def test_a_state_is_saved(fields, tmp_path):
    model, batch = head_of(fields), tokens()
    state = model(batch, num_feedback_steps=2, use_cache=False).feedback_state
    torch.save(state.plain(), tmp_path / "state.pt")
    again = FeedbackState(*torch.load(tmp_path / "state.pt"))
    arguments = {"num_feedback_steps": 2, "use_cache": False}
    expected = model(batch, feedback_state=state, **arguments).logits
    assert torch.equal(model(batch, feedback_state=again, **arguments).logits, expected)


def test_a_state_of_tensors_fits_safetensors(tmp_path):
    model, batch = build(), tokens()
    state = model(batch, num_feedback_steps=2, use_cache=False).feedback_state.detach()
    save_file({"h": state.h, "y": state.y}, tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    arguments = {"num_feedback_steps": 2, "use_cache": False}
    expected = model(batch, feedback_state=state, **arguments).logits
    assert torch.equal(model(batch, feedback_state=FeedbackState(**loaded), **arguments).logits, expected)


def test_training_carries_a_detached_state():
    """Each step goes on with the answer of the last one, and the loss of the same rows falls."""
    model, batch, state = build(feedback_recursion="hierarchical", **LEVELS).train(), tokens(), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        outputs = model(batch, labels=batch, num_feedback_steps=2, feedback_state=state)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = outputs.feedback_state.detach()
        losses.append(outputs.loss.item())
    assert not state.h.requires_grad and losses[-1] < 0.8 * losses[0]


@torch.no_grad()
def test_other_heads_take_a_state():
    classifier, batch = build(FeedbackForSequenceClassification), tokens()
    state = classifier(batch, num_feedback_steps=2).feedback_state
    expected = classifier(batch, num_feedback_steps=4).logits
    assert torch.equal(classifier(batch, num_feedback_steps=2, feedback_state=state).logits, expected)
    image = build(FeedbackForImageClassification, input_config={"type": "images", "num_channels": 1}, is_causal=False)
    pixels = torch.randn(2, 1, 8, 8)
    state = image(pixels, num_feedback_steps=2).feedback_state
    expected = image(pixels, num_feedback_steps=4).logits
    assert torch.equal(image(pixels, num_feedback_steps=2, feedback_state=state).logits, expected)


def test_what_cannot_take_a_state_says_so():
    state = build()(tokens(), use_cache=False).feedback_state
    with pytest.raises(ValueError, match=r"feedback_state is of \[2, 13, 32\] and the input of \[2, 5, 32\]"):
        build()(tokens(2, 5), feedback_state=state, use_cache=False)
    with pytest.raises(ValueError, match="of which a cache would miss the first ones: set use_cache=False"):
        build()(tokens(), feedback_state=state, use_cache=True)
    with pytest.raises(ValueError, match="this model goes position by position: give one of its own"):
        build(**TIME)(tokens(), feedback_state=state)
    with pytest.raises(ValueError, match="which attention reads: use past_key_values"):
        build(feedback_axis="time")(tokens(), feedback_state=state)
    cache = build(**TIME)(tokens(), use_cache=True).past_key_values
    empty = FeedbackCache()
    read = build(**TIME)(tokens())
    build(**TIME)(tokens(), feedback_state=read.feedback_state, past_key_values=empty)
    assert empty.length == 26  # the given cache is filled
    plain = {"feedback_axis": "time", "feedback_type": "mlp", "feedback_signal": "none", "num_encoder_layers": 0}
    model = build(**plain, decoder_type="mlp")
    model(tokens(), feedback_state=model(tokens()).feedback_state)
    assert build(feedback_axis="time")(tokens()).feedback_state is None
    with pytest.raises(ValueError, match="both say what was read"):
        build(**TIME)(tokens(), feedback_state=state, past_key_values=cache)


# Position by position

TIME = {
    "feedback_axis": "time",
    "feedback_type": "gru",
    "encoder_type": "rnn",
    "decoder_type": "rnn",
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}
EACH = {
    "gru": {},
    "lstm": {"feedback_type": "lstm", "num_feedback_layers": 2, "feedback_signal": "output"},
    "conv": {"feedback_type": "conv", "encoder_type": "cnn", "feedback_interval": 3},
    "mlp": {"feedback_type": "mlp", "feedback_connection": "add"},
    "newton": {"feedback_type": "min_gru", "solver": "newton", "feedback_signal": "none"},
    "layerwise": {"feedback_recursion": "layerwise", "num_feedback_layers": 2},
}


@pytest.mark.parametrize("fields", EACH.values(), ids=EACH)
@torch.no_grad()
def test_positions_and_then_the_others_are_all_positions(fields, tmp_path):
    """Through a file, with rows of unequal length, and for a cache that is asked for later."""
    model = build(**{**TIME, **fields})
    batch, mask = pad(tokens(3, 11), [11, 8, 4], "left")
    whole = model(batch, attention_mask=mask).logits
    first = model(batch[:, :5], attention_mask=mask[:, :5])
    assert first.past_key_values is None or isinstance(first.feedback_state, FeedbackState)
    torch.save(first.feedback_state.plain(), tmp_path / "state.pt")
    state = FeedbackState(*torch.load(tmp_path / "state.pt", weights_only=True))
    second = model(batch[:, 5:9], attention_mask=mask[:, 5:9], feedback_state=state, use_cache=True)
    third = model(batch[:, 9:], attention_mask=mask, past_key_values=second.past_key_values)
    logits = torch.cat([first.logits, second.logits, third.logits], dim=1)
    assert_close(logits[mask.bool()], whole[mask.bool()], 1e-6)


def test_training_carries_a_detached_state_along_a_text():
    """Truncated backpropagation: the value of the state goes on, and its gradient does not."""
    model, ids = build(**TIME).train(), tokens(2, 12)
    first = model(ids[:, :6])
    state = first.feedback_state.detach()
    assert not any(x.requires_grad for _, kept in state.cell.states for x in kept)
    loss = model(ids[:, 6:], labels=ids[:, 6:], feedback_state=state).loss
    loss.backward()
    with torch.no_grad():
        logits = model.eval()(ids).logits[:, 6:-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 7:].flatten())
    assert_close(loss.detach(), expected, 1e-5)


# Where it begins


@pytest.mark.parametrize("name", INITIAL_STATES)
@torch.no_grad()
def test_the_initial_state_is_what_its_name_says(name):
    model, batch = build(initial_state=name, initial_state_scale=0.5), tokens()
    given = {"num_feedback_steps": 2, "use_cache": False}
    e = model(batch, output_hidden_states=True, **given).hidden_states[1]
    expected = {"zeros": torch.zeros_like(e), "input": e}
    if name == "learned":
        model.model.loop.initial_state.vector.normal_()
        expected["learned"] = model.model.loop.initial_state.vector.expand_as(e)
    if name in expected:
        started = model(batch, feedback_state=FeedbackState(expected[name]), **given).logits
        assert_close(model(batch, **given).logits, started, 1e-6)


@torch.no_grad()
def test_a_random_state_is_drawn_by_place_and_seed():
    model, batch = build(initial_state="random", initial_state_scale=0.5), tokens(2, 5)
    given = {"num_feedback_steps": 1, "use_cache": False}
    assert torch.equal(model(batch, **given).logits, model(batch, **given).logits)
    assert_close(model(batch[1:], **given).logits, model(batch, **given).logits[1:], 1e-5)
    first = model(batch, **given).logits
    model.config.initial_state_seed = 1
    assert (model(batch, **given).logits - first).abs().max() > 1e-3
    model.train()
    assert (model(batch, **given).logits - model(batch, **given).logits).abs().max() > 1e-3
    context = type("Places", (), {"position_ids": torch.arange(3 * BLOCK)[None]})()
    drawn = model.eval().model.loop.initial_state(torch.empty(1, 3 * BLOCK, 32), context)
    assert drawn.std() == pytest.approx(0.5, rel=0.03) and drawn.abs().max() <= 1.5
    assert len(drawn[0].unique(dim=0)) == 3 * BLOCK


def test_trainer_takes_models_that_return_a_state(tmp_path):
    from transformers import Trainer

    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to="none", eval_strategy="steps", eval_steps=1
    )
    model = build(feedback_recursion="hierarchical", **LEVELS)
    trainer = Trainer(model, arguments, train_dataset=dataset(), eval_dataset=dataset(4))
    trainer.train()
    assert trainer.predict(dataset(4)).predictions.shape == (4, 16, 50)


def test_padding_is_no_part_of_a_prompt():
    """Whatever type it is given."""
    model, ids = build(prefix_lm=True), tokens(2, 8)
    with torch.no_grad():
        alone = model(ids, token_type_ids=torch.ones_like(ids)).logits
        padded, mask = torch.cat([ids.new_zeros(2, 3), ids], dim=1), (torch.arange(11) >= 3).long().expand(2, 11)
        left = model(padded, attention_mask=mask, token_type_ids=torch.ones_like(padded)).logits[:, 3:]
    assert_close(left, alone, 1e-5)
    cache = model(ids, token_type_ids=torch.ones_like(ids), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="token_type_ids of 1 are of a prompt, which is read in one call"):
        model(ids, token_type_ids=torch.ones_like(ids), past_key_values=cache)


def test_what_is_written_is_no_part_of_the_prompt():
    """Token by token, each text read anew with types of its own."""
    model, prompt = build(prefix_lm=True), tokens(2, 6)
    text = prompt
    with torch.no_grad():
        for _ in range(6):
            types = (torch.arange(text.shape[1]) < 6).long().expand_as(text)
            text = torch.cat(
                [text, model(text, token_type_ids=types, use_cache=False).logits[:, -1:].argmax(-1)], dim=1
            )
    for use_cache in (True, False):
        asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
        assert torch.equal(model.generate(prompt, token_type_ids=torch.ones_like(prompt), **asked), text)


def test_a_mixer_takes_no_longer_text_than_it_was_made_for():
    fields = {"token_mixer": "mlp", "norm_placement": "post", "is_causal": False, "max_position_embeddings": 4}
    with pytest.raises(ValueError, match="6 positions are more than the MLP over positions takes, 4"):
        build(FeedbackForMaskedLM, **fields)(tokens(2, 6))


@pytest.mark.parametrize("halting", ["learned", "act"])
def test_prefixes_go_with_halting(halting):
    model = build(FeedbackForMaskedLM, is_causal=False, num_prefix_tokens=2, halting=halting).train()
    outputs = model(tokens(), labels=tokens())
    outputs.loss.backward()
    assert outputs.num_feedback_steps.shape == (2, 13)


def test_a_shared_memory_is_no_state():
    model = build(feedback_connection="memory", feedback_axis="time", solver="jacobi")
    state = model(tokens(), use_cache=False).feedback_state
    with pytest.raises(ValueError, match="holds no memory of past positions"):
        model(tokens(), feedback_state=state, use_cache=False)
