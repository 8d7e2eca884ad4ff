"""Deep supervision with a carried state, the halting loss of whole sequences, the average of the weights."""

import copy

import pytest
import torch
import transformers
from conftest import arguments, assert_close, build, losses, tokens
from datasets import Dataset
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback

from feedback_transformers import (
    PRESETS,
    FeedbackForMaskedLM,
    FeedbackForObjectDetection,
    FeedbackForQuestionAnswering,
    FeedbackForSequenceClassification,
    FeedbackForTokenClassification,
)
from feedback_transformers.models.feedback_objectives import supervised_answers
from feedback_transformers.models.feedback_recursions import LowState
from feedback_transformers.models.feedback_states import FeedbackState
from feedback_transformers.training import AverageWeights, CarryState, SampleFeedbackSteps, train_safely

LENGTH, CLASSES = 6, 3
SMALL = {"num_feedback_layers": 1, "num_low_steps": 2, "supervision_interval": 2, "num_feedback_steps": 6}


def puzzle_model(preset: str = "trm", **fields):
    shape = {"num_labels": CLASSES, "gradient_steps": 1, "pad_token_id": None}
    return build(FeedbackForTokenClassification, **{**PRESETS[preset], **SMALL, **shape, **fields})


def batches(number: int, rows: int = 4) -> list[dict[str, torch.Tensor]]:
    made = [tokens(rows, LENGTH, 7 * step) for step in range(number)]
    return [{"input_ids": ids, "labels": (ids + ids.roll(1, 1)) % CLASSES} for ids in made]


def stop_with(model, bias: float) -> None:
    with torch.no_grad():
        model.model.loop.halting.halt_proj.bias.fill_(bias)


@torch.no_grad()
def restart(model, done: torch.Tensor, state: FeedbackState | None) -> FeedbackState:
    """The official reset_carry: initial vectors at the rows that are done."""
    loop, rows = model.model.loop, done[:, None, None]
    high = loop.initial_state.vector.expand(len(done), LENGTH, -1)
    low = loop.cell.low_state.expand_as(high)
    if state is None:
        return FeedbackState(high, None, LowState(low))
    return FeedbackState(torch.where(rows, high, state.h), None, LowState(torch.where(rows, low, state.cell[0])))


def by_hand(model, data: list[dict], optimizer, most: int) -> list[float]:
    """TRM's training as its authors wrote it: carry, answer, loss, rows that halted take the next batch's."""
    done, count, state, rows = torch.ones(len(data[0]["labels"]), dtype=torch.bool), torch.zeros(4), None, data[0]
    made = []
    for batch in data:
        state = restart(model, done, state)
        rows = {name: torch.where(done[:, None], batch[name], rows[name]) for name in rows}
        count = torch.where(done, 0, count) + 1
        outputs = model(input_ids=rows["input_ids"], num_feedback_steps=2, feedback_state=state)
        state, q = outputs.feedback_state.detach(), outputs.halting_logits[-1]
        right = (outputs.logits.argmax(-1) == rows["labels"]).all(1).float()
        loss = F.cross_entropy(outputs.logits.flatten(0, 1), rows["labels"].flatten())
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(q[:, 0], right)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        made.append(loss.item())
        done = (q[:, 0] >= 0) | (count >= most)
    return made


@pytest.mark.parametrize("bias", [-9.0, 0.0, 9.0])
def test_carried_training_is_that_of_the_authors(bias):
    model, data = puzzle_model().train(), batches(7)
    stop_with(model, bias)
    reference = copy.deepcopy(model)
    expected = by_hand(reference, data, torch.optim.SGD(reference.parameters(), lr=0.1), most=3)
    carry, optimizer, actual = CarryState(max_answers=3, exploration=0.0), torch.optim.SGD(model.parameters(), 0.1), []
    carry.attach(model)
    for batch in data:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        actual.append(loss.item())
    carry.release()
    assert actual == pytest.approx(expected, abs=1e-5)
    assert model(**data[0]).loss.item() != pytest.approx(actual[0])  # of three answers again, and without a carry
    assert not model._forward_pre_hooks and not model.model.loop._forward_pre_hooks


