"""The feedback loop: h_t = f(c(e_t, φ(y_{t-1})), h_{t-1}), y_t = g(h_t).

"t" is a position (axis `time`) or a pass over all positions (axis `depth`). Both solve h = F(e, S·h), where S shifts
by one position (time) or by none (depth). The solver says how the solution is reached.

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
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_feedback import FeedbackConfig
from .feedback_cache import Context, FeedbackCache
from .feedback_cells import State
from .feedback_connections import CONNECTIONS
from .feedback_gradients import DeferredWeightGradients
from .feedback_halting import Progress, halting_rule
from .feedback_layers import CrossAttention, dropout, make_norm
from .feedback_names import RECURRENT_TYPES
from .feedback_padding import fixed_length
from .feedback_recursions import RECURSIONS
from .feedback_states import INITIAL_STATES, FeedbackState

logger = logging.get_logger(__name__)


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


def keep_hooks(module: nn.Module, function: Callable) -> Callable:
    """Return `function`, which finds the forward hooks of now within `module` whenever it is called.

    PEFT's activated LoRA hangs hooks on layers for one forward, and a checkpoint calls the function once more later.
    """
    hung = [
        (part, hook, number in part._forward_pre_hooks_with_kwargs)
        for part in module.modules()
        for number, hook in part._forward_pre_hooks.items()
    ]

    def hooked(*args: object) -> Any:
        handles = [
            part.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
            for part, hook, with_kwargs in hung
            if hook not in part._forward_pre_hooks.values()
        ]
        try:
            return function(*args)
        finally:
            for handle in handles:
                handle.remove()

    return hooked


class FeedbackLoop(nn.Module):
    """Connection and cell, and the loop over passes or positions that runs them."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.config = config
        self.connection = CONNECTIONS[config.feedback_connection](config)
        self.recursion = RECURSIONS[config.feedback_recursion]
        self.cell = self.recursion.cell(config)
        state = INITIAL_STATES[config.initial_state]
        self.initial_state = None if state is None else state(config)
        ends = config.output_norm == "pass" and config.feedback_recursion != "hierarchical"  # which norms both latents
        self.norm = make_norm(config) if ends else None
        self.cross_attention = CrossAttention(config) if config.is_encoder_decoder else None
        rule = halting_rule(config)
        self.halting: Any = None if rule is type(None) else rule(config)
        self.gradient_checkpointing = False
        self.num_steps: int | None = None  # in training, set by training.SampleFeedbackSteps

    def forward(
        self,
        e: Tensor,
        context: Context,
        readout: Readout,
        num_steps: int | None = None,
        every_step: bool = False,
        start: FeedbackState | None = None,
    ) -> LoopOutput:
        """Run the loop on e [B, T, D].

        `num_steps` replaces the passes of the config; `every_step` asks for the results of every pass; `start` is the
        state to begin with. Raises ValueError if config.halting was changed after the model was made.
        """
        passes = self.num_passes(num_steps)
        self.check_trained(passes)
        self.check_opens()
        asked = self.config.halting
        if (self.halting is not None or asked != "fixed") and type(self.halting) is not halting_rule(self.config):
            raise ValueError(
                f"config.halting is {self.config.halting!r}, for which this model was not made: give it to "
                "from_pretrained, or to the config before the model is made."
            )
        if passes is None:
            made = self.over_positions(e, context, readout)
        else:
            made = self.over_passes(e, context, readout, passes, every_step, start)
        if self.training:
            made.outputs[-1] = self.keep_in_graph(made.outputs[-1])
        return made

    def num_passes(self, num_steps: int | None = None) -> int | None:
        """Return how many passes a call makes at most; None where it goes position by position.

        Raises ValueError for numbers below 1, and for a number of passes where none are made.
        """
        config = self.config
        if num_steps is None and self.training:
            num_steps = self.num_steps
        asked = config.num_feedback_steps if num_steps is None else num_steps
        for name, steps in (("num_feedback_steps", asked), ("solver_steps", config.solver_steps)):
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(f"{name} is {steps!r}; it must be a whole number of at least 1.")
        if config.feedback_signal == "none" and config.feedback_type not in RECURRENT_TYPES:
            return 1  # nothing is fed back, so all passes would be the same
        if config.feedback_axis == "depth":
            return num_steps or config.num_feedback_steps
        if config.in_passes and config.feedback_signal != "none":
            return num_steps or config.solver_steps
        if num_steps is not None and config.feedback_signal != "none":
            raise ValueError(
                "num_feedback_steps has no meaning position by position: leave it out, or set config.solver='jacobi'."
            )
        return None

    def check_trained(self, passes: int | None) -> None:
        """Warn where an evaluation makes a number of passes that the model was not trained with."""
        trained = self.config.trained_feedback_steps
        if passes is None or trained is None or self.training or torch.compiler.is_compiling():
            return
        if not trained[0] <= passes <= trained[1]:
            logger.warning_once(
                "This model makes a number of passes that it was not trained with, so its predictions may be worse: "
                "choose num_feedback_steps within config.trained_feedback_steps."
            )

    def check_opens(self) -> None:
        """Warn where training leaves a closed connection closed, as adapters beside it do."""
        if not self.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if self.config.feedback_signal == "none" or not hasattr(self.connection, "is_closed"):
            return  # a registered connection has no closed form
        learns = any(parameter.requires_grad for parameter in self.connection.parameters())
        if not learns and self.connection.is_closed():
            logger.warning_once(
                "The feedback of this model is closed and stays so, as training leaves its connection alone: train "
                "the connection too, with PEFT by modules_to_save=['connection']."
            )

    # The equation

    def connect(self, e: Tensor, signal: Tensor | None, context: Context) -> Tensor:
        """Return c(e, φ), plus what cross-attention reads of the source; without a past, φ is zero."""
        if self.config.feedback_signal == "none":
            signal = e
        elif signal is None:
            signal = torch.zeros_like(e)
        if self.training and self.config.feedback_noise and self.config.feedback_signal != "none":
            signal = signal + self.config.feedback_noise * torch.randn_like(signal)
        x = self.connection(e, signal)
        if self.training:
            x = dropout(x, self.config.dropout)
        return x if self.cross_attention is None else self.cross_attention(x, context)

    def step(
        self, e: Tensor, signal: Tensor | None, state: State, context: Context, number: int
    ) -> tuple[Tensor, State]:
        """Return f(c(e, φ), h') at all given positions, [B, T, D], and the new state."""
        here = context.for_part("cell", number)
        if self.config.feedback_axis == "time":
            h, state = self.cell(self.connect(e, signal, context), here), None
            return h if self.norm is None else self.norm(h), state

        connect = partial(self.connect, e, context=context)
        h, state = self.recursion.step(self.cell, self.config, connect, signal, state, here)
        return h if self.norm is None else self.norm(h), state

    def initial(self, e: Tensor, context: Context) -> FeedbackState:
        """Return the state before the first pass over e."""
        h = torch.zeros_like(e) if self.initial_state is None else self.initial_state(e, context)
        return FeedbackState(h, None, self.recursion.first(self.cell, e, self.initial_state, context))

    def begin(self, e: Tensor, context: Context, readout: Readout, start: FeedbackState | None) -> Pass | None:
        """Return what the first pass reads in place of a pass before it; None for zeros."""
        if start is None:
            if self.initial_state is None or self.config.feedback_signal != "state":
                return None
            start = self.initial(e, context)
        h, y, cell = start
        cell = self.recursion.first(self.cell, e, self.initial_state, context) if cell is None else cell
        begun = Pass(h, cell, y)
        if self.config.feedback_signal == "output" and y is not None:
            self.feed(begun, readout.embed(y), context.for_part("signal", -1))
        elif self.config.feedback_signal != "none":
            self.feed(begun, h, context.for_part("signal", -1))
        return begun

    def feed(self, made: Pass, signal: Tensor, context: Context) -> None:
        """Note the signal that the next pass reads."""
        made.signal = signal
        made.shifted = self.previous(signal, context) if self.config.feedback_axis == "time" else signal

    # Depth, and time in parallel

    def over_passes(
        self,
        e: Tensor,
        context: Context,
        readout: Readout,
        passes: int,
        every_step: bool,
        start: FeedbackState | None,
    ) -> LoopOutput:
        """Run all positions at most `passes` times: exact in depth, along time an iteration of the solver."""
        config, grad, given = self.config, torch.is_grad_enabled(), context
        if grad:  # keys of the source from a pass without gradient would lose theirs
            context = replace(context, cross_attention=None)
        stops, reads_prediction = self.stops, self.stops and self.halting.reads_prediction
        if stops and self.checkpoints:
            raise ValueError("halting='act' can't be trained with gradient checkpointing: disable one of them.")
        remembers = config.feedback_connection == "memory" and config.feedback_signal != "none"
        if context.cache is None and (config.solver == "gauss_seidel" or remembers or (stops and config.is_causal)):
            context = replace(context, cache=FeedbackCache())  # for this call only
        progress = None if self.halting is None else Progress.start(e, context.mask)
        every_step = every_step or (self.training and self.halting is not None and self.halting.weighs_passes)
        first = max(0, passes - (config.gradient_steps or passes))
        resume = first if grad and first else passes  # a truncated gradient needs its passes after convergence too
        watched = every_step or progress is not None or config.solver_tolerance is not None
        segment = 1 if watched or not grad else self.segment(passes - first)
        begun = self.begin(e, context, readout, start)
        made: list[Pass] = []
        number, steps = 0, 0
        while number < passes:
            before = made[-1] if made else begun
            stop = min(number + (segment if number >= first else 1), passes)
            here = replace(context, running=progress.running) if stops and before is not None else context
            with torch.set_grad_enabled(grad and number >= first):
                run = self.one_pass if stop - number == 1 else self.run_segment
                now = run(e, before, here, readout, number, stop, passes, every_step)
                if progress is not None:
                    progress.num_steps = progress.num_steps + progress.running
                    logits = readout.predict(now.y) if reads_prediction else None
                    self.halting(progress, now.h, None if before is None else before.h, logits, stop == passes)
            made = [*made, now] if every_step else [now]
            number, steps = stop, steps + 1
            done = stops and not progress.running.any()
            if config.solver_tolerance is not None:
                done = done or self.converged(before, now, context)
            if done and number < resume:
                self.skip(now, context, number, resume)
                number = resume
        h = made[-1].h if progress is None or progress.mean is None else progress.mean
        y = readout.decode(h, given.for_part("decoder", "last"))
        states, outputs = [*(p.h for p in made[:-1]), h], [*(p.y for p in made[:-1]), y]
        last = FeedbackState(made[-1].h, y, made[-1].state)
        if progress is None:
            fixed = config.solver_tolerance is None
            made_steps = None if fixed else torch.full_like(context.position_ids, steps)
            return LoopOutput(states, outputs, made_steps, state=last)
        loss, answers = self.halting.loss(progress), tuple(progress.logits) or None
        return LoopOutput(states, outputs, progress.num_steps, progress.probabilities or None, loss, last, answers)

    def keep_in_graph(self, y: Tensor) -> Tensor:
        """Return y with a zero gradient for weights that only later steps read: DDP waits for that of each weight."""
        parts = [] if self.halting is None else [*self.halting.parameters()]
        weights = [*parts, getattr(self.cell, "layer_weights", None)]
        return y + sum(0.0 * p.sum() for p in weights if p is not None and p.requires_grad)

    @property
    def stops(self) -> bool:
        """Whether positions may stop before the last pass of this call."""
        halting = self.halting
        return halting is not None and halting.freezes and bool(halting.in_training or not self.training)

    def segment(self, passes: int) -> int:
        """Return how many passes with a gradient are checkpointed as one segment: √K of K passes, 1 of few.

        About 2√K inputs of passes are then kept instead of K.
        """
        config = self.config
        by_step = config.feedback_signal == "output" or config.solver == "gauss_seidel"
        by_step = by_step or config.feedback_connection == "memory"
        return isqrt(passes) if self.checkpoints and not by_step and passes >= 16 else 1

    def run_segment(
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

        return self.checkpoint(segment, context, before)

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
        last = stop == passes
        config, by_output = self.config, self.config.feedback_signal == "output"
        shifted, state = (None, None) if before is None else (before.shifted, before.state)
        in_blocks, y = config.solver == "gauss_seidel", None
        if in_blocks:
            h, y, _ = self.sweep(e, shifted, context, readout, number, config.solver_block_size)
        else:
            step = partial(self.checkpoint, self.step, context) if self.gradient_checkpointing else self.step
            h, state = step(e, shifted, state, context, number)
        if context.running is not None and before is not None:
            h = torch.where(context.running[..., None], h, before.h)
        reads_prediction = self.halting is not None and self.stops and self.halting.reads_prediction
        if y is None and (reads_prediction or (not last and (wanted or by_output))):
            y = readout.decode(h, context.for_part("decoder", number))
        now = Pass(h, state, y)
        if config.feedback_signal == "none" or (last and not in_blocks):
            return now  # nothing reads its signal
        signal = readout.embed(y) if by_output and y is not None else h
        self.feed(now, signal, context.for_part("signal", number))
        return now

    def converged(self, before: Pass | None, now: Pass, context: Context) -> bool:
        """Return whether the last pass changed no signal by more than the tolerance."""
        tolerance = self.config.solver_tolerance
        if self.config.feedback_axis == "depth" or now.signal is None:
            return False
        if before is None or before.signal is None:
            return False
        change, size = (now.signal - before.signal).detach().abs(), now.signal.detach().abs()
        if context.mask is not None:
            change, size = change * context.mask[..., None], size * context.mask[..., None]
        return bool(change.max() <= tolerance * size.max())

    def skip(self, now: Pass, context: Context, start: int, stop: int) -> None:
        """Write to the cache what the passes from `start` to `stop` would, which change nothing any more."""
        if context.cache is None:
            return
        for number in range(start, stop):
            for part in ("cell", "decoder"):
                context.cache.repeat_pass(
                    context.for_part(part, number - 1).slot, context.for_part(part, number).slot, context.offset
                )
            if self.config.feedback_axis == "time" and now.signal is not None:
                self.previous(now.signal, context.for_part("signal", number))

    @property
    def checkpoints(self) -> bool:
        """Whether steps are recomputed in the backward of this call."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def checkpoint(self, function: Callable, context: Context, *args: object) -> Any:
        """Run function(*args); with checkpointing recompute it in the backward, so that only `args` are kept.

        What it writes to the caches of `context`, it then writes again from the same beginning.
        """
        if not self.checkpoints:
            return function(*args)
        rewind, function = context.rewinder(), keep_hooks(self, function)

        def again(*args: object) -> Any:
            rewind()
            return function(*args)

        return self._gradient_checkpointing_func(again, *args)

    def previous(self, signal: Tensor, context: Context) -> Tensor:
        """Apply S: each position reads the signal at the end of the chunk before its own. [B, T, D] -> [B, T, D]"""
        interval, (batch, length, size) = self.config.feedback_interval, signal.shape
        state = context.state()
        held = signal.new_zeros(batch, size) if state is None else state[0]
        known = torch.cat([held[:, None].to(signal.dtype), signal], dim=1)  # column t + 1 holds the signal of t
        columns = torch.arange(length, device=signal.device)
        end = columns - (context.count[:, None] + columns) % interval
        real = length if context.lengths is None else context.lengths
        end_of_call = real - (context.count + real) % interval
        index = torch.cat([end, end_of_call[:, None].expand(batch, 1)], dim=1).clamp(min=0)
        known = known.gather(1, index[..., None].expand(-1, -1, size))
        context.keep((known[:, -1],))
        return known[:, :-1]

    # Time, block by block

    def over_positions(self, e: Tensor, context: Context, readout: Readout) -> LoopOutput:
        """Run position by position, or chunk by chunk of `feedback_interval`: exact, and as decoding does it."""
        given = context
        if context.cache is None:  # for this call only
            context = replace(context, cache=FeedbackCache())
        # Deferring keeps the inputs of all steps, which checkpointing is there to avoid.
        defers = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not self.checkpoints
        with DeferredWeightGradients() if defers else nullcontext():
            h, y, held = self.sweep(e, None, context, readout, 0, self.config.feedback_interval)
        if self.config.feedback_signal != "none":
            context.for_part("signal", 0).keep((held,))
        y = readout.decode(h, given.for_part("decoder", "last")) if y is None else y
        iterations = context.iterations
        return LoopOutput([h], [y], torch.full_like(context.position_ids, max(iterations)) if iterations else None)

    def sweep(
        self, e: Tensor, shifted: Tensor | None, context: Context, readout: Readout, number: int, block: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Run blocks of positions in turn; each reads the signal of the blocks before it, and within itself `shifted`,
        the signal of the pass before.

        Returns h [B, T, D], y [B, T, D] if it is fed back, and the last signal [B, D].
        """
        config, (batch, length, size) = self.config, e.shape
        feeds, by_output = config.feedback_signal != "none", config.feedback_signal == "output"
        decoder_slot: str | int = number
        truncate = None
        if not config.in_passes:
            decoder_slot, truncate = "last", config.gradient_steps if torch.is_grad_enabled() else None

        def walk(held: Tensor, given: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, Any, Tensor, Tensor]:
            """Return h and y of some spans, the last signal, and that of the last chunk finished before the block."""
            states: list[Tensor] = []
            outputs: list[Tensor] = []
            for start, stop in spans:
                if truncate and start and start % truncate == 0:
                    held, given = held.detach(), given.detach()
                    cast(Any, context.cache).detach()
                span, signal = context.span(start, stop), None
                if feeds:
                    begins = ((context.count + start) % block == 0)[:, None]
                    given = held if block == 1 else torch.where(begins, held, given)
                    signal = self.within_block(given, shifted, context, start, stop, block)
                h, _ = self.step(e[:, start:stop], signal, None, span, number)
                states.append(h)
                signal = h
                if by_output:
                    outputs.append(readout.decode(h, span.for_part("decoder", decoder_slot)))
                    signal = readout.embed(outputs[-1])
                if feeds:
                    held = self.last_of_chunk(signal, held, context, start, stop)
            return torch.cat(states, dim=1), torch.cat(outputs, dim=1) if outputs else None, held, given

        kept = context.for_part("signal", number).state()
        held = e.new_zeros(batch, size) if kept is None else kept[0].to(e.dtype)  # of the last finished chunk
        given, made = held, []
        runs = [self.spans(context, block if feeds else None, truncate)]
        if self.checkpoints:  # √T runs of √T positions, or as many of blocks, keep least
            spans = runs[0] if feeds else self.spans(context, isqrt(length), truncate)
            each = isqrt(len(spans)) if feeds else 1
            runs = [spans[first : first + each] for first in range(0, len(spans), each)]
        for run in runs:
            h, y, held, given = self.checkpoint(walk, context, held, given, run)
            made.append((h, y))
        states, outputs = zip(*made, strict=True)
        return torch.cat(states, dim=1), torch.cat(outputs, dim=1) if by_output else None, held

    def within_block(
        self, given: Tensor, shifted: Tensor | None, context: Context, start: int, stop: int, block: int
    ) -> Tensor:
        """Return the signal that positions from `start` to `stop` of a block read, [B, stop - start, D].

        That is `given` [B, D] of the blocks before, or the signal of the pass before if a chunk ends within the block.
        """
        signal, interval = given[:, None].expand(-1, stop - start, -1), self.config.feedback_interval
        if interval % block == 0:
            return signal
        counts = context.count[:, None] + torch.arange(start, stop, device=given.device)
        old = torch.zeros_like(signal) if shifted is None else shifted[:, start:stop]
        return torch.where((counts % interval >= counts % block)[..., None], signal, old)

    def spans(self, context: Context, block: int | None, truncate: int | None) -> list[tuple[int, int]]:
        """Split the columns so that no block and no gradient window is cut in two."""
        length = fixed_length(context.position_ids.shape[1])
        bounds = {0, length, *range(0, length, truncate or length)}
        if block is not None:
            begins = block == 1 or context.offset == 0  # torch.export can't follow a list of tensor values
            offsets = {0} if begins else set((-context.count % block).tolist())
            bounds.update(start for offset in offsets for start in range(offset, length, block))
        starts = sorted(bounds)
        return list(zip(starts, starts[1:], strict=False))

    def last_of_chunk(self, signal: Tensor, held: Tensor, context: Context, start: int, stop: int) -> Tensor:
        """Return the signal of the last chunk finished before `stop`, of `signal` [B, stop - start, D], or `held`."""
        interval = self.config.feedback_interval
        if interval == 1 and context.lengths is None:
            return signal[:, -1]
        real = torch.full_like(context.count, stop) if context.lengths is None else context.lengths.clamp(max=stop)
        end = real - (context.count + real) % interval
        rows = torch.arange(len(signal), device=signal.device)
        return torch.where((end > start)[:, None], signal[rows, (end - 1 - start).clamp(min=0)], held)
