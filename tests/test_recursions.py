"""What one step makes of the state, against the formulas written out."""

import pytest
import torch
from conftest import assert_close, build, tokens

from feedback_transformers import FeedbackModel


@pytest.mark.parametrize("axis", ["time", "depth"])
@torch.no_grad()
def test_every_layer_reads_the_one_above_one_step_ago(axis):
    """x^l_t = x + W(...) with e + W norm(φ) for connections, of layers of MLP cells."""
    fields = {"feedback_type": "mlp", "feedback_connection": "add", "feedback_recursion": "layerwise"}
    sizes = {"num_feedback_layers": 3, "num_encoder_layers": 0, "num_decoder_layers": 0, "num_feedback_steps": 4}
    model = build(FeedbackModel, feedback_axis=axis, output_norm="none", decoder_type="mlp", **fields, **sizes)
    loop, e = model.loop, model.embeddings(tokens(2, 6)).x
    connections = [loop.connection, *loop.cell.connections]
    layers = [layer.layers[0] for layer in loop.cell.layers]

    def step(x, held):
        """All layers at once; `held` are their outputs one step ago."""
        made = []
        for number, layer in enumerate(layers):
            above = held[min(number + 1, 2)]  # the last one reads itself, which is fed back
            below = x if number == 0 else made[-1]
            connection = connections[number]
            made.append(layer(below + connection.signal_proj(connection.norm(above))))
        return made

    if axis == "depth":
        held = [torch.zeros_like(e)] * 3
        for _ in range(4):
            held = step(e, held)
        expected = held[-1]
    else:
        held, outputs = [torch.zeros_like(e[:, :1])] * 3, []
        for t in range(6):
            held = step(e[:, t : t + 1], held)
            outputs.append(held[-1])
        expected = torch.cat(outputs, dim=1)
    assert_close(model(tokens(2, 6)).last_hidden_state, expected, 1e-6)


def test_layerwise_feedback_is_causal():
    for axis in ("time", "depth"):
        model = build(feedback_recursion="layerwise", feedback_axis=axis, num_feedback_layers=2)
        ids = tokens(1, 9)
        changed = ids.clone()
        changed[0, 6] = (ids[0, 6] + 1) % model.config.vocab_size
        before, after = (model(given).logits[0] for given in (ids, changed))
        assert_close(before[:6], after[:6], 1e-5)
        assert (before[6:] - after[6:]).abs().max() > 1e-3
