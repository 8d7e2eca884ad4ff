"""The stock Trainer, a bare Accelerate loop, and the callbacks."""

import math
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import BOS, EOS, PAD, arguments, assert_close, build, dataset, losses, make_tokenizer, tokens
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from feedback_transformers import (
    FeedbackForConditionalGeneration,
    FeedbackForSequenceClassification,
)
from feedback_transformers.models import modeling_feedback_heads
from feedback_transformers.models.feedback_loop import FeedbackLoop
from feedback_transformers.training import SampleFeedbackSteps, draw_steps, set_steps

MODELS = [
    {"feedback_type": "gru", "feedback_axis": "time"},
    {"feedback_type": "transformer", "dropout": 0.1, "feedback_noise": 0.1},
    {"feedback_axis": "time", "solver": "jacobi", "feedback_signal": "output", "supervision": "all"},
]


@pytest.mark.parametrize("fields", MODELS, ids=["time", "depth", "jacobi"])
@pytest.mark.parametrize("sampled", [(), (1, 5), (1, 5, 0.75)], ids=["fixed", "sampled", "curriculum"])
def test_resumed_training_is_the_uninterrupted_one(fields, sampled, tmp_path):
    """To the bit, noise, dropout and drawn steps included."""
    if sampled and fields.get("feedback_axis") == "time" and "solver" not in fields:
        fields = {**fields, "solver": "jacobi"}

    def make(folder) -> Trainer:
        return Trainer(
            build(**fields),
            arguments(folder),
            train_dataset=dataset(),
            callbacks=[SampleFeedbackSteps(*sampled)] if sampled else None,
        )

    whole = make(tmp_path / "whole")
    whole.train()
    assert len(losses(whole)) == 8 and losses(whole)[-1] < losses(whole)[0]
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    for expected, actual in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("fields", MODELS, ids=["time", "depth", "jacobi"])
def test_evaluation_and_prediction(fields, tmp_path):
    """Logits come back, the cache and the trajectory do not, and the metrics are those of the logits."""
    trainer = Trainer(
        build(**fields),
        arguments(tmp_path, per_device_eval_batch_size=3),
        eval_dataset=dataset(8),
        compute_metrics=lambda p: {"accuracy": (p.predictions[:, :-1].argmax(-1) == p.label_ids[:, 1:]).mean()},
    )
    metrics = trainer.evaluate()
    predicted = trainer.predict(dataset(8))
    model, batch = trainer.model.eval(), tokens(8, 16)
    outputs = model(batch, labels=batch)
    assert predicted.predictions.shape == (8, 16, 50)
    np.testing.assert_allclose(predicted.predictions, outputs.logits.detach().numpy(), atol=1e-4)
    assert metrics["eval_loss"] == pytest.approx(outputs.loss.item(), abs=1e-4)
    assert "eval_accuracy" in metrics


def test_classification_with_padding(tmp_path):
    rows = [{"input_ids": tokens(1, n)[0].tolist(), "label": n % 2} for n in range(3, 23)]
    model = build(FeedbackForSequenceClassification, num_labels=2, feedback_type="gru", feedback_axis="time")
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=4),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    logits = trainer.predict(Dataset.from_list(rows)).predictions
    assert logits.shape == (20, 2)
    alone = model.eval()(torch.tensor([rows[0]["input_ids"]])).logits[0]
    np.testing.assert_allclose(logits[0], alone.detach().numpy(), atol=1e-4)


def test_gradient_accumulation_equals_the_big_batch(tmp_path):
    """Rows of unequal lengths, so that the mean of means is not the mean."""
    rows = dataset(16).to_list()
    for i, row in enumerate(rows):
        row["labels"] = row["labels"][: 4 + i % 12] + [-100] * (12 - i % 12)
    weights, logged = [], []
    for batch, accumulate in ((8, 1), (2, 4)):
        trainer = Trainer(
            build(),
            arguments(
                tmp_path / str(batch),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                max_steps=2,
                optim="sgd",
                learning_rate=0.1,
                train_sampling_strategy="sequential",
            ),
            train_dataset=Dataset.from_list(rows),
        )
        trainer.train()
        weights.append(list(trainer.model.parameters()))
        logged.append(losses(trainer))
    assert logged[0] == pytest.approx(logged[1], abs=1e-4)
    for big, small in zip(*weights, strict=True):
        assert_close(small, big, 1e-5)


