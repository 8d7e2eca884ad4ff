"""Every forward names what it reads, and refuses what it would ignore."""

import inspect

import numpy as np
import pytest
import torch
from conftest import BOS, arguments, build, tokens
from datasets import Dataset
from test_heads import HEADS, each_head, inputs_of
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
)
from transformers.utils.generic import find_labels

from feedback_transformers import (
    FeedbackForCausalLM,
    FeedbackForConditionalGeneration,
    FeedbackForMaskedLM,
    FeedbackForQuestionAnswering,
    FeedbackForSequenceClassification,
    FeedbackForTimeSeriesPrediction,
    FeedbackForTokenClassification,
    FeedbackModel,
    retrofit,
)

BERTS = {
    BertForSequenceClassification: FeedbackForSequenceClassification,
    BertForTokenClassification: FeedbackForTokenClassification,
    BertForQuestionAnswering: FeedbackForQuestionAnswering,
}
ROWS, COLUMNS = 4, 8


def pairs_of_texts(head) -> dict:
    """Columns of a data set of two segments, with positions of their own."""
    ids = tokens(ROWS, COLUMNS)
    columns = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.tensor([[0] * 4 + [1] * 4] * ROWS),
        "position_ids": torch.arange(3, 3 + COLUMNS).repeat(ROWS, 1),
    }
    if head is BertForQuestionAnswering:
        return columns | {"start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.tensor([5, 6, 7, 7])}
    if head is BertForSequenceClassification:
        return columns | {"labels": torch.tensor([0, 1, 2, 0])}
    return columns | {"labels": ids % 3}


@pytest.mark.parametrize("head", BERTS, ids=lambda head: head.__name__)
def test_trainer_keeps_the_columns_of_a_pair_of_texts(head, tmp_path):
    """A fresh retrofit computes what BERT does, under Trainer too, which drops what `forward` does not name."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes["num_labels"] = 2 if head is BertForQuestionAnswering else 3
    bert = head(BertConfig(**sizes, num_hidden_layers=3, initializer_range=0.5)).eval()
    if head is BertForSequenceClassification:
        looped = retrofit(bert, 1, 1)
    else:  # a head of ours on the retrofitted base
        base = retrofit(bert.bert, 1, 1)
        looped = BERTS[head](base.config).eval()
        looped.model = base
        name = "qa_outputs" if head is BertForQuestionAnswering else "classifier"
        getattr(looped, name).load_state_dict(getattr(bert, name).state_dict())
    columns = pairs_of_texts(head)
    pairs = Dataset.from_dict({name: column.tolist() for name, column in columns.items()})
    expected = Trainer(bert, arguments(tmp_path)).predict(pairs).predictions
    actual = Trainer(looped, arguments(tmp_path)).predict(pairs).predictions
    np.testing.assert_allclose(np.array(actual), np.array(expected), atol=1e-4)
    for name in ("token_type_ids", "position_ids"):  # each makes a difference
        assert (looped(**{**columns, name: None})[1] - looped(**columns)[1]).abs().max() > 0.01


@each_head
def test_every_argument_is_named(head):
    names = set(inspect.signature(head.forward).parameters)
    assert {"num_feedback_steps", "output_hidden_states", "output_feedback_states"} <= names
    if head is not FeedbackModel and head.reads == "input_ids":
        assert {"attention_mask", "inputs_embeds"} <= names
        if head is not FeedbackForConditionalGeneration:
            assert {"position_ids", "token_type_ids"} <= names
    if head is not FeedbackModel:
        assert ("num_items_in_batch" in names) == head.accepts_loss_kwargs
    if head not in (FeedbackModel, FeedbackForQuestionAnswering, FeedbackForTimeSeriesPrediction):
        assert find_labels(head) == ["labels"]  # more names, and Trainer takes no loss in evaluation


@each_head
def test_what_changes_nothing_is_taken(head):
    """transformers, Trainer and PEFT give these to every model."""
    model, inputs = build(head, **HEADS[head]), inputs_of(head)
    harmless = {"output_attentions": False, "output_router_logits": False, "cache_position": None, "use_cache": False}
    with torch.no_grad():
        assert torch.equal(model(**inputs, **harmless)[0], model(**inputs, use_cache=False)[0])
        assert isinstance(model(**inputs, return_dict=False), tuple)


@each_head
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"num_feedback_step": 9}, "does not know num_feedback_step: did you mean num_feedback_steps?"),
        ({"output_hidden_state": True}, "does not know output_hidden_state: did you mean output_hidden_states?"),
        ({"head_mask": torch.ones(2)}, "does not read head_mask: leave it out."),
        ({"cache_position": torch.arange(3)}, "does not read cache_position: leave it out."),
        ({"is_causal": False}, "does not read is_causal: leave it out."),
        ({"max_length_q": 7}, "max_length_q: Several texts in one row"),
        ({"output_attentions": True}, "Attention weights are not returned"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unknown_argument_is_refused(head, wrong, sentence):
    with pytest.raises(ValueError) as raised:
        build(head, **HEADS[head])(**inputs_of(head), **wrong)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("past_observed_mask", "give windows of one length, with their gaps filled"),
        ("future_observed_mask", "give windows of one length, with their gaps filled"),
        ("past_time_features", "make each feature a channel of past_values"),
        ("future_time_features", "make each feature a channel of past_values"),
        ("static_real_features", "make each feature a channel of past_values"),
        ("static_categorical_features", "make each feature a channel of past_values"),
    ],
)
def test_what_other_forecasters_read(name, advice):
    model = build(FeedbackForTimeSeriesPrediction, **HEADS[FeedbackForTimeSeriesPrediction])
    with pytest.raises(ValueError, match=f"FeedbackForTimeSeriesPrediction does not read {name}: .*{advice}"):
        model(past_values=torch.randn(2, 9), **{name: torch.ones(2, 9)})
    assert model(past_values=torch.randn(2, 9), **{name: None}).prediction_outputs.shape == (2, 4)


LABELS = {"labels": tokens()}
LONGER = [
    (FeedbackModel, {"attention_mask": torch.ones(2, 15)}, r"attention_mask has the shape \[2, 15\].*\[2, 13\]"),
    (FeedbackForCausalLM, {"attention_mask": torch.ones(2, 15)}, r"attention_mask has the shape \[2, 15\].*\[2, 13\]"),
    (FeedbackForCausalLM, {"attention_mask": torch.ones(2, 15), **LABELS}, r"attention_mask has the shape \[2, 15\]"),
    (FeedbackForCausalLM, {"attention_mask": torch.ones(2, 11), **LABELS}, r"attention_mask has the shape \[2, 11\]"),
    (FeedbackForMaskedLM, {"attention_mask": torch.ones(2, 15)}, r"attention_mask has the shape \[2, 15\].*\[2, 13\]"),
    (FeedbackForSequenceClassification, {"attention_mask": torch.ones(2, 15)}, r"\[2, 15\].*\[2, 13\]"),
    (FeedbackForSequenceClassification, {"attention_mask": torch.ones(1, 13)}, r"\[1, 13\].*\[2, 13\]"),
    (FeedbackForTokenClassification, {"attention_mask": torch.ones(2, 15)}, r"\[2, 15\].*\[2, 13\]"),
    (FeedbackForQuestionAnswering, {"attention_mask": torch.ones(2, 15)}, r"\[2, 15\].*\[2, 13\]"),
    (FeedbackForQuestionAnswering, {"start_positions": torch.ones(1), "end_positions": torch.ones(2)}, r"\[1\] and"),
    (FeedbackForQuestionAnswering, {"start_positions": torch.ones(2)}, "give start_positions and end_positions"),
    (FeedbackForMaskedLM, {"token_type_ids": torch.zeros(2, 15).long()}, r"token_type_ids has the shape \[2, 15\]"),
    (FeedbackForMaskedLM, {"token_type_ids": torch.zeros(1, 13).long()}, r"token_type_ids has the shape \[1, 13\]"),
    (FeedbackForMaskedLM, {"token_type_ids": torch.ones(2, 13).long()}, "does not tell types of tokens apart"),
    (FeedbackForMaskedLM, {"position_ids": torch.arange(15)[None]}, r"position_ids have the shape \[1, 15\]"),
    (FeedbackForMaskedLM, {"position_ids": torch.arange(13).repeat(3, 1)}, r"position_ids have the shape \[3, 13\]"),
    (FeedbackForCausalLM, {**LABELS, "shift_labels": tokens(2, 12)}, r"labels have the shape \[2, 12\]"),
]


@pytest.mark.parametrize(("head", "inputs", "sentence"), LONGER, ids=range(len(LONGER)))
def test_shapes_are_compared(head, inputs, sentence):
    model = build(head, **{**HEADS[head], "is_causal": head is not FeedbackForMaskedLM})
    with pytest.raises(ValueError, match=sentence):
        model(input_ids=tokens(), **inputs)


@pytest.mark.parametrize("columns", [3, 7, 9])
def test_a_mask_is_that_of_the_input_or_of_cache_and_input(columns):
    model, batch = build(), tokens(2, 8)
    cache = model(batch[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=rf"\[2, {columns}\]; it must have the shape \[2, 4\] or \[2, 8\]"):
        model(batch[:, 4:], past_key_values=cache, attention_mask=torch.ones(2, columns))


def test_masks_of_a_source_and_its_target():
    fields = {"is_encoder_decoder": True, "decoder_start_token_id": BOS}
    model, target = build(FeedbackForConditionalGeneration, **fields), tokens(2, 6)
    for mask in (torch.ones(2, 15), torch.ones(2, 12), torch.ones(1, 13)):
        with pytest.raises(ValueError, match=r"attention_mask has the shape .*\[2, 13\]"):
            model(tokens(), attention_mask=mask, labels=target)
        encoded = model.get_encoder()(tokens())
        with pytest.raises(ValueError, match=r"attention_mask has the shape .*\[2, 13\]"):
            model(encoder_outputs=encoded, attention_mask=mask, labels=target)
        with pytest.raises(ValueError, match=r"encoder_attention_mask has the shape .*\[2, 13\]"):
            model.model(target, encoder_hidden_states=encoded[0], encoder_attention_mask=mask)
    for columns in (5, 7):
        with pytest.raises(ValueError, match=rf"decoder_attention_mask has the shape \[2, {columns}\].*\[2, 6\]"):
            model(tokens(), labels=target, decoder_attention_mask=torch.ones(2, columns))


PROBLEMS = [
    (
        3,
        torch.tensor([[1, 0, 1], [0, 0, 1]]),
        r"\[2, 3\] and .* one class for each row, or labels.float",
    ),
    (3, torch.tensor([0.5, 2.0]), r"give one number for each output of each row, or labels.long\(\) for classes; one"),
    (3, torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]), r"labels have the shape \[3, 2\] and the logits \[2, 3\]"),
    (1, torch.tensor([[0.5, 2.0]]), r"labels have the shape \[1, 2\] and the logits \[2, 1\]"),
    (3, torch.tensor([0, 5]), "labels go up to 5 and num_labels is 3"),
]


@pytest.mark.parametrize(("size", "labels", "sentence"), PROBLEMS, ids=range(len(PROBLEMS)))
def test_a_refused_label_leaves_the_problem_open(size, labels, sentence):
    model = build(FeedbackForSequenceClassification, num_labels=size)
    with pytest.raises(ValueError, match=sentence):
        model(tokens(), labels=labels)
    assert model.config.problem_type is None


def test_whole_numbers_are_numbers_in_a_regression():
    model = build(FeedbackForSequenceClassification, num_labels=1)
    outputs = model(tokens(), labels=torch.tensor([3, -1]))
    expected = (outputs.logits[:, 0] - torch.tensor([3.0, -1.0])).square().mean()
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()


@pytest.mark.parametrize("head", [FeedbackForTokenClassification, FeedbackForCausalLM])
def test_classes_are_whole_numbers(head):
    with pytest.raises(ValueError, match=r"labels are torch.float32: give the number of a class, labels.long\(\)"):
        build(head, num_labels=3)(tokens(), labels=torch.zeros(2, 13))
