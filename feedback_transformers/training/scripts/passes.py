"""Train with drawn numbers of passes, and measure the trained model at each of them.

A pass is a feedback step over all positions. K is the number of passes in the config.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import Trainer, TrainerCallback

from ..callbacks import SampleFeedbackSteps, own_steps, trained_with, with_steps
from .arguments import ModelArguments


def steps_to_draw(model_args: ModelArguments, model: nn.Module) -> tuple[int, int] | None:
    """Return the range of passes to train with, [minimum, maximum]; None where there is nothing to draw.

    Without flags it is the range that the config names in `trained_feedback_steps`, where that holds K; otherwise it
    is 1 to 2 K, whose mean costs about as much as K. A model with learned halting makes its K passes.

    Raises:
        ValueError: the flags name no range, or the model makes no passes.
    """
    least, most = model_args.min_feedback_steps, model_args.max_feedback_steps
    steps, config = own_steps(model), model.config
    if steps is None:
        if (least, most) != (None, None):
            raise ValueError(
                "This model makes no passes whose number could be drawn: leave out --min_feedback_steps and "
                "--max_feedback_steps, or choose feedback_axis='depth' or solver='jacobi'."
            )
        return None
    if (least, most) == (None, None):
        known = getattr(config, "trained_feedback_steps", None)  # the code of an older checkpoint lacks it
        if known and known[0] <= steps <= known[1]:
            return known[0], known[1]
        if config.halting in ("learned", "act"):
            return steps, steps
    least = 1 if least is None else least
    most = max(least, 2 * steps) if most is None else most
    if not 1 <= least <= most:
        raise ValueError(
            f"--min_feedback_steps is {least} and --max_feedback_steps is {most}: the first must be at least 1, and "
            "no more than the second."
        )
    return least, most


def drawn_passes(model_args: ModelArguments, model: nn.Module, do_train: bool = True) -> list[TrainerCallback]:
    """Return the callback that draws the number of passes, as a list for Trainer; an empty one where none are drawn.

    Prints the range and writes it to the config.
    """
    drawn = steps_to_draw(model_args, model)
    if do_train:
        trained_with(model, drawn)
    if drawn is None or not do_train:
        return []
    print(f"Each training step makes {drawn[0]} to {drawn[1]} passes (--min_feedback_steps, --max_feedback_steps)")
    return [SampleFeedbackSteps(*drawn)]


def measure_passes(trainer: Trainer, name: str, measure: Callable[[], float]) -> dict[str, float]:
    """Return `measure()` at 1 to 2 K passes as {name}_step_1, {name}_step_2, ..., and print them as a table.

    The dictionary is empty where the model makes no passes.

    Args:
        name: the metric, with its split in front, such as test_accuracy.
        measure: evaluates `trainer.model` with the number of passes that its config names.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    steps, found = own_steps(model), dict[str, float]()
    if steps is None:
        return found
    for number in range(1, 2 * steps + 1):
        with with_steps(model, number):
            found[f"{name}_step_{number}"] = measure()
    if trainer.is_world_process_zero():
        print_passes(name, list(found.values()), steps)
    return found


def print_passes(name: str, values: list[float], own: int) -> None:
    """Print a metric by the number of passes; `own` is the number in the config."""
    print(f"\n{'passes':>8}  {name}")
    for number, value in enumerate(values, start=1):
        print(f"{number:>8}  {value:.4f}" + ("  (the number in the config)" if number == own else ""))
    print()