def test_trainer_with_activation_checkpointing_and_bf16(tmp_path):
    trainer = Trainer(
        build(feedback_type="gru"),
        arguments(tmp_path, activation_checkpointing=True, bf16=True),
        train_dataset=dataset(),
    )
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_seq2seq_trainer_generates(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "right"
    model = build(
        FeedbackForConditionalGeneration, is_encoder_decoder=True, decoder_start_token_id=BOS, eos_token_id=EOS
    )
    rows = Dataset.from_list(
        [{"input_ids": tokens(1, n)[0].tolist(), "labels": [*tokens(1, n)[0, :4].tolist(), EOS]} for n in range(4, 12)]
    )
    seen = []
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            predict_with_generate=True,
            generation_max_length=7,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        compute_metrics=lambda p: seen.append(p) or {"rows": len(p.predictions)},
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 8 and math.isfinite(metrics["eval_loss"])
    assert (seen[0].predictions[:, 7:] == PAD).all()  # the trainer pads to the model's own max_length
    expected = model.generate(torch.tensor([rows[0]["input_ids"]]), max_length=7, do_sample=False)[0]
    assert seen[0].predictions[0, : len(expected)].tolist() == expected.tolist()


@pytest.mark.parametrize("fields", MODELS, ids=["time", "depth", "jacobi"])
def test_accelerate_equals_a_plain_loop(fields):
    def loop(accelerator: Accelerator | None) -> list[float]:
        model = build(**fields).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        loader = DataLoader(dataset().with_format("torch"), batch_size=8)
        if accelerator:
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        torch.manual_seed(1)
        seen = []
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss) if accelerator else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        return seen

    plain = loop(None)
    assert len(plain) == 4
    assert loop(Accelerator(cpu=True)) == plain


# SampleFeedbackSteps


def test_draw_steps():
    """A function of its arguments alone, uniform, and deaf to the global random state."""
    draws = [draw_steps(step, 2, 6, seed=1) for step in range(2000)]
    random.seed(0)
    assert draws == [draw_steps(step, 2, 6, seed=1) for step in range(2000)]
    counts = [draws.count(n) for n in range(2, 7)]
    assert sum(counts) == 2000 and min(counts) > 320
    assert draws != [draw_steps(step, 2, 6, seed=2) for step in range(2000)]
    for minimum, maximum in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match="must be 1 <= minimum <= maximum"):
            SampleFeedbackSteps(minimum, maximum)


def test_the_curriculum_is_linear():
    plain, slow = SampleFeedbackSteps(1, 5), SampleFeedbackSteps(1, 5, curriculum=0.5)
    assert [slow.most(step / 20) for step in range(20)] == [1, 1, 1, 2, 2, 3, 3, 3, 4, 4, *[5] * 10]
    assert {plain.most(step / 20) for step in range(20)} == {5}
    assert SampleFeedbackSteps(2, 2, 1.0).most(0.3) == 2
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match="is a share of training"):
            SampleFeedbackSteps(1, 5, share)


def test_without_passes_there_is_nothing_to_draw(tmp_path):
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2))
    for model, sentence in ((plain, "no feedback steps to draw"), (build(feedback_axis="time"), "set config.solver")):
        arguments = TrainingArguments(tmp_path, use_cpu=True)
        trainer = Trainer(model, arguments, train_dataset=[{}], callbacks=[SampleFeedbackSteps(1, 2)])
        with pytest.raises(ValueError, match=sentence):
            trainer.train()


def test_a_loop_whose_code_came_with_a_checkpoint_has_steps_to_draw():
    loop = type("FeedbackLoop", (torch.nn.Module,), {})()
    set_steps(torch.nn.Sequential(loop), 3)
    assert loop.num_steps == 3


