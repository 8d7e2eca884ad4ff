"""The parts against references: recurrences, connections, cache, embeddings."""

import copy
import math

import pytest
import torch
from conftest import PRESETS_MEMORY, assert_close, build, tiny, tokens
from torch import nn

from feedback_transformers import FeedbackModel
from feedback_transformers.models.feedback_cache import Context, FeedbackCache, Slot
from feedback_transformers.models.feedback_connections import CONNECTIONS
from feedback_transformers.models.feedback_scan import (
    RECURRENCES,
    GRUState,
    LSTMState,
    RecurrentStack,
    can_fuse,
    scan,
    scan_reference,
)

SIZE = 16
LENGTHS = [1, 7, 33]
each_recurrence = pytest.mark.parametrize("kind", list(RECURRENCES))


def make_recurrence(kind: str):
    cell = RECURRENCES[kind](SIZE)
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=0.4)
    return cell


def make_state(cell, batch: int = 3):
    parts = [torch.randn(batch, SIZE) for _ in cell.state_type._fields]
    return cell.state_type(*(part.requires_grad_() for part in parts))


def run(function, cell, x, state, **arguments):
    """Outputs, final state, and the gradients of everything for random directions."""
    x = x.clone().requires_grad_()
    state = type(state)(*(part.detach().clone().requires_grad_() for part in state))
    cell.zero_grad()
    h, last = function(cell, x, state, **arguments)
    generator = torch.Generator().manual_seed(1)
    loss = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in (h, *last))
    loss.backward()
    return [h, *last, x.grad, *(part.grad for part in state), *(p.grad.clone() for p in cell.parameters())]


def assert_all_close(actual, expected, tolerance: float = 2e-5) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=tolerance, rtol=1e-4)


@each_recurrence
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_equals_its_reference(kind, length, reverse):
    cell, x = make_recurrence(kind), torch.randn(3, length, SIZE)
    assert can_fuse(cell, x) == (kind != "diagonal_gru")
    state = make_state(cell)
    actual = run(scan, cell, x, state, reverse=reverse)
    assert_all_close(actual, run(scan_reference, cell, x, state, reverse=reverse))


@pytest.mark.parametrize(("kind", "theirs"), [("gru", nn.GRU), ("lstm", nn.LSTM)])
@pytest.mark.parametrize("length", LENGTHS)
def test_recurrences_are_those_of_torch(kind, theirs, length):
    cell, reference, x = make_recurrence(kind), theirs(SIZE, SIZE, batch_first=True), torch.randn(3, length, SIZE)
    with torch.no_grad():
        reference.weight_ih_l0.copy_(cell.input_proj.weight)
        reference.bias_ih_l0.copy_(cell.input_proj.bias)
        reference.weight_hh_l0.copy_(cell.state_proj.weight)
        reference.bias_hh_l0.copy_(cell.state_proj.bias)
    expected, _ = reference(x)
    for function in (scan, scan_reference):
        assert_close(function(cell, x, cell.initial_state(x[:, 0]))[0], expected, 1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_diagonal_gru_is_a_gru_of_diagonal_matrices(length):
    diagonal, full, x = make_recurrence("diagonal_gru"), make_recurrence("gru"), torch.randn(3, length, SIZE)
    with torch.no_grad():
        full.input_proj.load_state_dict(diagonal.input_proj.state_dict())
        full.state_proj.weight.copy_(torch.cat([torch.diag(gate) for gate in diagonal.diagonal.weight]))
        full.state_proj.bias.zero_()
    state = make_state(full)
    n = 1 + 1 + 1 + 1  # h, the last state, and the gradients of x and of the state
    assert_all_close(run(scan, diagonal, x, state)[:n], run(scan, full, x, state)[:n])


@each_recurrence
@pytest.mark.parametrize("reverse", [False, True])
def test_masked_positions_leave_the_state_unchanged(kind, reverse):
    """Padding, poisoned with huge values, anywhere: the same as the real positions alone."""
    cell, x = make_recurrence(kind), torch.randn(2, 9, SIZE)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, [0, 1, 4]], mask[1, [7, 8]] = False, False
    poisoned = torch.where(mask[..., None], x, torch.full_like(x, 1e4))
    state = make_state(cell, 2)
    h, last = scan(cell, poisoned, state, mask, reverse)
    for i in range(2):
        alone = type(state)(*(part[i : i + 1] for part in state))
        expected, expected_last = scan(cell, x[i : i + 1, mask[i]], alone, None, reverse)
        assert_close(h[i, mask[i]], expected[0], 1e-5)
        for actual, part in zip(last, expected_last, strict=True):
            assert_close(actual[i], part[0], 1e-5)


