"""The loss of padded rows is that of each text alone, whatever the side, under Trainer too."""

import pytest
import torch
from conftest import BOS, EOS, PAD, arguments, assert_close, build
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, default_data_collator

from feedback_transformers import FeedbackForConditionalGeneration, FeedbackForMaskedLM, FeedbackForTokenClassification
from feedback_transformers.models import feedback_objectives
from feedback_transformers.training import DataCollatorForLeftPadding

LENGTHS = (3, 7, 5, 2, 1, 4, 8, 3)
WIDTH = 8
each_side = pytest.mark.parametrize("side", ["left", "right"])


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 50, (length,), generator=generator).tolist() for length in LENGTHS]


def fill(row: list[int], value: int, side: str) -> list[int]:
    filling = [value] * (WIDTH - len(row))
    return row + filling if side == "right" else filling + row


def padded(side: str) -> list[dict]:
    return [
        {
            "input_ids": fill(text, PAD, side),
            "attention_mask": fill([1] * len(text), 0, side),
            "labels": fill(text, -100, side),
        }
        for text in texts()
    ]


@torch.no_grad()
def by_hand(model, smoothing: float = 0.0) -> float:
    """The mean over all targets, from each text without padding."""
    total, count = 0.0, 0
    for text in texts():
        logits = model(torch.tensor([text])).logits[0, :-1]
        total += F.cross_entropy(
            logits, torch.tensor(text[1:], dtype=torch.long), reduction="sum", label_smoothing=smoothing
        ).item()
        count += len(text) - 1
    return total / count


def trained_loss(model, rows: list[dict], folder, collator=default_data_collator, **fields) -> tuple[float, float]:
    """The loss that Trainer logs for one step over all rows, and the one that it evaluates in one batch."""
    fields = {"per_device_train_batch_size": len(rows), "max_steps": 1, "learning_rate": 0.0, **fields}
    options = arguments(folder, per_device_eval_batch_size=len(rows), save_strategy="no", **fields)
    data = Dataset.from_list(rows)
    trainer = Trainer(model, options, data_collator=collator, train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer.state.log_history[-1]["train_loss"], trainer.evaluate()["eval_loss"]


@each_side
def test_the_loss_under_trainer_is_that_of_each_text(side, tmp_path):
    model = build()
    expected = by_hand(model)
    assert trained_loss(model, padded(side), tmp_path) == pytest.approx((expected, expected), abs=1e-4)


@each_side
@pytest.mark.parametrize("fields", [{"supervision": "all"}, {"halting": "learned", "halting_weight": 0.1}], ids=str)
def test_the_side_does_not_matter_to_steps_and_halting(side, fields):
    """With the number of targets that Trainer counts, all labels but the first column."""
    model = build(**fields).train()
    batches = {name: default_data_collator(padded(name)) for name in ("left", "right")}
    counts = {name: (batch["labels"][:, 1:] != -100).sum() for name, batch in batches.items()}
    assert counts["left"] > counts["right"] == sum(LENGTHS) - len(LENGTHS)
    expected = model(**batches["right"]).loss
    assert_close(model(**batches[side], num_items_in_batch=counts[side]).loss, expected, 1e-5)


@each_side
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_batches_in_parts_and_label_smoothing(side, smoothing, accumulate, tmp_path):
    """Exact with labels that leave the first token out where Trainer counts."""
    model = build()
    expected = by_hand(model, smoothing)
    losses = trained_loss(
        model,
        padded(side),
        tmp_path,
        DataCollatorForLeftPadding(default_data_collator),
        per_device_train_batch_size=len(LENGTHS) // accumulate,
        gradient_accumulation_steps=accumulate,
        label_smoothing_factor=smoothing,
    )
    assert losses == pytest.approx((expected, expected), abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, "weighted a little otherwise"),
        ({"label_smoothing_factor": 0.1}, "taken outside of the model"),
    ],
    ids=["parts", "smoothing"],
)
def test_what_is_not_exact_is_told(fields, sentence, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(feedback_objectives.logger, "warning_once", said.append)
    trained_loss(build(), padded("right"), tmp_path, **fields)
    assert not said
    trained_loss(build(), padded("left"), tmp_path, **fields)
    assert said and all(sentence in line and "DataCollatorForLeftPadding" in line for line in said)


@each_side
@pytest.mark.parametrize(
    ("head", "fields"),
    [(FeedbackForMaskedLM, {"is_causal": False}), (FeedbackForTokenClassification, {"num_labels": 50})],
    ids=["masked", "tokens"],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_beside_their_logits(side, head, fields, smoothing, tmp_path):
    """Every token is a target, the first one too."""
    model = build(head, **fields)
    total = 0.0
    with torch.no_grad():
        for text in texts():
            logits, target = model(torch.tensor([text])).logits[0], torch.tensor(text)
            total += F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing).item()
    losses = trained_loss(
        model,
        padded(side),
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        label_smoothing_factor=smoothing,
    )
    assert losses == pytest.approx((total / sum(LENGTHS),) * 2, abs=1e-4)


def loss_of_targets(model, smoothing: float) -> float:
    total = 0.0
    for text in texts():
        target = torch.tensor(text)
        logits = model(target.flip(0)[None], decoder_input_ids=torch.tensor([[BOS, *text[:-1]]])).logits[0]
        total += F.cross_entropy(logits, target, reduction="sum", label_smoothing=smoothing).item()
    return total / sum(LENGTHS)


@each_side
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_targets_of_a_source(side, smoothing, accumulate, tmp_path, tokenizer: PreTrainedTokenizerFast):
    """Padding before a target is masked, and the start token stands right before the text."""
    model = build(FeedbackForConditionalGeneration, is_encoder_decoder=True, decoder_start_token_id=BOS)
    with torch.no_grad():
        expected = loss_of_targets(model, smoothing)
    tokenizer.padding_side = side
    losses = trained_loss(
        model,
        [{"input_ids": text[::-1], "attention_mask": [1] * len(text), "labels": text} for text in texts()],
        tmp_path,
        DataCollatorForSeq2Seq(tokenizer, model),
        per_device_train_batch_size=len(LENGTHS) // accumulate,
        gradient_accumulation_steps=accumulate,
        label_smoothing_factor=smoothing,
    )
    assert losses == pytest.approx((expected, expected), abs=1e-4)


@pytest.mark.parametrize("start", [BOS, PAD])
def test_decoder_inputs_of_labels(start):
    """Those of labels alone are masked exactly where padding starts a text too, as in T5."""
    fields = {"is_encoder_decoder": True, "decoder_start_token_id": start}
    model = build(FeedbackForConditionalGeneration, **fields)
    labels = torch.tensor([[-100, -100, 7, 8], [5, 6, 7, EOS], [-100] * 4])
    expected = torch.tensor([[PAD, PAD, start, 7], [start, 5, 6, 7], [start, PAD, PAD, PAD]])
    assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), expected)
    source = torch.tensor([[9, 10, 11]])
    alone = model(source, labels=torch.tensor([[7, 8]])).logits
    assert_close(model(source, labels=labels[:1]).logits[:, 2:], alone, 1e-5)


def test_a_part_without_targets_has_a_loss_of_zero():
    """All its tokens are the first of their texts; the other parts have the targets."""
    ids = torch.tensor([[PAD, 7], [PAD, 8]])
    mask: Tensor = torch.tensor([[0, 1], [0, 1]])
    labels = ids.masked_fill(mask == 0, -100)
    assert build()(ids, attention_mask=mask, labels=labels, num_items_in_batch=torch.tensor(9)).loss == 0