class CountPasses(TrainerCallback):
    """Counts the passes of each forward, by the calls of the cell."""

    def __init__(self, model) -> None:
        self.model, self.calls, self.training, self.evaluation = model, 0, [], []
        loop = model.model.loop
        step = loop.cell.step

        def counted(*args):
            self.calls += 1
            return step(*args)

        loop.cell.step = counted
        model.register_forward_hook(self.after)

    def after(self, model, *args) -> None:
        (self.training if model.training else self.evaluation).append(self.calls)
        self.calls = 0


def test_sampled_steps_are_those_that_run(tmp_path):
    """Drawn for training, each micro-batch of a step alike; the config's own number for evaluation."""
    model = build()
    passes = CountPasses(model)
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=6,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            eval_steps=2,
            eval_strategy="steps",
        ),
        train_dataset=dataset(),
        eval_dataset=dataset(4),
        callbacks=[SampleFeedbackSteps(1, 6)],
    )
    trainer.train()
    assert passes.training == [draw_steps(step, 1, 6, 5) for step in range(6) for _ in range(2)]
    assert len(set(passes.training)) > 2
    assert set(passes.evaluation) == {3}
    assert all(module.num_steps is None for module in model.modules() if isinstance(module, FeedbackLoop))


def test_an_interrupted_step_leaves_no_number_behind(tmp_path):
    class Interrupt(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
            raise KeyboardInterrupt

    model, callbacks = build(), [SampleFeedbackSteps(1, 2), Interrupt()]
    with pytest.raises(KeyboardInterrupt):
        Trainer(model, arguments(tmp_path), train_dataset=dataset(), callbacks=callbacks).train()
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens()).logits, model(tokens(), num_feedback_steps=3).logits)


def test_a_curriculum_draws_up_to_where_it_is(tmp_path):
    """Another seed, or no curriculum, draws otherwise; the same draws alike, whatever drew before."""
    model = build()
    passes, sampled = CountPasses(model), SampleFeedbackSteps(1, 6, curriculum=0.5)
    Trainer(model, arguments(tmp_path, max_steps=20), train_dataset=dataset(), callbacks=[sampled]).train()
    assert passes.training == [draw_steps(step, 1, sampled.most(step / 20), 5) for step in range(20)]
    assert passes.training[:2] == [1, 1] and max(passes.training[:10]) < 6 == max(passes.training)


def test_empty_dataset(tmp_path):
    trainer = Trainer(build(), arguments(tmp_path, max_steps=-1, num_train_epochs=1), train_dataset=dataset(0))
    with pytest.raises(ValueError, match="(?i)num_samples|empty|no "):
        trainer.train()


def test_label_smoothing_shifts_the_labels(tmp_path):
    trainer = Trainer(build(), arguments(tmp_path, label_smoothing_factor=1e-9))
    batch = {"input_ids": tokens(), "labels": tokens()}
    smoothed = trainer.compute_loss(trainer.model, dict(batch))
    assert_close(smoothed, trainer.model(**batch).loss)


def test_label_smoothing_that_skips_passes_is_told(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(modeling_feedback_heads.logger, "warning_once", said.append)
    for fields in ({}, {"supervision": "all"}, {"halting": "learned"}):
        trainer = Trainer(build(**fields).train(), arguments(tmp_path, label_smoothing_factor=0.1))
        trainer.compute_loss(trainer.model, {"input_ids": tokens(), "labels": tokens()})
        assert bool(said) == bool(fields)
    assert all("neither halting nor earlier passes" in sentence for sentence in said)


def test_noise_on_embeddings_and_output_feedback(tmp_path):
    """NEFTune's, which expects embeddings of texts, where the prediction is fed back through the same table."""
    model = build(feedback_signal="output", feedback_axis="time").train()
    trainer = Trainer(model, arguments(tmp_path, max_steps=2, neftune_noise_alpha=5), train_dataset=dataset())
    trainer.train()
    assert len(losses(trainer)) == 2
