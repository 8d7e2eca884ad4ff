"""Halting against its formulas: when positions stop, what they read then, and what it costs."""

import pytest
import torch
from conftest import assert_close, build, gradients, pad, tiny, tokens, with_weights_of
from torch.nn import functional as F

from feedback_transformers import (
    FeedbackForCausalLM,
    FeedbackForMaskedLM,
    FeedbackForQuestionAnswering,
    FeedbackForSequenceClassification,
    FeedbackForTimeSeriesPrediction,
    FeedbackForTokenClassification,
)
from feedback_transformers.models.feedback_names import RECURRENT_TYPES

CONVERGED = {"halting": "converged", "num_feedback_steps": 6}
HALTING_CELLS = pytest.mark.parametrize("cell", ["mlp", "transformer", *RECURRENT_TYPES])


@HALTING_CELLS
@pytest.mark.parametrize("measure", ["state", "prediction"])
def test_converged_stops_where_little_changes(cell, measure):
    """Positions stop after different numbers of passes, as the trajectory of a model without attention says."""
    fields = {"feedback_type": cell, "encoder_type": "cnn", "num_decoder_layers": 0, **CONVERGED}
    full, batch = build(feedback_type=cell, encoder_type="cnn", num_decoder_layers=0, num_feedback_steps=6), tokens()
    outputs = full(batch, output_hidden_states=True, output_feedback_states=True)
    h = outputs.hidden_states[2:-1]
    if measure == "state":
        changes = [(b - a).norm(dim=-1) / a.norm(dim=-1) for a, b in zip(h, h[1:], strict=False)]
    else:
        log_p = [full.lm_head(y).log_softmax(-1) for y in outputs.feedback_states]
        changes = [
            F.kl_div(a, b, log_target=True, reduction="none").sum(-1) for a, b in zip(log_p, log_p[1:], strict=False)
        ]
    changes = torch.stack(changes)
    threshold = changes[1].median().item()
    model = with_weights_of(full, halting_threshold=threshold, halting_measure=measure, **fields)
    halted = model(batch)
    steps = halted.num_feedback_steps
    assert steps.min() < steps.max() <= 6
    if cell == "transformer":
        return  # other positions' keys have stopped too, so the trajectory is another one
    small = torch.cat([changes <= threshold, torch.ones(1, *batch.shape, dtype=torch.bool)])
    expected = small.long().argmax(dim=0) + 2
    assert torch.equal(steps, expected.clamp(max=6))
    stopped_at = torch.stack(outputs.feedback_states).gather(0, (steps - 1)[None, ..., None].expand(1, *h[0].shape))
    assert_close(halted.logits, model.lm_head(stopped_at[0]), 1e-5)


def test_converged_everywhere_saves_passes():
    """With a threshold that everything meets, two passes run; with one that nothing meets, all do."""
    passes, batch = [], tokens()
    for threshold in (1000, 1e-9):
        model = build(halting_threshold=threshold, **CONVERGED)
        calls = []
        model.model.loop.cell.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        original = model.model.loop.cell.step
        model.model.loop.cell.step = lambda *a, original=original, calls=calls: (calls.append(1), original(*a))[1]
        steps = model(batch).num_feedback_steps
        passes.append((steps.min().item(), steps.max().item()))
    assert passes == [(2, 2), (6, 6)]


@pytest.mark.parametrize("where", ["left", "right", "inside"])
def test_steps_of_padding(where):
    """Padding makes no passes, and each row's positions make those they make alone."""
    model, batch = build(halting_threshold=0.4, **CONVERGED), tokens(3, 11)
    padded, mask = pad(batch, [11, 8, 4], where)
    steps = model(padded, attention_mask=mask).num_feedback_steps
    for i, length in enumerate([11, 8, 4]):
        assert torch.equal(steps[i][mask[i].bool()], model(batch[i : i + 1, :length]).num_feedback_steps[0])
    assert steps[mask == 0].max() <= 1