@pytest.mark.parametrize("preset", ["trm", "trm-singlez", "hrm", "eqr"])
def test_places_are_kept_until_their_row_is_done(preset):
    model, data = puzzle_model(preset).train(), batches(4)
    stop_with(model, -9.0)
    carry = CarryState(max_answers=3, exploration=0.0)
    carry.attach(model)
    for step, batch in enumerate(data):
        model(**batch)
        assert torch.equal(carry.rows["input_ids"], data[0 if step < 3 else 3]["input_ids"])
        assert torch.equal(carry.done, torch.full((4,), step == 2))
    smaller = {name: value[:2] for name, value in data[1].items()}
    model(**smaller)  # as the last batch of an epoch
    assert carry.answers.tolist() == [2, 2, 1, 1]
    with pytest.raises(ValueError, match="max_length"):
        model(input_ids=tokens(4, LENGTH + 1), labels=tokens(4, LENGTH + 1) % CLASSES)
    carry.release()


def test_exploration_keeps_rows():
    model, data = puzzle_model().train(), batches(8)
    stop_with(model, 9.0)
    carry = CarryState(max_answers=4, exploration=1.0)
    carry.attach(model)
    left = []
    for batch in data:
        model(**batch)
        left += carry.answers[carry.done].tolist()
    assert min(left) >= 2 and max(left) <= 4 and len(set(left)) > 1  # without it they leave after the first
    carry.release()


@pytest.mark.parametrize("head", [FeedbackForTokenClassification, FeedbackForMaskedLM])
def test_the_halting_loss_of_sequences_is_the_cross_entropy_of_being_right(head):
    fields = {**PRESETS["trm"], **SMALL, "pad_token_id": None, "num_labels": CLASSES}
    model, (batch,) = build(head, **fields).train(), batches(1)
    with torch.no_grad():  # an answer that is right at half of the rows
        batch["labels"][:2] = model(**batch, output_feedback_states=True).logits.argmax(-1)[:2]
    batch["labels"][0, 0] = -100
    outputs = model(**batch, output_feedback_states=True)
    each = list(zip(model.step_logits(outputs)[1::2], outputs.halting_logits, strict=True))
    assert len(each) == 3
    expected = 0.0
    for logits, q in each:
        wrong = ((logits.argmax(-1) != batch["labels"]) & (batch["labels"] != -100)).any(1)
        expected = expected + F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) / 3
        expected = expected + 0.5 * F.binary_cross_entropy_with_logits(q[:, 0], (~wrong).float()) / 3
    assert_close(outputs.loss, expected, 1e-5)
    outputs.loss.backward()
    assert model.model.loop.halting.halt_proj.weight.grad.abs().sum() > 0


def trainer(folder, callbacks, **fields) -> Trainer:
    rows = [{name: value[0].tolist() for name, value in batch.items()} for batch in batches(32, 1)]
    data = Dataset.from_list(rows)
    return Trainer(
        puzzle_model(), arguments(folder, **fields), train_dataset=data, eval_dataset=data, callbacks=callbacks
    )


def test_resumed_training_with_a_carry_and_an_average_is_the_uninterrupted_one(tmp_path):
    def callbacks():
        return [CarryState(3), AverageWeights(0.9)]

    whole = trainer(tmp_path / "whole", callbacks())
    whole.train()
    resumed = trainer(tmp_path / "whole", callbacks())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert len(losses(whole)) == 8 and losses(resumed) == losses(whole)
    for expected, actual in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_a_resumed_run_says_what_it_misses(tmp_path, caplog):
    trainer(tmp_path / "whole", [CarryState(3)]).train()
    transformers.utils.logging.enable_propagation()
    trainer(tmp_path / "other", [CarryState(3)]).train(str(tmp_path / "whole" / "checkpoint-4"))
    transformers.utils.logging.disable_propagation()
    assert "resume in its output_dir" in caplog.text