@each_recurrence
def test_state_passing(kind):
    """Two calls in a row are one."""
    cell, x = make_recurrence(kind), torch.randn(2, 9, SIZE)
    state = make_state(cell, 2)
    expected, expected_last = scan(cell, x, state)
    first, between = scan(cell, x[:, :4], state)
    second, last = scan(cell, x[:, 4:], between)
    assert_close(torch.cat([first, second], 1), expected, 1e-5)
    assert_all_close(last, expected_last)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_only_plain_float32_layers_are_fused(kind):
    """What wraps a projection, or watches it, must be heard."""
    cell, x = make_recurrence(kind), torch.randn(2, 5, SIZE)
    assert can_fuse(cell, x)
    assert not can_fuse(copy.deepcopy(cell).to(torch.bfloat16), x.to(torch.bfloat16))
    assert not can_fuse(cell, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_fuse(cell, x)
    before = scan(cell, x, cell.initial_state(x[:, 0]))[0]
    for name in ("input_proj", "state_proj"):
        wrapped = copy.deepcopy(cell)
        setattr(wrapped, name, nn.Sequential(getattr(wrapped, name)))
        assert not can_fuse(wrapped, x)
        assert_close(scan(wrapped, x, cell.initial_state(x[:, 0]))[0], before, 1e-5)
        hooked = copy.deepcopy(cell)
        getattr(hooked, name).register_forward_hook(lambda module, args, output: output + 1)
        assert not can_fuse(hooked, x)
        assert (scan(hooked, x, cell.initial_state(x[:, 0]))[0] - before).abs().max() > 0.01
        changed = copy.deepcopy(cell)
        nn.utils.parametrizations.weight_norm(getattr(changed, name))
        assert not can_fuse(changed, x)


def test_state_is_float32_and_typed():
    for kind, state_type in (("gru", GRUState), ("lstm", LSTMState), ("diagonal_gru", GRUState)):
        cell, x = make_recurrence(kind).to(torch.bfloat16), torch.randn(2, 5, SIZE, dtype=torch.bfloat16)
        h, state = scan(cell, x, cell.initial_state(x[:, 0]))
        assert type(state) is state_type
        assert h.dtype == torch.bfloat16
        assert all(part.dtype == torch.float32 for part in state)


def test_bidirectional_stack_is_that_of_torch():
    """One layer: the sum of both directions of nn.GRU."""
    stack, x = RecurrentStack(tiny(hidden_size=SIZE), 1, causal=False), torch.randn(2, 7, SIZE)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.4)
    reference = nn.GRU(SIZE, SIZE, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for cell, suffix in zip(stack.layers[0], ("l0", "l0_reverse"), strict=True):
            for ours, theirs in (("input_proj", "ih"), ("state_proj", "hh")):
                getattr(reference, f"weight_{theirs}_{suffix}").copy_(getattr(cell, ours).weight)
                getattr(reference, f"bias_{theirs}_{suffix}").copy_(getattr(cell, ours).bias)
    context = Context(torch.arange(7).expand(2, 7), torch.zeros(2, dtype=torch.long))
    assert_close(stack(x, context), sum(reference(x)[0].chunk(2, dim=-1)), 1e-5)


# Connections


def connection(name: str):
    module = CONNECTIONS[name](tiny())
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize("name", ["gate", "add", "concat", "decay"])
def test_connections_are_their_formulas(name):
    module, e, signal = connection(name), torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    normed = signal / (signal.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * module.norm.weight
    weight = module.input_proj.weight if name == "decay" else module.signal_proj.weight
    if name == "gate":
        gate = torch.sigmoid(torch.cat([e, normed], -1) @ module.gate_proj.weight.T + module.gate_proj.bias)
        expected = e + module.scale * gate * (normed @ weight.T)
    elif name == "add":
        expected = e + normed @ weight.T
    elif name == "decay":
        step = (1 + module.dt_bias.exp()).log()
        expected = (-step * module.A_log.exp()).exp() * normed + step * (e @ weight.T)
    else:
        expected = torch.cat([e, normed], -1) @ weight.T
    assert_close(module(e, signal), expected, 1e-5)


def test_decay_begins_as_its_authors_begin_it():
    """It keeps √(1/5) of the signal, and adds -log √(1/5) of the input."""
    torch.manual_seed(0)
    module = FeedbackModel(tiny(feedback_connection="decay", connection_norm=False)).loop.connection
    e, signal, kept = torch.randn(2, 5, 32), torch.randn(2, 5, 32), 0.2**0.5
    assert_close(module(e, signal), kept * signal - math.log(kept) * e, 1e-6)
    assert not module.A_log.any() and not module.is_closed()


def test_memory_connection_passes_its_input():
    e = torch.randn(2, 5, 32)
    assert CONNECTIONS["memory"](tiny())(e, e + 1) is e


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_shared_memory_is_what_all_layers_read(family):
    """The second layer sees the past through the merged memory: position by position, by hand, from the states."""
    model = build(**PRESETS_MEMORY, backbone_config={"model_type": family})
    cell, batch = model.model.loop.cell, tokens(1, 5)
    nn.init.normal_(cell.layer_weights)
    with torch.no_grad():
        outputs = model(batch, use_cache=True)
        memory = outputs.past_key_values.keys_values(Slot("cell", 0, ("memory",)))
        assert memory[0].shape == (1, 4, 5, 8)
        merged = []
        for t in range(5):  # an independent pass: layers of their own, fed with the memory of before
            x = model.model.loop.connection(model.model.embeddings(batch).x[:, t : t + 1], None)
            context = Context(torch.tensor([[t]]), torch.tensor([t]), offset=t)
            position = cell.rotary(x, context.position_ids)
            states = [x]
            for layer in cell.layers:
                reader = _Reader(
                    [
                        cell.keys_values(m, Context(torch.tensor([[s]]), torch.tensor([s])))
                        for s, m in enumerate(merged)
                    ]
                )
                states.append(layer(states[-1], position_embeddings=position, past_key_values=reader))
            weights = cell.layer_weights.softmax(0)
            merged.append(sum(weight * state for weight, state in zip(weights, states, strict=True)))
            expected = model.lm_head(model.model.norm(states[-1]))
            assert_close(outputs.logits[:, t : t + 1], expected)


class _Reader:
    """A cache of given keys and values, which every layer reads beside its own position."""

    def __init__(self, past: list) -> None:
        self.past = past

    def update(self, keys, values, *args, **kwargs):
        return (
            torch.cat([*(k for k, _ in self.past), keys], dim=-2),
            torch.cat([*(v for _, v in self.past), values], dim=-2),
        )


# Cache


@pytest.mark.parametrize("fields", [{"feedback_type": "lstm", "feedback_axis": "time"}, {"feedback_type": "conv"}, {}])
def test_cache_follows_the_batch(fields):
    """Reordered, repeated and selected rows continue as those rows."""
    model, batch, more = build(**fields), tokens(3, 6), tokens(3, 2, start=100)
    mask = torch.ones_like(batch)
    mask[1, :2] = 0
    rows = {
        "reorder_cache": (torch.tensor([2, 2, 1]), torch.tensor([2, 2, 1])),
        "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1, 2, 2])),
        "batch_select_indices": (torch.tensor([1]), torch.tensor([1])),
    }
    with torch.no_grad():
        for method, (argument, index) in rows.items():
            cache = model(batch, attention_mask=mask, use_cache=True).past_key_values
            expected = model(more, past_key_values=copy.deepcopy(cache), use_cache=True).logits
            getattr(cache, method)(argument)
            assert_close(model(more[index], past_key_values=cache, use_cache=True).logits, expected[index], 1e-5)


def test_cache_reset_is_a_new_cache():
    model, batch = build(feedback_type="gru"), tokens()
    first = model(batch, use_cache=True)
    cache = first.past_key_values
    assert cache.get_seq_length() == 13 and cache.num_bytes() > 0
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.num_bytes() == 0
    assert torch.equal(model(batch, past_key_values=cache, use_cache=True).logits, first.logits)


def test_cache_cannot_be_cropped():
    with pytest.raises(ValueError, match="keep no history: leave past_key_values out"):
        FeedbackCache().crop(-1)


def test_gradients_flow_through_the_cache():
    """A text in two calls has the gradient of one; detached in between, it has another."""
    model, batch = build(feedback_axis="time", feedback_type="lstm", encoder_type="cnn"), tokens(2, 8)
    labels = batch.clone()
    labels[:, :5] = -100

    def gradient(detach: bool | None) -> torch.Tensor:
        model.zero_grad()
        if detach is None:
            model(batch, labels=labels).loss.backward()
        else:
            cache = model(batch[:, :4], use_cache=True).past_key_values
            if detach:
                cache.detach()
            model(batch[:, 4:], past_key_values=cache, labels=labels[:, 4:]).loss.backward()
        return model.model.loop.cell.layers[0][0].state_proj.weight.grad.clone()

    assert_close(gradient(False), gradient(None), 1e-5)
    assert (gradient(True) - gradient(None)).abs().max() > 1e-4
