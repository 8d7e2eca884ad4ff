"""The feedback loop: h_t = f(c(e_t, φ(y_{t-1})), h_{t-1}), y_t = g(h_t).

"t" is a position (axis `time`) or a pass over all positions (axis `depth`). Both are the fixed point of one map
h = F(e, S·h), where S shifts by one position (time) or not at all (depth); the solver says how it is reached.

Shapes: B batch, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_feedback import FeedbackConfig
from .feedback_cache import Context, FeedbackCache
from .feedback_cells import State, make_cell
from .feedback_connections import CONNECTIONS
from .feedback_gradients import DeferredWeightGradients
from .feedback_halting import HALTING, Progress
from .feedback_layers import CrossAttention, dropout
from .feedback_names import RECURRENT_TYPES
from .feedback_padding import fixed_length

logger = logging.get_logger(__name__)


class Readout(NamedTuple):
    """What the loop may ask of the decoder and the head."""

    decode: Callable[[Tensor, Context], Tensor]  # h [B, T, D] -> y [B, T, D]
    embed: Callable[[Tensor], Tensor]  # y -> the prediction made of it, embedded back, [B, T, D]
    predict: Callable[[Tensor], Tensor]  # y -> its logits [B, T, V]


@dataclass
class Pass:
    """What one pass leaves to the next."""

    h: Tensor  # [B, T, D]
    state: State  # of the cell, on the depth axis
    y: Any = None  # [B, T, D], where something reads it
    signal: Tensor | None = None  # [B, T, D] φ, at the positions that made it
    shifted: Tensor | None = None  # [B, T, D] S·φ, at the positions that read it


class LoopOutput(NamedTuple):
    states: list[Tensor]  # h [B, T, D], of each pass where every step was asked for, else of the last alone
    outputs: list[Tensor]  # y [B, T, D], likewise
    num_steps: Tensor | None = None  # [B, T] passes that each position made, where they may stop before the last
    probabilities: list[Tensor] | None = None  # [B, T] of stopping at each pass, in training with learned halting
    halting_loss: Tensor | None = None  # [B, T] of each position


class FeedbackLoop(nn.Module):
    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.config = config
        self.connection = CONNECTIONS[config.feedback_connection](config)
        self.cell = make_cell(config)
        self.cross_attention = CrossAttention(config) if config.is_encoder_decoder else None
        self.halting = None if config.halting == "fixed" else HALTING[config.halting](config)
        self.gradient_checkpointing = False
        self.num_steps: int | None = None  # in training; set by training.SampleFeedbackSteps for the steps it trains

    def forward(
        self, e: Tensor, context: Context, readout: Readout, num_steps: int | None = None, every_step: bool = False
    ) -> LoopOutput:
        passes = self.num_passes(num_steps)
        self.check_trained(passes)
        kind = HALTING.get(self.config.halting, type(None))
        if type(self.halting) is not kind:
            raise ValueError(
                f"config.halting is {self.config.halting!r}, for which this model was not made: give it to "
                "from_pretrained, or to the config before the model is made."
            )
        if passes is None:
            made = self.over_positions(e, context, readout)
        else:
            made = self.over_passes(e, context, readout, passes, every_step)
        if self.training:
            made.outputs[-1] = self.keep_in_graph(made.outputs[-1])
        return made

    def num_passes(self, num_steps: int | None = None) -> int | None:
        """How many passes a call makes at most; None where it goes position by position."""
        config = self.config
        if num_steps is None and self.training:
            num_steps = self.num_steps
        asked = config.num_feedback_steps if num_steps is None else num_steps
        for name, steps in (("num_feedback_steps", asked), ("solver_steps", config.solver_steps)):
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(f"{name} is {steps!r}; it must be a whole number of at least 1.")
        if config.feedback_signal == "none" and config.feedback_type not in RECURRENT_TYPES:
            return 1  # nothing is fed back: every pass would be the same
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

    # The equation

    def connect(self, e: Tensor, signal: Tensor | None, context: Context) -> Tensor:
        """c(e, φ), and what cross-attention reads of the source; without a past, φ is zero."""
        if self.config.feedback_signal == "none":
            signal = e
        elif signal is None:
            signal = torch.zeros_like(e)
        if self.training and self.config.feedback_noise and self.config.feedback_signal != "none":
            signal = signal + self.config.feedback_noise * torch.randn_like(signal)
        x = dropout(self.connection(e, signal), self.config.dropout, self.training)
        return x if self.cross_attention is None else self.cross_attention(x, context)

    def step(
        self, e: Tensor, signal: Tensor | None, state: State, context: Context, number: int
    ) -> tuple[Tensor, State]:
        """f(c(e, φ), h') at all positions given, [B, T, D]."""
        x = self.connect(e, signal, context)
        if self.config.feedback_axis == "depth":
            return self.cell.step(x, state, context.for_part("cell", number))
        return self.cell(x, context.for_part("cell", number)), None

    # Depth, and time in parallel

    def over_passes(self, e: Tensor, context: Context, readout: Readout, passes: int, every_step: bool) -> LoopOutput:
        """All positions, at most `passes` times: exact in depth; in time Jacobi's iteration or Gauss and Seidel's."""
        config, grad, given = self.config, torch.is_grad_enabled(), context
        if grad:  # keys kept from a pass without gradient, or within a checkpoint, would lose it
            context = replace(context, cross_attention=None)
        stops, reads_prediction = self.stops, self.stops and self.halting.reads_prediction
        if stops and self.checkpoints:
            raise ValueError("halting='act' can't be trained with gradient checkpointing: disable one of them.")
        remembers = config.feedback_connection == "memory" and config.feedback_signal != "none"
        if context.cache is None and (config.solver == "gauss_seidel" or remembers or (stops and config.is_causal)):
            context = replace(context, cache=FeedbackCache())  # of this call
        progress = None if self.halting is None else Progress.start(e, context.mask)
        every_step = every_step or (config.halting == "learned" and self.training)  # it weighs their losses
        first = max(0, passes - (config.gradient_steps or passes))
        resume = first if grad and first else passes  # after convergence: a truncated gradient wants its passes
        watched = every_step or progress is not None or config.solver_tolerance is not None
        segment = 1 if watched or not grad else self.segment(passes - first)
        made: list[Pass] = []
        number, steps = 0, 0
        while number < passes:
            before = made[-1] if made else None
            stop = min(number + (segment if number >= first else 1), passes)
            here = replace(context, running=progress.running) if stops and before is not None else context
            with torch.set_grad_enabled(grad and number >= first):
                now = self.run_segment(e, before, here, readout, number, stop, passes, every_step)
                if progress is not None:
                    progress.num_steps = progress.num_steps + progress.running
                    logits = readout.predict(now.y) if reads_prediction else None
                    self.halting(progress, now.h, None if before is None else before.h, logits, stop == passes)
            made = [*made, now] if every_step else [now]
            number, steps = stop, steps + 1
            done = (stops and not progress.running.any()) or self.converged(before, now, context)
            if done and number < resume:
                self.skip(now, context, number, resume)
                number = resume
        h = made[-1].h if progress is None or progress.mean is None else progress.mean
        y = readout.decode(h, given.for_part("decoder", "last"))
        states, outputs = [*(p.h for p in made[:-1]), h], [*(p.y for p in made[:-1]), y]
        if progress is None:
            fixed = config.solver_tolerance is None
            return LoopOutput(states, outputs, None if fixed else torch.full_like(context.position_ids, steps))
        loss = self.halting.loss(progress)
        return LoopOutput(states, outputs, progress.num_steps, progress.probabilities or None, loss)

    def keep_in_graph(self, y: Tensor) -> Tensor:
        """y, with a gradient of zero for the weights that only later steps read: DDP waits for that of each weight."""
        parts = [] if self.halting is None else [*self.halting.parameters()]
        weights = [*parts, getattr(self.cell, "layer_weights", None)]
        return y + sum(0.0 * p.sum() for p in weights if p is not None and p.requires_grad)

    @property
    def stops(self) -> bool:
        """Whether positions may stop before the last pass."""
        return self.halting is not None and bool(self.halting.in_training or not self.training)

    def segment(self, passes: int) -> int:
        """How many passes to checkpoint as one, of those with a gradient: about as many as there are such segments.

        So 2√K inputs of passes are kept for a third forward, where K would be for a second; few passes don't need it.
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
        """The last of the passes from `start` to `stop`, out of `passes`."""
        if stop - start == 1:
            return self.one_pass(e, before, context, readout, start, wanted, stop == passes)

        def segment(before: Pass | None) -> Pass:
            for number in range(start, stop):
                before = self.one_pass(e, before, context, readout, number, wanted, number == passes - 1)
            return cast(Pass, before)

        return self.checkpoint(segment, context, before)

    def one_pass(
        self, e: Tensor, before: Pass | None, context: Context, readout: Readout, number: int, wanted: bool, last: bool
    ) -> Pass:
        """The pass after `before`; `wanted` where its y is asked for."""
        config, by_output = self.config, self.config.feedback_signal == "output"
        shifted, state = (None, None) if before is None else (before.shifted, before.state)
        in_blocks, y = config.solver == "gauss_seidel", None
        if in_blocks:
            h, y, _ = self.sweep(e, shifted, context, readout, number, config.solver_block_size)
        else:
            h, state = self.checkpoint(self.step, context, e, shifted, state, context, number)
        if context.running is not None and before is not None:
            h = torch.where(context.running[..., None], h, before.h)
        reads_prediction = self.stops and self.halting.reads_prediction
        if y is None and (reads_prediction or (not last and (wanted or by_output))):
            y = readout.decode(h, context.for_part("decoder", number))
        now = Pass(h, state, y)
        if config.feedback_signal == "none" or (last and not in_blocks):
            return now  # no later pass or call reads its signal
        signal = readout.embed(y) if by_output and y is not None else h
        in_time = config.feedback_axis == "time"
        now.signal = signal
        now.shifted = self.previous(signal, context.for_part("signal", number)) if in_time else signal
        return now

    def converged(self, before: Pass | None, now: Pass, context: Context) -> bool:
        """Whether the last pass changed no signal by more than the tolerance."""
        tolerance = self.config.solver_tolerance
        if tolerance is None or self.config.feedback_axis == "depth" or now.signal is None:
            return False
        if before is None or before.signal is None:
            return False
        change, size = (now.signal - before.signal).detach().abs(), now.signal.detach().abs()
        if context.mask is not None:
            change, size = change * context.mask[..., None], size * context.mask[..., None]
        return bool(change.max() <= tolerance * size.max())

    def skip(self, now: Pass, context: Context, start: int, stop: int) -> None:
        """Leaves in the cache what the passes from `start` to `stop` would, which change nothing any more."""
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
        rewind = context.rewinder()

        def again(*args: object) -> Any:
            rewind()
            return function(*args)

        return self._gradient_checkpointing_func(again, *args)

    def previous(self, signal: Tensor, context: Context) -> Tensor:
        """S: each position reads the signal at the end of the chunk before its own. [B, T, D] -> [B, T, D]."""
        interval, (batch, length, size) = self.config.feedback_interval, signal.shape
        state = context.state()
        held = signal.new_zeros(batch, size) if state is None else state[0]
        known = torch.cat([held[:, None].to(signal.dtype), signal], dim=1)  # what stands at column t + 1 happened at t
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
        """Position by position, or chunk by chunk of `feedback_interval`: exact, and what decoding does."""
        given = context
        if context.cache is None:  # the cell's memory of this call
            context = replace(context, cache=FeedbackCache())
        # What is deferred is kept, which checkpointing is not to do.
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
        """Blocks of positions in turn, each reading the signal of the blocks before it, and within itself `shifted`,
        that of the pass before. h [B, T, D], y [B, T, D] where it is fed back, and the last signal [B, D]."""
        config, (batch, length, size) = self.config, e.shape
        feeds, by_output = config.feedback_signal != "none", config.feedback_signal == "output"
        decoder_slot: str | int = number
        truncate = None
        if not config.in_passes:
            decoder_slot, truncate = "last", config.gradient_steps if torch.is_grad_enabled() else None

        def walk(held: Tensor, given: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, Any, Tensor, Tensor]:
            """h and y of some spans, the last signal, and that of the last chunk finished before the block."""
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
        if self.checkpoints:  # √T runs of √T positions, or of blocks, keep what is least
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
        """The signal that each position from `start` to `stop` of a block reads, [B, stop - start, D]: `given` [B, D]
        of the blocks before, or that of the pass before where a chunk ends within the block."""
        signal, interval = given[:, None].expand(-1, stop - start, -1), self.config.feedback_interval
        if interval % block == 0:
            return signal
        counts = context.count[:, None] + torch.arange(start, stop, device=given.device)
        old = torch.zeros_like(signal) if shifted is None else shifted[:, start:stop]
        return torch.where((counts % interval >= counts % block)[..., None], signal, old)

    def spans(self, context: Context, block: int | None, truncate: int | None) -> list[tuple[int, int]]:
        """The columns between which no row has the beginning of a block, nor the gradient its end."""
        length = fixed_length(context.position_ids.shape[1])
        bounds = {0, length, *range(0, length, truncate or length)}
        if block is not None:
            begins = block == 1 or context.offset == 0  # a list of what tensors hold can't be exported
            offsets = {0} if begins else set((-context.count % block).tolist())
            bounds.update(start for offset in offsets for start in range(offset, length, block))
        starts = sorted(bounds)
        return list(zip(starts, starts[1:], strict=False))

    def last_of_chunk(self, signal: Tensor, held: Tensor, context: Context, start: int, stop: int) -> Tensor:
        """Of `signal` [B, stop - start, D]: that of the last chunk finished before `stop`, else `held` [B, D]."""
        interval = self.config.feedback_interval
        if interval == 1 and context.lengths is None:
            return signal[:, -1]
        real = torch.full_like(context.count, stop) if context.lengths is None else context.lengths.clamp(max=stop)
        end = real - (context.count + real) % interval
        rows = torch.arange(len(signal), device=signal.device)
        return torch.where((end > start)[:, None], signal[rows, (end - 1 - start).clamp(min=0)], held)