def test_the_average_is_evaluated_and_stays(tmp_path):
    plain = trainer(tmp_path / "plain", [], save_steps=1, max_steps=3)
    plain.train()
    average = trainer(
        tmp_path / "average", [AverageWeights(0.9)], save_steps=1, max_steps=3, eval_strategy="steps", eval_steps=1
    )
    average.train()
    expected = dict(puzzle_model().named_parameters())
    losses_of = []
    for step in (1, 2, 3):
        saved = type(average.model).from_pretrained(str(tmp_path / "plain" / f"checkpoint-{step}"))
        raw = type(average.model).from_pretrained(str(tmp_path / "average" / f"checkpoint-{step}"))
        for (name, new), other in zip(saved.named_parameters(), raw.parameters(), strict=True):
            assert torch.equal(new, other)  # checkpoints hold the weights themselves
            expected[name] = (0.9 * expected[name] + 0.1 * new).detach()
        saved.load_state_dict(expected, strict=False)
        losses_of.append(Trainer(saved, arguments(tmp_path)).evaluate(average.train_dataset)["eval_loss"])
    told = [entry["eval_loss"] for entry in average.state.log_history if "eval_loss" in entry]
    assert told == pytest.approx(losses_of, abs=1e-5)
    for name, weights in average.model.named_parameters():
        assert_close(weights, expected[name], 1e-6)


class Seen(TrainerCallback):
    """Note in each call of an evaluation whether the average stands in the model."""

    def __init__(self, average: AverageWeights) -> None:
        self.average, self.seen = average, set()

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.register_forward_hook(self.note)

    def note(self, model, *_) -> None:
        if not model.training:
            self.seen.add(self.average.own is not None)


@pytest.mark.parametrize("several", [False, True])
def test_all_evaluations_of_a_run_are_of_the_average(several, tmp_path):
    average = AverageWeights(0.9)
    run = trainer(
        tmp_path, [average, (seen := Seen(average))], eval_strategy="epoch", num_train_epochs=2, max_steps=-1
    )
    run.eval_dataset = {"one": run.train_dataset, "two": run.train_dataset} if several else run.train_dataset
    run.train()
    assert seen.seen == {True} and average.own is None


def test_an_average_of_half_precision_moves():
    model, average = puzzle_model().to(torch.bfloat16), AverageWeights(0.999)
    average.attach(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    for _ in range(100):
        average.update()
    for mean, weight in zip(average.average, model.parameters(), strict=True):
        assert_close(weight.float() - mean, torch.full_like(mean, 0.999**100), 2e-2)


def test_a_finished_run_ends_with_its_average_again(tmp_path):
    first = trainer(tmp_path, [AverageWeights(0.9)])
    train_safely(first)
    again = trainer(tmp_path, [AverageWeights(0.9)])
    train_safely(again, resume=True)
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_failed_evaluation_leaves_nothing_behind():
    model, average = puzzle_model(), AverageWeights(0.9)
    average.attach(model)
    before = [weight.detach().clone() for weight in model.parameters()]
    average.swap_in()  # and the evaluation stops with an error
    average.attach(model)
    for weight, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, old)


@pytest.mark.parametrize("steps", [6, 7])
def test_answers_and_their_halting_logits_are_of_the_same_passes(steps):
    """The last pass answers too where it is no multiple of the interval."""
    model, (batch,) = puzzle_model(supervision_interval=3, gradient_steps=None).train(), batches(1)
    outputs = model.model(batch["input_ids"], num_feedback_steps=steps, output_feedback_states=True)
    answers = supervised_answers(model.config, outputs, True)
    passes = [3, 6, 7] if steps == 7 else [3, 6]
    assert [id(y) for y in answers] == [id(outputs.feedback_states[k - 1]) for k in passes]
    assert len(outputs.halting_logits) == len(passes)