def test_training_makes_all_passes():
    model, batch = build(halting_threshold=1000, **CONVERGED), tokens()
    assert model(batch).num_feedback_steps.max() == 2
    assert model.train()(batch).num_feedback_steps.min() == 6
    fixed = build(num_feedback_steps=6).train()
    assert_close(model(batch).logits, fixed(batch).logits, 1e-6)


def ponder(model, batch):
    """λ of every pass, [K, B, T], and the logits, written out."""
    outputs = model(batch, output_hidden_states=True, output_feedback_states=True)
    loop = model.model.loop
    lambdas = torch.stack([loop.halting.halt_proj(h)[..., 0].sigmoid() for h in outputs.hidden_states[2:-1]])
    return lambdas, outputs


def test_learned_halting_is_pondernet():
    """L = Σ_k p_k L_k + β KL(p | geometric prior), every token its own p; in evaluation, the first pass by which it
    has stopped with a probability of a half."""
    fields = {"num_feedback_steps": 4, "halting": "learned", "halting_prior": 0.3, "halting_weight": 0.7}
    model, batch = build(initializer_range=0.3, feedback_type="mlp", encoder_type="cnn", **fields).train(), tokens()
    loss = model(batch, labels=batch).loss
    lambdas, outputs = ponder(model, batch)
    left, p = torch.ones(batch.shape), []
    for k, stop in enumerate(lambdas):
        p.append(left * (stop if k < 3 else 1))
        left = left - p[-1]
    p = torch.stack(p)
    assert_close(p.sum(0), torch.ones(batch.shape), 1e-6)
    expected = torch.zeros(())
    for weight, y in zip(p, outputs.feedback_states, strict=True):
        losses = F.cross_entropy(model.lm_head(y)[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none")
        expected = expected + (weight[:, :-1] * losses).mean()
    prior = torch.tensor([0.3 * 0.7**k for k in range(4)])
    prior = (prior / prior.sum())[:, None, None]
    expected = expected + 0.7 * (p * (p / prior).log()).sum(0)[:, :-1].mean()  # of the positions with a target
    assert_close(loss, expected, 1e-5)
    loss.backward()
    assert model.model.loop.halting.halt_proj.weight.grad.abs().max() > 1e-4
    model.eval()
    steps = model(batch).num_feedback_steps
    assert torch.equal(steps, (p.cumsum(0) >= 0.5).long().argmax(0) + 1)
    assert steps.min() < steps.max()


def test_learned_halting_begins_at_its_prior():
    fields = {"num_feedback_steps": 4, "halting": "learned", "halting_prior": 0.3}
    model = FeedbackForCausalLM(tiny(**fields)).train()
    p = torch.stack(model.model(tokens()).halting_probabilities)
    prior = torch.tensor([0.3, 0.3 * 0.7, 0.3 * 0.7**2, 0.7**3])  # the last pass takes what is left
    assert_close(p, prior[:, None, None].expand_as(p), 1e-6)


def test_learned_halting_that_is_sure():
    """A position that has stopped for certain leaves no probability to later passes, and no NaN in the gradient."""
    model, batch = build(num_feedback_steps=4, halting="learned").train(), tokens()
    torch.nn.init.constant_(model.model.loop.halting.halt_proj.bias, 200.0)
    assert all(gradient.isfinite().all() for gradient in gradients(model, batch).values())
    assert model.model(batch).halting_probabilities[1].max() == 0


def test_learned_halting_in_a_single_pass():
    """It is certain to stop there, and costs nothing."""
    model, batch = build(halting="learned").train(), tokens()
    outputs = model(batch, labels=batch, num_feedback_steps=1)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    assert_close(outputs.loss, expected, 1e-6)


def test_learned_halting_of_masked_tokens():
    """Labels stand beside their logits, and aren't shifted."""
    fields = {"is_causal": False, "halting": "learned", "halting_weight": 0.0}
    model, batch = build(FeedbackForMaskedLM, **fields).train(), tokens()
    outputs, expected = model.model(batch), torch.zeros(())
    for y, p in zip(outputs.feedback_states, outputs.halting_probabilities, strict=True):
        losses = F.cross_entropy(model.lm_head(y).transpose(1, 2), batch, reduction="none")
        expected = expected + (losses * p).mean()
    assert_close(model(batch, labels=batch).loss, expected, 1e-6)


def test_act_reads_the_mean_of_its_states():
    """Graves' equations: passes until the λ sum up to the threshold, the last weight cut to the rest; N + R is
    paid."""
    fields = {"num_feedback_steps": 4, "halting": "act", "halting_threshold": 0.95, "halting_weight": 0.3}
    model = build(initializer_range=0.3, feedback_type="mlp", encoder_type="cnn", num_decoder_layers=0, **fields)
    batch = tokens()
    full = with_weights_of(
        build(
            initializer_range=0.3,
            feedback_type="mlp",
            encoder_type="cnn",
            num_decoder_layers=0,
            num_feedback_steps=4,
            halting="learned",
        ),
        num_feedback_steps=4,
        halting="learned",
        feedback_type="mlp",
        encoder_type="cnn",
        num_decoder_layers=0,
    ).train()
    full.load_state_dict(model.state_dict())
    lambdas, outputs = ponder(full, batch)
    steps, mean, rest = (
        torch.zeros(batch.shape, dtype=torch.long),
        torch.zeros(*batch.shape, 32),
        torch.zeros(batch.shape),
    )
    for b in range(batch.shape[0]):
        for t in range(batch.shape[1]):
            total = 0.0
            for k in range(4):
                weight = lambdas[k, b, t]
                ends = k == 3 or total + weight >= 0.95
                weight = 1 - total if ends else weight
                mean[b, t] += weight * outputs.hidden_states[2 + k][b, t]
                total = total + weight
                if ends:
                    steps[b, t], rest[b, t] = k + 1, weight
                    break
    halted = model(batch)
    assert torch.equal(halted.num_feedback_steps, steps)
    assert steps.min() < steps.max()
    assert_close(halted.logits, model.lm_head(model.model.norm(mean)), 1e-5)
    plain = F.cross_entropy(halted.logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    assert_close(model.train()(batch, labels=batch).loss, plain + 0.3 * (steps + rest)[:, :-1].mean(), 1e-5)


def test_learned_halting_of_a_classifier():
    """A row stops with the probability of the position that it is read at."""
    fields = {"num_feedback_steps": 3, "halting": "learned", "halting_weight": 0.0, "num_labels": 3}
    model = build(FeedbackForSequenceClassification, **fields).train()
    batch, labels = tokens(3), torch.tensor([0, 1, 2])
    outputs = model.model(batch, predict=model.predict)
    expected = torch.zeros(())
    for y, p in zip(outputs.feedback_states, outputs.halting_probabilities, strict=True):
        losses = F.cross_entropy(model.classifier(y[:, -1]), labels, reduction="none")
        expected = expected + (losses * p[:, -1]).mean()
    assert_close(model(batch, labels=labels).loss, expected, 1e-6)
    numbers = torch.rand(3, 1)
    regression = build(FeedbackForSequenceClassification, **{**fields, "num_labels": 1}).train()
    outputs = regression.model(batch, predict=regression.predict)
    steps = zip(outputs.feedback_states, outputs.halting_probabilities, strict=True)
    errors = [((regression.classifier(y[:, -1]) - numbers) ** 2)[:, 0] * p[:, -1] for y, p in steps]
    assert_close(regression(batch, labels=numbers).loss, torch.stack(errors).sum(0).mean(), 1e-6)


def test_predictions_in_training():
    """Training makes all passes, and so needs the prediction of the last alone."""
    model, calls = build(halting_measure="prediction", **CONVERGED), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    model.train()(tokens())
    assert len(calls) == 1


def test_predictions_without_classes():
    prediction = {"halting": "converged", "halting_measure": "prediction"}
    with pytest.raises(ValueError, match="halting_measure='state'"):
        build(FeedbackForTimeSeriesPrediction, input_config="values", **prediction)
    with pytest.raises(ValueError, match="halting_measure='state'"):
        build(FeedbackForQuestionAnswering, **prediction)
    with pytest.raises(ValueError, match="use 'state'"):
        build(FeedbackForSequenceClassification, num_labels=1, **prediction)


def test_settings_of_other_rules():
    """What would be ignored is refused; whole numbers are numbers."""
    with pytest.raises(ValueError, match="use halting='converged'"):
        build(solver_tolerance=1e-3)
    with pytest.raises(ValueError, match="is for 'converged'"):
        build(halting="act", halting_measure="prediction")
    build(halting="act", halting_weight=0, halting_threshold=1)


@pytest.mark.parametrize("halting", ["learned", "act"])
@pytest.mark.parametrize("head", [FeedbackForCausalLM, FeedbackForMaskedLM, FeedbackForTokenClassification])
def test_gradient_accumulation_with_halting(head, halting):
    """Two halves of a batch give the gradient of the whole, whose items Trainer counts as the loss does."""
    fields = {"halting": halting, "halting_weight": 0.5, "is_causal": head is FeedbackForCausalLM}
    model, batch = build(head, num_labels=50, **fields).train(), tokens(4)
    items = 4 * (12 if head is FeedbackForCausalLM else 13)
    whole = gradients(model, batch, num_items_in_batch=items)
    plain = gradients(model, batch)
    for name in whole:
        torch.testing.assert_close(whole[name], plain[name], atol=1e-6, rtol=1e-4, msg=name)
    model.zero_grad()
    for half in batch.split(2):
        model(half, labels=half, num_items_in_batch=items).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-6, rtol=1e-4, msg=name)


def test_settings_of_halting_may_be_changed_on_a_model():
    fields = {"num_feedback_steps": 5, "halting": "converged"}
    model, batch = build(initializer_range=0.3, **fields, halting_threshold=1e-3), tokens()
    model.config.halting_threshold = 0.9
    other = with_weights_of(model, **fields, halting_threshold=0.9)
    assert torch.equal(model(batch).num_feedback_steps, other(batch).num_feedback_steps)
    model.config.halting = "fixed"
    with pytest.raises(ValueError, match="config.halting is 'fixed', for which this model was not made"):
        model(batch)


@pytest.mark.parametrize("halting", ["learned", "act"])
def test_halting_costs_the_same_in_parts(halting):
    """Of gradient accumulation, with rows of which little is a target."""
    model, batch = build(num_feedback_steps=4, halting=halting, halting_weight=1.0).train(), tokens(4)
    labels = batch.clone()
    labels[0, :-1] = -100
    whole = gradients(model, batch) | {}
    model.zero_grad()
    total, count = 0.0, (labels[:, 1:] != -100).sum()
    loss = model(batch, labels=labels).loss
    loss.backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, 4)):
        part = model(batch[rows], labels=labels[rows], num_items_in_batch=count).loss
        part.backward()
        total = total + part.detach()
    assert_close(total, loss, 1e-5)
    for gradient, parameter in zip(whole, model.parameters(), strict=True):
        assert_close(parameter.grad, gradient, 1e-5)


def test_halting_costs_nothing_for_padding():
    """In a head whose loss is of whole rows."""
    fields = {"num_feedback_steps": 4, "halting": "act", "halting_weight": 1.0}
    model, (batch, mask) = build(FeedbackForQuestionAnswering, **fields).train(), pad(tokens(2, 9), [9, 9], "right")
    places = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    longer = F.pad(batch, (0, 4)), F.pad(mask, (0, 4))
    expected = model(batch, attention_mask=mask, **places)
    padded = model(longer[0], attention_mask=longer[1], **places)
    halting = [
        output.loss
        - F.cross_entropy(output.start_logits, places["start_positions"]) / 2
        - F.cross_entropy(output.end_logits, places["end_positions"]) / 2
        for output in (expected, padded)
    ]
    assert_close(*halting, 1e-5)
    assert halting[0] > 1


def test_learned_halting_leaves_out_rows_without_a_label():
    model = build(FeedbackForSequenceClassification, num_labels=3, num_feedback_steps=3, halting="learned").train()
    batch, labels = tokens(4), torch.tensor([0, -100, -100, 2])
    known = labels != -100
    assert_close(model(batch, labels=labels).loss, model(batch[known], labels=labels[known]).loss, 1e-6)
