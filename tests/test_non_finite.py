"""StopOnNonFinite: training that has broken stops, and keeps what is good."""

import math

import pytest
import torch
from conftest import arguments, build, dataset, losses, tokens
from transformers import Trainer, TrainerCallback

from feedback_transformers.training import StopOnNonFinite


class Poison(TrainerCallback):
    """Breaks a weight before a given step."""

    def __init__(self, step: int, value: float, name: str = "model.norm.weight") -> None:
        self.step, self.value, self.name = step, value, name

    def on_step_begin(self, args, state, control, model, **kwargs) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model.get_parameter(self.name).view(-1)[0] = self.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embeddings.embed_tokens.weight"])
def test_stop_on_non_finite(value, name, tmp_path):
    """Names the step, and keeps the last checkpoint, which is good."""
    trainer = Trainer(
        build(),
        arguments(tmp_path, save_steps=2, max_steps=20),
        train_dataset=dataset(),
        callbacks=[Poison(5, value, name), StopOnNonFinite()],
    )
    with pytest.raises(FloatingPointError, match=r"at step 5; the last good checkpoint is .*checkpoint-4\."):
        trainer.train()
    assert trainer.state.global_step == 5
    kept = type(trainer.model).from_pretrained(tmp_path / "checkpoint-4")
    assert all(parameter.isfinite().all() for parameter in kept.parameters())
    batch = tokens(4, 16)
    assert kept(batch, labels=batch).loss.isfinite()


def test_stop_before_the_first_checkpoint_says_so(tmp_path):
    trainer = Trainer(
        build(),
        arguments(tmp_path / "new"),
        train_dataset=dataset(),
        callbacks=[Poison(0, math.nan), StopOnNonFinite()],
    )
    with pytest.raises(FloatingPointError, match="at step 0; no checkpoint had been saved"):
        trainer.train()


def test_stop_on_a_gradient_alone(tmp_path):
    """A finite loss with a gradient that is not."""

    class BreakGradient(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                model.model.norm.weight.register_hook(lambda grad: grad * math.nan)

    trainer = Trainer(
        build(), arguments(tmp_path), train_dataset=dataset(), callbacks=[BreakGradient(), StopOnNonFinite()]
    )
    with pytest.raises(FloatingPointError, match=r"The gradient of model\.\S+ is not finite at step 2"):
        trainer.train()


def test_finite_training_is_left_alone(tmp_path):
    plain = Trainer(build(), arguments(tmp_path / "plain"), train_dataset=dataset())
    watched = Trainer(build(), arguments(tmp_path / "watched"), train_dataset=dataset(), callbacks=[StopOnNonFinite()])
    plain.train()
    watched.train()
    assert losses(watched) == losses(plain)
    assert not watched.model._forward_hooks