def test_the_halting_loss_of_parts_adds_up():
    model, (batch,) = puzzle_model(gradient_steps=None).train(), batches(1)
    items = batch["labels"].numel()
    whole = model(**batch, num_items_in_batch=items).loss
    parts = [
        model(**{name: value[i : i + 1] for name, value in batch.items()}, num_items_in_batch=items).loss
        for i in range(4)
    ]
    assert_close(torch.stack(parts).sum(), whole, 1e-5)
    assert_close(model(**batch).loss, whole, 1e-5)


def test_a_fresh_model_lets_no_row_leave():
    torch.manual_seed(0)
    model = FeedbackForTokenClassification(puzzle_model().config)
    assert (model(tokens(4, LENGTH)).halting_logits[0] == -5).all()


def test_heads_that_cannot_learn_it_refuse_it():
    fields = {**PRESETS["trm"], **SMALL, "pad_token_id": None}
    with pytest.raises(ValueError, match="a FeedbackForObjectDetection predicts numbers"):
        build(FeedbackForObjectDetection, **fields, input_config="images")
    model = build(FeedbackForSequenceClassification, **fields, num_labels=1).train()
    with pytest.raises(ValueError, match="learns whether a class is right"):
        model(tokens(), labels=torch.ones(2))


def test_whole_rows_learn_to_stop_in_question_answering():
    """q_stop is compared with whether both ends are right."""
    fields = {**PRESETS["trm"], **SMALL, "pad_token_id": None, "supervision": "last", "halting_weight": 0.5}
    model = build(FeedbackForQuestionAnswering, **fields).train()
    ids = tokens()
    outputs = model(ids, output_feedback_states=True)
    found = [logits.argmax(1) for logits in (outputs.start_logits, outputs.end_logits)]
    ends = {"start_positions": found[0], "end_positions": torch.stack([found[1][0], (found[1][1] + 1) % ids.shape[1]])}
    scores = torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    answer = F.cross_entropy(scores, torch.stack([*ends.values()], dim=1))
    stop = F.binary_cross_entropy_with_logits(outputs.halting_logits[-1][:, 0], torch.tensor([1.0, 0.0]))
    assert_close(model(ids, **ends).loss, answer + 0.5 * stop, 1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"feedback_signal": "output"},
        {"feedback_axis": "time", "feedback_type": "gru"},
        {"feedback_signal": "none"},
        {"feedback_axis": "time", "feedback_type": "transformer", "solver": "jacobi"},
    ],
)
def test_models_without_passes_have_nothing_to_carry(fields):
    with pytest.raises(ValueError, match="CarryState"):
        CarryState().attach(build(**fields))


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="leave SampleFeedbackSteps"):
        trainer(tmp_path, [CarryState(), SampleFeedbackSteps(2, 4)]).train()
    with pytest.raises(ValueError, match="halting='learned' weighs all passes"):
        CarryState().attach(build(halting="learned"))
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer(tmp_path, [CarryState()], label_smoothing_factor=0.1).train()
    model, carry, other = puzzle_model().train(), CarryState(), CarryState()
    carry.attach(model)
    with pytest.raises(ValueError, match="keyword arguments"):
        model(batches(1)[0]["input_ids"])
    other.attach(model)  # after an interrupt of the first
    assert not carry.handles and len(model._forward_pre_hooks) == 1
    with pytest.raises(ValueError, match="max_answers"):
        CarryState(0)
    with pytest.raises(ValueError, match="decay"):
        AverageWeights(1.0)
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        trainer(tmp_path, [CarryState()], gradient_accumulation_steps=2).train()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4}
    with pytest.raises(ValueError, match="load_best_model_at_end"):
        trainer(tmp_path, [AverageWeights()], **best).train()
