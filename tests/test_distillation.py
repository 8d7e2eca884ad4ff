"""Distill: a retrofit that is trained, and keeps to its original."""

import pytest
import torch
from conftest import SIZES, arguments, assert_close, dataset, losses, tokens
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from feedback_transformers import retrofit
from feedback_transformers.training import Distill, SampleFeedbackSteps, StopOnNonFinite, divergence


def student_and_teacher(trained: bool = False):
    """A retrofit with LoRA, and its original, which shares its weights."""
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in SIZES if name != "num_feedback_steps"}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3))
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["connection"])
    model = get_peft_model(retrofit(teacher, 1, 1), lora)
    if trained:
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
    return model, teacher


def padded_rows(number: int = 16) -> Dataset:
    """Rows with unequal numbers of labels, some of them prompts, and some padded."""
    rows = dataset(number).to_list()
    for i, row in enumerate(rows):
        row["labels"] = [-100] * (i % 5) + row["labels"][i % 5 :]
        row["attention_mask"] = [1] * (16 - i % 7) + [0] * (i % 7)
        row["labels"][16 - i % 7 :] = [-100] * (i % 7)
    return Dataset.from_list(rows)


def test_divergence():
    """Against the definition, token by token."""
    batch = padded_rows(4).with_format("torch")[:]
    logits, teacher = torch.randn(2, 4, 16, 50)
    p, q = teacher.softmax(-1), logits.softmax(-1)
    tokens_of_it = [
        (p[row, t] * (p[row, t] / q[row, t]).log()).sum()
        for row in range(4)
        for t in range(15)
        if batch["labels"][row, t + 1] != -100
    ]
    total = torch.stack(tokens_of_it).sum()
    assert_close(divergence(logits, teacher, batch["labels"]), total / len(tokens_of_it))
    assert_close(divergence(logits, teacher, batch["labels"], num_items_in_batch=200), total / 200)
    every = divergence(logits, teacher, batch["input_ids"], batch["attention_mask"])
    poisoned = torch.where(batch["attention_mask"][:, 1:, None].bool(), logits[:, :-1], 99.0)
    poisoned = torch.cat([poisoned, logits[:, -1:]], dim=1)
    assert_close(divergence(poisoned, teacher, batch["input_ids"], batch["attention_mask"]), every)
    behind = batch["attention_mask"].clone()
    behind[:, :3] = 0  # padding on the left, and the first token behind it, are left out
    assert_close(
        divergence(logits, teacher, batch["input_ids"], behind),
        divergence(logits[:, 3:], teacher[:, 3:], batch["input_ids"][:, 3:], behind[:, 3:]),
    )
    nothing = torch.full_like(batch["labels"], -100)
    assert divergence(logits, teacher, nothing) == 0


def test_a_retrofit_is_born_where_its_teacher_is():
    model, teacher = student_and_teacher()
    batch = tokens(2, 16)
    logits = model(batch).logits
    logits.retain_grad()
    loss = divergence(logits, teacher(batch).logits.detach(), batch)
    loss.backward()
    assert loss.abs() < 1e-6 and logits.grad.abs().max() < 1e-6
    assert all(p.grad.abs().max() < 1e-5 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_distillation_is_added_to_the_loss(weight, tmp_path):
    """In training and not in evaluation, in the mean over an accumulated batch, and leaves the teacher as it was."""
    weights, logged = [], []
    for batch, accumulate in ((8, 1), (2, 4)):
        model, teacher = student_and_teacher(trained=True)
        first = {name: value.clone() for name, value in teacher.state_dict().items()}
        rows = padded_rows()[:8]
        given = {name: torch.tensor(rows[name]) for name in rows}
        plain, logits = (model(**given)[name].detach() for name in ("loss", "logits"))
        added = divergence(logits, teacher(given["input_ids"], given["attention_mask"]).logits, given["labels"])
        trainer = Trainer(
            model,
            arguments(
                tmp_path / str(batch),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulate,
                max_steps=2,
                optim="sgd",
                learning_rate=0.1,
                train_sampling_strategy="sequential",
            ),
            train_dataset=padded_rows(),
            eval_dataset=padded_rows(8),
            callbacks=[Distill(teacher.train(), weight), StopOnNonFinite()],
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.item(), abs=1e-5)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx((plain + weight * added).item(), abs=1e-4)
        assert not teacher.training and all(p.grad is None for p in teacher.parameters())
        assert all(torch.equal(value, first[name]) for name, value in teacher.state_dict().items())
        assert not model._forward_hooks
        weights.append([p for p in model.parameters() if p.requires_grad])
        logged.append(losses(trainer))
    assert added > 0.01 and logged[0] == pytest.approx(logged[1], abs=1e-4)
    for big, small in zip(*weights, strict=True):
        assert_close(small, big, 1e-5)


def test_distillation_keeps_the_model_near_its_teacher(tmp_path):
    apart = []
    for weight in (0.0, 10.0):
        model, teacher = student_and_teacher()
        callbacks = [SampleFeedbackSteps(1, 4), Distill(teacher, weight)]
        Trainer(model, arguments(tmp_path, max_steps=10), train_dataset=dataset(), callbacks=callbacks).train()
        batch = tokens(4, 16)
        with torch.no_grad():
            apart.append(divergence(model.eval()(batch).logits, teacher(batch).logits, batch).item())
    assert apart[1] < apart[0] / 4


def test_distillation_in_bf16_with_activation_checkpointing(tmp_path):
    model, teacher = student_and_teacher()
    fields = {"activation_checkpointing": True, "bf16": True}
    callbacks = [Distill(teacher), StopOnNonFinite()]
    trainer = Trainer(model, arguments(tmp_path, **fields), train_dataset=dataset(), callbacks=callbacks)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_distillation_refuses_what_it_cannot_do(tmp_path):
    model, teacher = student_and_teacher()
    trainer = Trainer(model.unload(), arguments(tmp_path), train_dataset=dataset(), callbacks=[Distill(teacher)])
    trainer.model.requires_grad_(True)
    with pytest.raises(ValueError, match="weights that its teacher shares"):
        trainer.train()
    model, teacher = student_and_teacher()
    fields = {"label_smoothing_factor": 0.1}
    trainer = Trainer(model, arguments(tmp_path, **fields), train_dataset=dataset(), callbacks=[Distill(teacher)])
    with pytest.raises(ValueError, match="give labels, without smoothing"):
        trainer.train()
