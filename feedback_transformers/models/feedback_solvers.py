"""SOLVERS: in which order the steps of a loop are made.

Shapes: B batch, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .configuration_feedback import FeedbackConfig
from .feedback_cache import Context, FeedbackCache
from .feedback_cells import State
from .feedback_gradients import DeferredWeightGradients
from .feedback_halting import Progress
from .feedback_states import FeedbackState
from .feedback_sweep import sweep


class Readout(NamedTuple):
    """Functions of the decoder and the head that the loop may call."""

    decode: Callable[[Tensor, Context], Tensor]  # h [B, T, D] -> y [B, T, D]
    embed: Callable[[Tensor], Tensor]  # y -> its prediction, embedded again, [B, T, D]
    predict: Callable[[Tensor], Tensor]  # y -> its logits [B, T, V]


@dataclass
class Pass:
    """Results of one pass, which the next one reads."""

    h: Tensor  # [B, T, D]
    state: State  # state of the cell, on the depth axis
    y: Any = None  # [B, T, D], if something reads it
    signal: Tensor | None = None  # [B, T, D] φ at the positions that made it
    shifted: Tensor | None = None  # [B, T, D] S·φ at the positions that read it


class LoopOutput(NamedTuple):
    """Results of the loop."""

    states: list[Tensor]  # h [B, T, D] of every pass if asked for, else of the last one only
    outputs: list[Tensor]  # y [B, T, D], likewise
    num_steps: Tensor | None = None  # [B, T] passes of each position, if it may stop before the last
    probabilities: list[Tensor] | None = None  # of stopping at each pass, [B, T], in training with learned halting
    halting_loss: Tensor | None = None  # [B, T] added loss of each position
    state: FeedbackState | None = None  # of the last pass
    halting_logits: tuple[Tensor, ...] | None = None  # [B, 2] of each answer


class Solver:
    """Base of solvers: `solve` runs a FeedbackLoop on a call. What a solver can do is told by its attributes."""

    makes_passes = False  # over all positions; else it goes position by position
    needs_cache = False  # even where the caller has none

    def __init__(self, loop: Any) -> None:
        """Serve one call of a loop."""
        self.loop = loop
        self.stops: bool = loop.stops
        self.reads_prediction = self.stops and bool(loop.halting.reads_prediction)

    def solve(
        self,
        e: Tensor,
        context: Context,
        readout: Readout,
        passes: int,
        every_step: bool,
        start: FeedbackState | None,
    ) -> LoopOutput:
        """Return the results of the loop on e [B, T, D].

        Args:
            passes: how many to make at most.
            every_step: whether the results of every pass are asked for.
            start: the state to begin with.
        """
        raise NotImplementedError


class Positions(Solver):
    """Run position by position, or chunk by chunk of `feedback_interval`: exact, and as decoding does it."""

    def solve(
        self,
        e: Tensor,
        context: Context,
        readout: Readout,
        passes: int,
        every_step: bool,
        start: FeedbackState | None,
    ) -> LoopOutput:
        loop, config, given = self.loop, self.loop.config, context
        if context.cache is None:  # for this call only
            context = replace(context, cache=FeedbackCache())
        # Deferring keeps the inputs of all steps, which checkpointing is there to avoid.
        defers = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not loop.checkpoints
        truncate = config.gradient_steps if torch.is_grad_enabled() else None
        with DeferredWeightGradients() if defers else nullcontext():
            h, y, held = sweep(loop, e, None, context, readout, 0, config.feedback_interval, "last", truncate)
        if config.feedback_signal != "none":
            context.for_part("signal", 0).keep((held,))
        y = readout.decode(h, given.for_part("decoder", "last")) if y is None else y
        made = context.iterations
        return LoopOutput([h], [y], torch.full_like(context.position_ids, max(made)) if made else None)


class Passes(Solver):
    """Run all positions at once, several times: exact in depth; along time the iteration of Jacobi."""

    makes_passes = True

    def solve(
        self,
        e: Tensor,
        context: Context,
        readout: Readout,
        passes: int,
        every_step: bool,
        start: FeedbackState | None,
    ) -> LoopOutput:
        loop, config, given, context = self.loop, self.loop.config, context, self.context(context)
        halting, progress, tolerance = loop.halting, None, config.solver_tolerance
        if halting is not None:
            progress = Progress.start(e, context.mask)
            every_step = every_step or (loop.training and halting.weighs_passes)
        grad, first = torch.is_grad_enabled(), max(0, passes - (config.gradient_steps or passes))
        resume = first if grad and first else passes  # a truncated gradient needs its passes after convergence too
        watched = every_step or progress is not None or tolerance is not None
        segment = 1 if watched or not grad else self.segment(passes - first)
        made: list[Pass] = []
        now, steps, done = loop.begin(e, context, readout, start), 0, False
        for number, stop in spans_of_passes(passes, first, segment):
            before = now
            if done and number < resume:
                self.skip(before, context, number, stop)
                continue
            here = replace(context, running=progress.running) if self.stops and before is not None else context
            with torch.set_grad_enabled(grad and number >= first):
                run = self.one_pass if stop - number == 1 else self.several
                now = run(e, before, here, readout, number, stop, passes, every_step)
                if progress is not None:
                    progress.num_steps = progress.num_steps + progress.running
                    logits = readout.predict(now.y) if self.reads_prediction else None
                    halting(progress, now.h, None if before is None else before.h, logits, stop == passes)
            made = [*made, now] if every_step else [now]
            steps += 1
            done = self.stops and not progress.running.any()
            done = done or (tolerance is not None and self.converged(before, now, context, tolerance))
        return self.results(made, given, readout, progress, steps)

    def context(self, context: Context) -> Context:
        """Return the context with what the passes of this call need beside what the caller gave."""
        loop, config = self.loop, self.loop.config
        if torch.is_grad_enabled():  # keys of the source from a pass without gradient would lose theirs
            context = replace(context, cross_attention=None)
        if self.stops and loop.checkpoints:
            raise ValueError("halting='act' can't be trained with gradient checkpointing: disable one of them.")
        remembers = config.feedback_connection == "memory" and config.feedback_signal != "none"
        if context.cache is None and (self.needs_cache or remembers or (self.stops and config.is_causal)):
            context = replace(context, cache=FeedbackCache())  # for this call only
        return context

    def results(
        self, made: list[Pass], context: Context, readout: Readout, progress: Progress | None, steps: int
    ) -> LoopOutput:
        """Return the results of the passes that were made, `steps` in number."""
        h = made[-1].h if progress is None or progress.mean is None else progress.mean
        y = readout.decode(h, context.for_part("decoder", "last"))
        states, outputs = [*(p.h for p in made[:-1]), h], [*(p.y for p in made[:-1]), y]
        last = FeedbackState(made[-1].h, y, made[-1].state)
        if progress is None:
            fixed = self.loop.config.solver_tolerance is None
            num_steps = None if fixed else torch.full_like(context.position_ids, steps)
            return LoopOutput(states, outputs, num_steps, state=last)
        loss, answers = self.loop.halting.loss(progress), tuple(progress.logits) or None
        return LoopOutput(states, outputs, progress.num_steps, progress.probabilities or None, loss, last, answers)

    def segment(self, passes: int) -> int:
        """Return how many passes with a gradient are checkpointed as one segment: √K of K passes, 1 of few.

        About 2√K inputs of passes are then kept instead of K.
        """
        loop, config = self.loop, self.loop.config
        by_step = config.feedback_signal == "output" or config.feedback_connection == "memory"
        return isqrt(passes) if loop.checkpoints and not by_step and passes >= 16 else 1

    def several(
        self,
        e: Tensor,
        before: Pass | None,
        context: Context,
        readout: Readout,
        start: int,
        stop: int,
        passes: int,
        wanted: bool,
    ) -> Pass:
        """Run the passes from `start` to `stop` out of `passes` as one checkpoint, and return the last one."""

        def segment(before: Pass | None) -> Pass:
            for number in range(start, stop):
                before = self.one_pass(e, before, context, readout, number, number + 1, passes, wanted)
            return cast(Pass, before)

        return self.loop.checkpoint(segment, context, before)

    def one_pass(
        self,
        e: Tensor,
        before: Pass | None,
        context: Context,
        readout: Readout,
        number: int,
        stop: int,
        passes: int,
        wanted: bool,
    ) -> Pass:
        """Run the pass after `before`, the last one if `stop` is `passes`; `wanted` asks for its y."""
        loop, config, last = self.loop, self.loop.config, stop == passes
        h, state, y = self.positions(e, before, context, readout, number)
        if context.running is not None and before is not None:
            h = torch.where(context.running[..., None], h, before.h)
        asked = wanted or config.feedback_signal == "output"
        if y is None and (self.reads_prediction or (not last and asked)):
            y = readout.decode(h, context.for_part("decoder", number))
        now = Pass(h, state, y)
        if config.feedback_signal != "none" and (not last or self.needs_cache):  # else nothing reads its signal
            signal = readout.embed(y) if config.feedback_signal == "output" and y is not None else h
            loop.feed(now, signal, context.for_part("signal", number))
        return now

    def positions(
        self, e: Tensor, before: Pass | None, context: Context, readout: Readout, number: int
    ) -> tuple[Tensor, State, Tensor | None]:
        """Return h of all positions after one more pass, the state beside it, and y where it was made on the way."""
        loop = self.loop
        shifted, state = (None, None) if before is None else (before.shifted, before.state)
        step = partial(loop.checkpoint, loop.step, context) if loop.gradient_checkpointing else loop.step
        return *step(e, shifted, state, context, number), None

    def converged(self, before: Pass | None, now: Pass, context: Context, tolerance: float) -> bool:
        """Return whether the last pass changed no signal by more than the tolerance."""
        if self.loop.config.feedback_axis == "depth" or now.signal is None:
            return False
        if before is None or before.signal is None:
            return False
        change, size = (now.signal - before.signal).detach().abs(), now.signal.detach().abs()
        if context.mask is not None:
            change, size = change * context.mask[..., None], size * context.mask[..., None]
        return bool(change.max() <= tolerance * size.max())

    def skip(self, now: Pass | None, context: Context, start: int, stop: int) -> None:
        """Write to the cache what the passes from `start` to `stop` would, which change nothing any more."""
        if context.cache is None or now is None:
            return
        for number in range(start, stop):
            for part in ("cell", "decoder"):
                context.cache.repeat_pass(
                    context.for_part(part, number - 1).slot, context.for_part(part, number).slot, context.offset
                )
            if self.loop.config.feedback_axis == "time" and now.signal is not None:
                self.loop.previous(now.signal, context.for_part("signal", number))


class GaussSeidel(Passes):
    """Make each pass over blocks of `solver_block_size` positions in turn, which read the blocks before them."""

    needs_cache = True

    def segment(self, passes: int) -> int:
        return 1  # a sweep has checkpoints of its own

    def positions(
        self, e: Tensor, before: Pass | None, context: Context, readout: Readout, number: int
    ) -> tuple[Tensor, State, Tensor | None]:
        shifted, state = (None, None) if before is None else (before.shifted, before.state)
        block = self.loop.config.solver_block_size
        h, y, _ = sweep(self.loop, e, shifted, context, readout, number, block, number)
        return h, state, y


def spans_of_passes(passes: int, first: int, segment: int) -> list[tuple[int, int]]:
    """Split the passes: one by one up to `first`, from where gradients are taken, then in segments."""
    starts = [*range(min(first, passes)), *range(first, passes, segment)]
    return list(zip(starts, [*starts[1:], passes], strict=True))


# "newton" is the positions' own solution within a recurrent cell, see feedback_newton.py.
SOLVERS: dict[str, type[Solver]] = {
    "sequential": Positions,
    "jacobi": Passes,
    "gauss_seidel": GaussSeidel,
    "newton": Positions,
}


def solver_of(config: FeedbackConfig) -> type[Solver]:
    """Return the class of the config's solver; in depth there is one order, pass by pass."""
    return Passes if config.feedback_axis == "depth" else SOLVERS[config.solver]
