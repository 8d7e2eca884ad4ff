"""Exporters of transformers, ONNX, one compiled graph, pickles: each computes what the model does."""

import copy
import pickle

import pytest
import torch
from conftest import EOS, PRESETS_MEMORY, assert_close, build, pad, tokens
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from feedback_transformers.models.feedback_cells import CELLS
from feedback_transformers.models.feedback_names import RECURRENT_TYPES
from feedback_transformers.models.feedback_padding import real_first

SMALL = {  # the loop alone, since tracing costs a second a layer and pass
    "num_encoder_layers": 0,
    "num_decoder_layers": 0,
    "decoder_type": "mlp",
    "num_feedback_steps": 2,
    "solver_steps": 2,
}
MEMORY = {**SMALL, **PRESETS_MEMORY}
DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


@pytest.mark.parametrize(
    ("fields", "masked"),
    [({}, False), ({}, True), ({"feedback_axis": "time", "feedback_type": "lstm"}, True)],
    ids=["depth", "depth-masked", "time-masked"],
)
@torch.no_grad()
def test_onnx_equals_eager(fields, masked):
    """onnxruntime, which knows nothing of this package, computes the same; the cache comes back as one."""
    model = build(**{**SMALL, **fields})
    ids, mask = pad(tokens(2, 4), [4, 3], "left")
    inputs = {"input_ids": ids, "attention_mask": mask} if masked else {"input_ids": ids}
    exported = OnnxExporter().export(model, inputs, config=OnnxConfig(dynamic=False))
    actual, expected = exported(**inputs), model(**inputs)
    real = mask.bool() if masked else torch.ones_like(mask, dtype=torch.bool)
    assert_close(actual.logits[real], expected.logits[real], 1e-4)
    assert actual.past_key_values.slots == expected.past_key_values.slots
    for slot, state in expected.past_key_values.states.items():
        for made, kept in zip(actual.past_key_values.states[slot], state, strict=True):
            assert_close(made, kept, 1e-4)


@pytest.mark.parametrize(
    ("cell", "axis"),
    [*((cell, "time") for cell in CELLS), ("gru", "depth"), ("conv", "depth")],
)
@torch.no_grad()
def test_exported_prefill_and_decode_equal_eager(cell, axis):
    """The two programs that transformers makes of generate(), run one after the other."""
    model = build(**SMALL, feedback_type=cell, feedback_axis=axis, eos_token_id=EOS)
    batch = tokens(2, 5)
    inputs = {"input_ids": batch[:, :4], "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    programs = DynamoExporter().export_for_generation(model, inputs, DynamoConfig(dynamic=False)).components
    expected = model(batch).logits

    def run(name: str, **given):
        takes = programs[name].metadata.kwargs
        return programs[name].program.module()(**{key: value for key, value in given.items() if key in takes})

    prefill = run(
        "prefill", **inputs, position_ids=torch.arange(4).expand(2, -1), past_key_values=None, use_cache=True
    )
    assert_close(prefill.logits, expected[:, :4], 1e-4)
    decoded = run(
        "decode",
        input_ids=batch[:, 4:],
        attention_mask=torch.ones(2, 5, dtype=torch.long),
        position_ids=torch.full((2, 1), 4),
        past_key_values=prefill.past_key_values,
        use_cache=True,
    )
    assert_close(decoded.logits, expected[:, 4:], 1e-4)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    "fields",
    [
        *({"feedback_type": cell} for cell in CELLS if cell not in RECURRENT_TYPES),
        {"feedback_signal": "output", "feedback_interval": 3},
        MEMORY,
    ],
    ids=[*(cell for cell in CELLS if cell not in RECURRENT_TYPES), "output", "memory"],
)
def test_exported_passes_take_other_lengths(fields):
    model = Logits(build(**{**SMALL, **fields, "feedback_axis": "time", "solver": "jacobi"}))
    exported = torch.export.export(model, (tokens(2, 6),), dynamic_shapes={"ids": DYNAMIC}).module()
    other = tokens(3, 9, start=50)
    assert_close(exported(other), model(other), 1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"solver": "gauss_seidel", "solver_block_size": 2},
        {"feedback_type": "gru", "feedback_signal": "none"},
        {"feedback_type": "lstm", "solver": "jacobi"},
        {"feedback_type": "min_gru", "solver": "jacobi"},
    ],
    ids=str,
)
def test_a_walk_over_an_open_length_is_refused(fields):
    model = Logits(build(feedback_axis="time", **fields))
    with pytest.raises(ValueError, match="Position by position the length must be fixed"):
        torch.export.export(model, (tokens(2, 6),), dynamic_shapes={"ids": DYNAMIC})


@torch.no_grad()
@pytest.mark.slow
def test_shared_memory_in_one_graph_equals_eager():
    model, batch = build(**MEMORY), tokens(1, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(batch, use_cache=False).logits, model(batch, use_cache=False).logits, 1e-5)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
@pytest.mark.parametrize("fields", [MEMORY, {"feedback_type": "gru"}, {"feedback_type": "diagonal_gru"}], ids=str)
@torch.no_grad()
def test_a_copy_computes_the_same_with_weights_of_its_own(copied, fields):
    model, batch = build(**fields), tokens(2, 8)
    expected = model(batch).logits
    other = copied(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert_close(other(batch).logits, expected, 0.0)


@torch.no_grad()
def test_a_copied_cache_goes_on_alone():
    model, batch = build(feedback_axis="time", feedback_type="lstm"), tokens(2, 8)
    expected = model(batch).logits[:, 6:]
    cache = model(batch[:, :6], use_cache=True).past_key_values
    other = pickle.loads(pickle.dumps(cache))
    for used in (copy.deepcopy(cache), cache, other):
        assert_close(model(batch[:, 6:], past_key_values=used).logits, expected, 1e-5)


def test_real_positions_first_is_a_stable_sort():
    mask = torch.rand(64, 11) < 0.5
    assert torch.equal(real_first(mask), (~mask).long().argsort(dim=1, stable=True))
