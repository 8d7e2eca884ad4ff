"""One body over every combination of encoder, cell, decoder and axis, then what only some models have."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from conftest import (
    PAD,
    assert_close,
    build,
    each_axis,
    each_cell,
    each_combination,
    pad,
    tiny,
    tokens,
)
from transformers.activations import ACT2FN

from feedback_transformers import (
    PRESETS,
    FeedbackForCausalLM,
    FeedbackForMaskedLM,
)
from feedback_transformers.models.feedback_cells import CELLS
from feedback_transformers.models.feedback_names import BACKBONE_TYPES, RECURRENT_TYPES

# What the combinations don't contain; the shared body runs over these too.
VARIANTS = {
    **{
        f"preset-{name}": {**fields, "num_feedback_layers": 2}
        for name, fields in PRESETS.items()
        if name != "albert"  # which reads both sides; see test_published.py
    },
    "memory-jacobi": {**PRESETS["shared-memory"], "num_feedback_layers": 2, "solver": "jacobi"},
    "memory-jacobi-tolerance": {
        **PRESETS["shared-memory"],
        "num_feedback_layers": 2,
        "solver": "jacobi",
        "solver_steps": 40,
        "solver_tolerance": 1e-6,
    },
    "memory-none": {**PRESETS["shared-memory"], "feedback_signal": "none"},
    "share-encoder-decoder": {"share_encoder_decoder": True, "feedback_signal": "output"},
    "share-encoder-decoder-time": {"share_encoder_decoder": True, "feedback_axis": "time", "feedback_type": "gru"},
    "grouped-query": {"num_key_value_heads": 2, "feedback_axis": "time", "feedback_interval": 3},
    "two-layers": {"num_encoder_layers": 2, "num_feedback_layers": 2, "num_decoder_layers": 2},
    "two-layers-lstm": {"feedback_type": "lstm", "num_feedback_layers": 2, "feedback_axis": "time"},
    "no-encoder-no-decoder": {"num_encoder_layers": 0, "num_decoder_layers": 0, "feedback_type": "diagonal_gru"},
    "kernel-1": {"feedback_type": "conv", "conv_kernel_size": 1, "encoder_type": "cnn", "feedback_axis": "time"},
    "kernel-6": {"feedback_type": "conv", "conv_kernel_size": 6, "encoder_type": "cnn", "feedback_axis": "time"},
    "untied": {"tie_word_embeddings": False, "feedback_signal": "output"},
    "supervision-all": {"supervision": "all", "feedback_signal": "output"},
    "truncated": {"gradient_steps": 2, "feedback_type": "gru", "feedback_axis": "time"},
}
PARTS = {"connection_norm": False, "initial_state": "input"}
LEVELS = {"feedback_recursion": "hierarchical", "feedback_connection": "sum", "initial_state": "learned"}
VARIANTS |= {
    "replace": {"feedback_connection": "replace", "initial_state": "input"},
    "sum-output": {"feedback_connection": "sum", "feedback_signal": "output"},
    "random": {**PARTS, "initial_state": "random"},
    "decay": {"feedback_connection": "decay", **PARTS},
    "decay-layerwise": {"feedback_connection": "decay", "feedback_recursion": "layerwise", "num_feedback_layers": 2},
    "decay-time": {"feedback_connection": "decay", "feedback_axis": "time", "feedback_type": "gru"},
    "pass-norm-gru": {"feedback_type": "gru", "output_norm": "pass", **PARTS},
    "pass-norm-time": {"feedback_axis": "time", "output_norm": "pass"},
    "around": {"output_norm": "around_decoder", "norm_placement": "residual_sandwich", "embedding_scale": 3.0},
    "pre": {"norm_placement": "pre", "norm_weights": False, "feedback_axis": "time", "solver": "jacobi"},
    "post-none": {"norm_placement": "post", "output_norm": "none", "backbone_config": {"model_type": "qwen3"}},
    "levels": {**LEVELS, "num_feedback_layers": 2},
    "levels-replace-mlp": {
        **LEVELS,
        "feedback_connection": "replace",
        "initial_state": "input",
        "feedback_type": "mlp",
        "share_levels": True,
    },
    "levels-relaxed-random": {**LEVELS, "initial_state": "random", "relaxation": 0.7, "state_noise": 0.01},
    "refinement-relaxed-decay": {
        **LEVELS,
        "feedback_recursion": "refinement",
        "feedback_connection": "decay",
        "relaxation": 0.7,
    },
    "refinement-gate": {**LEVELS, "feedback_recursion": "refinement", "feedback_connection": "gate"},
    **{
        f"layerwise-{axis}-{kind}": {
            "feedback_recursion": "layerwise",
            "feedback_axis": axis,
            "feedback_type": kind,
            "num_feedback_layers": 3,
            "feedback_signal": signal,
        }
        for axis, kind, signal in (
            ("time", "transformer", "state"),
            ("time", "lstm", "output"),
            ("time", "conv", "state"),
            ("depth", "transformer", "output"),
            ("depth", "gru", "state"),
            ("depth", "mlp", "none"),
        )
    },
    "select": {"halting": "select", "halting_threshold": 0.6, "num_feedback_steps": 5},
    "select-output": {"halting": "select", "halting_threshold": 0.6, "feedback_signal": "output"},
    "levels-converged": {**LEVELS, "halting": "converged", "halting_threshold": 0.5, "num_feedback_steps": 5},
}
TIME = {"feedback_axis": "time"}
BLOCKS = {**TIME, "solver": "gauss_seidel", "solver_block_size": 4, "solver_steps": 3}
HALTING = {
    "converged": {"halting": "converged", "halting_threshold": 0.5},
    "converged-prediction": {"halting": "converged", "halting_measure": "prediction", "halting_threshold": 0.02},
    "learned": {"halting": "learned"},
    "act": {"halting": "act", "halting_threshold": 0.7},
}
VARIANTS |= {
    "gauss-seidel": BLOCKS,
    "gauss-seidel-output": {**BLOCKS, "feedback_signal": "output", "feedback_interval": 2},
    "gauss-seidel-uneven": {**BLOCKS, "feedback_type": "gru", "feedback_interval": 3},
    "gauss-seidel-conv": {**BLOCKS, "feedback_type": "conv", "decoder_type": "rnn"},
    "tolerance": {**TIME, "solver": "jacobi", "solver_steps": 40, "solver_tolerance": 1e-6},
    "tolerance-gru": {
        **TIME,
        "solver": "jacobi",
        "solver_steps": 40,
        "solver_tolerance": 1e-6,
        "feedback_type": "gru",
    },
    "newton": {**TIME, "solver": "newton", "feedback_type": "diagonal_gru", "feedback_signal": "none"},
    "tolerance-truncated": {
        **TIME,
        "solver": "gauss_seidel",
        "solver_steps": 40,
        "solver_tolerance": 1e-6,
        "gradient_steps": 2,
    },
    **{f"halting-{name}": {"num_feedback_steps": 5, **rule} for name, rule in HALTING.items()},
    **{
        f"halting-{name}-gru": {"num_feedback_steps": 5, "feedback_type": "gru", **rule}
        for name, rule in HALTING.items()
    },
    **{
        f"halting-{name}-output": {"feedback_signal": "output", "num_decoder_layers": 2, **rule}
        for name, rule in HALTING.items()
    },
    **{
        f"halting-{name}-jacobi": {**TIME, "solver": "jacobi", "feedback_interval": 3, **rule}
        for name, rule in HALTING.items()
    },
}
for family in BACKBONE_TYPES:
    for axis in ("time", "depth"):
        VARIANTS[f"{family}-{axis}"] = {
            "backbone_config": {"model_type": family},
            "feedback_axis": axis,
            "feedback_interval": 3 if axis == "time" else 1,
        }
    if family in ("llama", "qwen3"):  # without and with norms of queries and keys
        VARIANTS[f"{family}-memory"] = {
            **PRESETS["shared-memory"],
            "backbone_config": {"model_type": family},
            "num_key_value_heads": 2,
        }
for variant in VARIANTS.values():
    if variant.get("is_causal") is False:
        variant |= {"is_causal": True, "halting": "fixed", "halting_scope": "position"}
    if variant.get("supervision_interval", 1) > 1:
        variant |= {"supervision_interval": 2, "num_feedback_steps": 4, "num_low_steps": 2}
each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


def learns(fields: dict) -> None:
    model = build(**fields).train()
    batch = tokens(1, 7).repeat(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(batch, labels=batch).loss
        loss.backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing, "distributed training needs a gradient for each parameter"
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


def saves_and_loads(fields: dict, folder) -> None:
    model = build(**fields)
    model.save_pretrained(folder)
    assert {file.suffix or file.name for file in folder.iterdir()} == {".py", ".json", ".safetensors", "SHA256SUMS"}
    loaded, info = FeedbackForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.to_dict() == FeedbackForCausalLM.from_pretrained(folder).config.to_dict()
    tied = loaded.lm_head.weight is loaded.model.embeddings.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    batch = tokens()
    assert torch.equal(loaded(batch).logits, model(batch).logits)


def cached_equals_uncached(fields: dict) -> None:
    model, batch = build(**fields), tokens(2, 13)
    with torch.no_grad():
        full = model(batch, use_cache=False)
        assert full.past_key_values is None
        for bounds in (range(14), (0, 5, 13), (0, 4, 5, 11, 13)):
            cache, logits = None, []
            for start, stop in zip(bounds, bounds[1:], strict=False):
                outputs = model(batch[:, start:stop], past_key_values=cache, use_cache=True)
                cache = outputs.past_key_values
                logits.append(outputs.logits)
            assert cache.get_seq_length() == 13
            assert_close(torch.cat(logits, dim=1), full.logits)


def padding_changes_nothing(fields: dict) -> None:
    """Rows of 11, 8 and 4 tokens, padded, then continued by 5 tokens and by one, against each row alone."""
    model = build(**fields)
    batch, later, lengths = tokens(3, 11), tokens(3, 6, start=200), [11, 8, 4]
    with torch.no_grad():
        alone = [
            model(torch.cat([row[:n], more])[None], use_cache=False).logits[0]
            for row, n, more in zip(batch, lengths, later, strict=True)
        ]
        for where in ("left", "right", "inside"):
            padded, mask = pad(batch, lengths, where)
            first = model(padded, attention_mask=mask, use_cache=True)
            mask = torch.cat([mask, mask.new_ones(3, 5)], dim=1)
            second = model(later[:, :5], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
            third = model(later[:, 5:], past_key_values=second.past_key_values, use_cache=True)
            for i in range(len(lengths)):
                real = first.logits[i][mask[i, : padded.shape[1]].bool()]
                assert_close(torch.cat([real, second.logits[i], third.logits[i]]), alone[i])


def causal(fields: dict) -> None:
    model, batch = build(**fields), tokens(2, 12)
    changed = batch.clone()
    changed[:, 7] = (changed[:, 7] + 1 - 5) % 45 + 5
    with torch.no_grad():
        before, after = model(batch).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def generates(fields: dict) -> None:
    model, prompt = build(**fields), tokens(2, 6)
    padded = torch.cat([prompt.new_full((2, 3), PAD), prompt], dim=1)
    mask = (padded != PAD).long()
    arguments = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    cached = model.generate(prompt, **arguments)
    for other in (
        model.generate(prompt, **arguments, use_cache=False),
        model.generate(padded, attention_mask=mask, **arguments),
    ):
        assert torch.equal(other.sequences[:, -6:], cached.sequences[:, -6:])
        assert_close(torch.stack(other.scores), torch.stack(cached.scores))
    single = model.generate(prompt[:1], **arguments)
    assert torch.equal(single.sequences, cached.sequences[:1])


@each_combination
def test_learns(fields):
    learns(fields)


@each_combination
def test_saves_and_loads(fields, tmp_path):
    saves_and_loads(fields, tmp_path)


@each_combination
def test_cached_equals_uncached(fields):
    cached_equals_uncached(fields)


@each_combination
def test_padding_changes_nothing(fields):
    padding_changes_nothing(fields)


@each_combination
def test_causal(fields):
    causal(fields)


@each_combination
def test_generates(fields):
    generates(fields)


@each_variant
def test_variant(fields, tmp_path):
    learns(fields)
    saves_and_loads(fields, tmp_path)
    cached_equals_uncached(fields)
    padding_changes_nothing(fields)
    causal(fields)
    generates(fields)


# The loop


@each_cell
@pytest.mark.parametrize("signal", ["state", "output"])
def test_feedback_is_read(cell, signal):
    """What was predicted before changes what is predicted now, through the connection and not the cell alone."""
    for axis in ("time", "depth"):
        model = build(feedback_type=cell, feedback_signal=signal, feedback_axis=axis)
        batch = tokens()
        with torch.no_grad():
            before = model(batch).logits
            model.model.loop.connection.signal_proj.weight.zero_()
            assert (model(batch).logits - before).abs().max() > 0.01


@each_cell
@pytest.mark.parametrize("connection", ["gate", "add", "concat", "decay"])
def test_none_is_a_control_of_the_same_size(cell, connection):
    for axis in ("time", "depth"):
        fields = {"feedback_type": cell, "feedback_connection": connection, "feedback_axis": axis}
        fed, control = build(**fields), build(feedback_signal="none", **fields)
        assert fed.num_parameters() == control.num_parameters()
        assert fed.state_dict().keys() == control.state_dict().keys()


@pytest.mark.parametrize("cell", [name for name in CELLS if name not in RECURRENT_TYPES])
def test_none_is_feed_forward(cell):
    """Neither another number of passes nor the prediction of another position changes anything."""
    batch = tokens()
    model = build(feedback_type=cell, feedback_signal="none")
    once, often = model(batch, num_feedback_steps=1).logits, model(batch, num_feedback_steps=7).logits
    assert torch.equal(once, often)
    time = FeedbackForCausalLM(tiny(feedback_type=cell, feedback_signal="none", feedback_axis="time")).eval()
    time.load_state_dict(model.state_dict())
    assert_close(time(batch).logits, once, 1e-5)


@each_cell
@pytest.mark.parametrize("signal", ["state", "output"])
@pytest.mark.parametrize("interval", [1, 3])
def test_jacobi_equals_sequential(cell, signal, interval):
    """As many passes as positions are exact, in outputs and gradients."""
    fields = {"feedback_axis": "time", "feedback_type": cell, "feedback_signal": signal, "feedback_interval": interval}
    sequential, jacobi = build(**fields), build(solver="jacobi", solver_steps=9, **fields)
    jacobi.load_state_dict(sequential.state_dict())
    batch = tokens(2, 9)
    outputs = [model(batch, labels=batch) for model in (sequential, jacobi)]
    assert_close(outputs[1].logits, outputs[0].logits, 1e-5)
    for output in outputs:
        output.loss.backward()
    for (name, expected), actual in zip(sequential.named_parameters(), jacobi.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)
    needed = -(-9 // interval)
    assert_close(jacobi(batch, num_feedback_steps=needed).logits, outputs[0].logits, 1e-5)
    assert (jacobi(batch, num_feedback_steps=1).logits - outputs[0].logits).abs().max() > 1e-2


@each_cell
def test_depth_is_its_passes(cell):
    """k passes are the k-th of the trajectory of K passes."""
    model, batch = build(feedback_type=cell), tokens()
    with torch.no_grad():
        outputs = model(batch, num_feedback_steps=4, output_feedback_states=True, output_hidden_states=True)
        assert len(outputs.feedback_states) == 4
        for steps, y in enumerate(outputs.feedback_states, start=1):
            assert y.shape == (2, 13, 32)
            assert_close(model.lm_head(y), model(batch, num_feedback_steps=steps).logits, 1e-5)
        assert len(outputs.hidden_states) == 2 + 4 + 1
        assert {tuple(h.shape) for h in outputs.hidden_states} == {(2, 13, 32)}
        assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)


@each_axis
def test_noise_and_dropout_in_training_only(axis):
    for fields in ({"feedback_noise": 0.5}, {"dropout": 0.5, "encoder_type": "cnn", "decoder_type": "mlp"}):
        model, batch = build(feedback_axis=axis, feedback_type="gru", **fields), tokens()
        assert torch.equal(model(batch).logits, model(batch).logits)
        model.train()
        assert not torch.allclose(model(batch).logits, model(batch).logits, atol=1e-3)
        control = build(feedback_axis=axis, feedback_type="gru", feedback_signal="none", feedback_noise=0.5).train()
        assert torch.equal(control(batch).logits, control(batch).logits)


@pytest.mark.parametrize("name", [*ACT2FN, "rrelu"])
def test_activation(name, tmp_path):
    for fields in ({"feedback_type": "conv", "decoder_type": "mlp"}, {"backbone_config": {"model_type": "gpt2"}}):
        model, batch = build(hidden_act=name, num_feedback_steps=2, **fields), tokens(2, 6)
        assert model.train()(batch, labels=batch).loss.isfinite()
        model.eval().save_pretrained(tmp_path)
        loaded, info = FeedbackForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert torch.equal(loaded(batch).logits, model(batch).logits)


# Calls


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"feedback_axis": "time", "feedback_type": "gru"},
        {"supervision": "all"},
        {"halting": "learned", "halting_weight": 0.1},
        {"halting": "act"},
    ],
    ids=str,
)
def test_the_loss_does_not_depend_on_the_side_of_the_padding(fields):
    """Padding on the left stands behind the text inside, so that it must not be asked for the first token."""
    model, batch = build(**fields).train(), tokens(1, 9)
    expected = model(batch, labels=batch).loss
    for where in ("left", "right"):
        padded, mask = pad(batch, [9], where)
        labels = padded.masked_fill(mask == 0, -100)
        assert_close(model(padded, attention_mask=mask, labels=labels).loss, expected, 1e-5)
        shifted = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], dim=1)
        loss = model(padded, attention_mask=mask, labels=labels, shift_labels=shifted).loss
        assert_close(loss, expected, 1e-5)


@each_axis
def test_inputs_embeds_and_return_dict(axis):
    model, batch = build(feedback_axis=axis), tokens()
    outputs = model(batch, labels=batch, use_cache=False)
    embedded = model(inputs_embeds=model.get_input_embeddings()(batch), labels=batch, use_cache=False)
    assert torch.equal(embedded.logits, outputs.logits)
    loss, logits = model(batch, labels=batch, use_cache=False, return_dict=False)
    assert torch.equal(loss, outputs.loss)
    assert torch.equal(logits, outputs.logits)
    (hidden,) = model.model(batch, use_cache=False, return_dict=False)
    assert torch.equal(model.lm_head(hidden), logits)


def test_logits_to_keep():
    model, batch = build(), tokens()
    logits = model(batch).logits
    assert_close(model(batch, logits_to_keep=1).logits, logits[:, -1:], 1e-6)
    assert_close(model(batch, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]], 1e-6)
    with pytest.raises(ValueError, match="labels have the shape"):
        model(batch, labels=batch, logits_to_keep=3)


def test_position_ids_move_the_text():
    """Rotary attention depends on distances only; the positions given are those that are used."""
    model, batch = build(feedback_type="mlp", decoder_type="mlp"), tokens(2, 6)
    positions = torch.arange(6)[None]
    logits = model(batch).logits
    assert torch.equal(model(batch, position_ids=positions).logits, logits)
    assert_close(model(batch, position_ids=positions + 7).logits, logits)
    assert (model(batch, position_ids=positions * 5).logits - logits).abs().max() > 1e-3


def test_a_row_that_is_all_padding_is_finite_and_harmless():
    for head, fields in ((FeedbackForCausalLM, {}), (FeedbackForMaskedLM, {"is_causal": False})):
        for axis in ("time", "depth"):
            model, batch = build(head, feedback_axis=axis, **fields), tokens()
            mask = torch.ones_like(batch)
            mask[0] = 0
            logits = model(batch, attention_mask=mask).logits
            assert logits.isfinite().all()
            assert_close(logits[1], model(batch).logits[1])


# Weights


@pytest.mark.parametrize("tied", [True, False])
def test_resize_token_embeddings(tied, tmp_path):
    model, batch = build(tie_word_embeddings=tied, feedback_signal="output"), tokens()
    before = model(batch).logits
    model.resize_token_embeddings(60, mean_resizing=False)
    assert model.config.vocab_size == 60
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (60, 32)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert model(batch + 10, labels=batch + 10).loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = FeedbackForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(batch).logits, model(batch).logits)
    loaded.resize_token_embeddings(50)
    assert_close(loaded(batch).logits, before, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_round_trip(tied, tmp_path):
    model, batch = build(tie_word_embeddings=tied, feedback_type="lstm").to(torch.bfloat16), tokens()
    model.save_pretrained(tmp_path)
    for dtype in ("auto", torch.bfloat16):
        loaded, info = FeedbackForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
        assert not any(info.values())
        assert loaded.dtype == torch.bfloat16
        assert all(map(torch.equal, loaded.parameters(), model.parameters()))
        loaded.save_pretrained(tmp_path)  # not the model above: `.to` rounded its rotary frequencies, loading does not
        assert torch.equal(FeedbackForCausalLM.from_pretrained(tmp_path)(batch).logits, loaded(batch).logits)


@pytest.mark.parametrize(
    "fields",
    [{"feedback_signal": "output"}, {"encoder_type": "rnn"}, {"feedback_axis": "time", "feedback_type": "lstm"}],
)
def test_offloaded_weights(fields):
    """accelerate's hooks bring weights only to the forward of their own module."""
    model = build(**fields)
    with torch.no_grad():
        expected = model(tokens()).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert_close(model(tokens()).logits, expected)


def test_supervision_of_all_decodes_once_in_inference():
    with torch.no_grad():
        assert build(supervision="all").model(tokens()).feedback_states is None


def test_config_asks_for_hidden_states():
    model = build()
    model.config.output_hidden_states = True
    assert len(model(tokens()).hidden_states) == 2 + model.config.num_feedback_steps + 1


def test_a_call_crosses_few_functions():
    """Of ours, in a depth model of 4 passes, which crossed 162 in 13 files in 0.1.0."""
    model, batch, calls = build(num_feedback_steps=4), tokens(1, 10), []
    package = str(Path(FeedbackForCausalLM.__module__.split(".")[0]))

    def note(frame, event, argument):
        if event == "call" and package in frame.f_code.co_filename:
            calls.append(frame.f_code.co_filename)

    model(batch, use_cache=False)
    sys.setprofile(note)
    model(batch, use_cache=False)
    sys.setprofile(None)
    assert len(calls) <= 116 and len(set(calls)) <= 12
