"""Gradient checkpointing: in every model something is recomputed, and the gradients stay the same."""

import pytest
import torch
from conftest import BOS, COMBINATIONS, assert_close, build, gradients, name_of, tokens
from torch.utils.checkpoint import checkpoint

from feedback_transformers import FeedbackForConditionalGeneration, FeedbackForMaskedLM

TIME = {"feedback_axis": "time"}
RNN = {"encoder_type": "rnn", "decoder_type": "mlp"}
SEQ2SEQ = {"is_encoder_decoder": True, "decoder_start_token_id": BOS}
OTHERS = [
    {**TIME, **RNN, "feedback_type": "gru", "gradient_steps": 5, "dropout": 0.1},
    {**TIME, **RNN, "feedback_type": "min_gru", "feedback_signal": "none", "solver": "newton"},
    {**TIME, "feedback_type": "mlp", "feedback_noise": 0.1, "decoder_type": "rnn", "feedback_signal": "output"},
    {**TIME, "solver": "gauss_seidel", "solver_block_size": 4, "feedback_signal": "output"},
    {**TIME, "solver": "gauss_seidel", "feedback_type": "lstm", "feedback_interval": 3, **RNN, "supervision": "all"},
    {**TIME, "feedback_connection": "memory"},
    {**TIME, "feedback_connection": "memory", "solver": "jacobi"},
    {"supervision": "all", "decoder_type": "rnn", "shared_step_cache": True},
    {"halting": "learned", "feedback_type": "lstm", **RNN},
    {"share_encoder_decoder": True, "encoder_type": "rnn", "decoder_type": "rnn"},
]


class Counting:
    """Counts the calls that are checkpointed, and how often what they run is run."""

    def __init__(self) -> None:
        self.calls, self.runs = 0, 0

    def __call__(self, function, *args, **kwargs):
        self.calls += 1

        def counted(*args):
            self.runs += 1
            return function(*args)

        return checkpoint(counted, *args, **kwargs)


def checkpointed(model) -> Counting:
    model.activation_checkpointing_enable()
    counting = Counting()
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lambda *args, **kwargs: counting(
                *args, **kwargs, use_reentrant=False
            )
    return counting


def compare(head=None, **fields) -> None:
    arguments = () if head is None else (head,)
    plain, model = (build(*arguments, **fields).train() for _ in range(2))
    counting = checkpointed(model)
    batch, mask = tokens(), torch.ones(2, 13, dtype=torch.long)
    mask[0, :3] = 0
    results = []
    for each in (plain, model):
        torch.manual_seed(1)
        results.append(gradients(each, batch, attention_mask=mask))
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, 1e-5 * max(1.0, expected.abs().max().item()))
    assert counting.calls and counting.runs == 2 * counting.calls  # once forwards, and once backwards


@pytest.mark.parametrize("fields", COMBINATIONS[::4], ids=name_of)
def test_every_combination(fields):
    compare(**fields)


@pytest.mark.parametrize("fields", OTHERS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_others(fields):
    compare(**fields)


@pytest.mark.parametrize("fields", [{}, {**TIME, **RNN, "feedback_type": "lstm"}, {**TIME, "feedback_type": "mlp"}])
def test_sequence_to_sequence(fields):
    """The keys and values of the source are written in the first step only, and again where that is recomputed."""
    compare(FeedbackForConditionalGeneration, **SEQ2SEQ, **fields)


def test_both_sides():
    compare(FeedbackForMaskedLM, is_causal=False, **RNN, feedback_type="gru")


@pytest.mark.parametrize("fields", [{"feedback_signal": "none"}, {}, {"feedback_type": "mlp"}, {"solver": "newton"}])
def test_along_time_less_is_kept(fields):
    """Of T positions, the inputs of about √T runs."""
    signal = {"feedback_signal": "none"} if "solver" in fields else {}
    fields = {**TIME, **RNN, "feedback_type": "diagonal_gru", **signal, **fields}
    plain, model, batch = build(**fields).train(), build(**fields).train(), tokens(2, 64)
    checkpointed(model)
    kept = []
    for each in (plain, model):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), t)[
                1
            ],
            lambda t: t,
        ):
            loss = each.model(batch).last_hidden_state.sum()
        kept.append(sum(sizes.values()))
        del loss
    assert kept[1] < 0.8 * kept[0]


def test_one_switch_is_enough_and_is_undone():
    model = build(**TIME, **RNN, feedback_type="gru").train()
    counting = checkpointed(model)
    model.activation_checkpointing_disable()
    gradients(model, tokens())
    assert not counting.calls and not model.is_activation_checkpointing
