"""The feedback loop: h_t = f(c(e_t, φ(y_{t-1})), h_{t-1}), y_t = g(h_t).

"t" is a position (axis `time`) or a pass over all positions (axis `depth`). Both are the fixed point of one map
h = F(e, S·h), where S shifts by one position (time) or not at all (depth); the solver says how it is reached.

Shapes: B batch, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .configuration_feedback import RECURRENT_TYPES, FeedbackConfig
from .feedback_cache import Context, FeedbackCache
from .feedback_cells import State, make_cell
from .feedback_connections import CONNECTIONS
from .feedback_layers import CrossAttention, dropout

Decode = Callable[[Tensor, Context], Tensor]  # h [B, T, D] -> y [B, T, D]
EmbedOutput = Callable[[Tensor], Tensor]  # y [B, T, D] -> the prediction, embedded, [B, T, D]


class LoopOutput(NamedTuple):
    """Of each pass where every step was asked for, else of the last alone; position by position there is one."""

    states: list[Tensor]  # h, each [B, T, D]
    outputs: list[Tensor]  # y, each [B, T, D]


class FeedbackLoop(nn.Module):
    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__()
        self.config = config
        self.connection = CONNECTIONS[config.feedback_connection](config)
        self.cell = make_cell(config)
        self.cross_attention = CrossAttention(config) if config.is_encoder_decoder else None
        self.gradient_checkpointing = False
        self.num_steps: int | None = None  # set by training.SampleFeedbackSteps for the steps it trains

    def forward(
        self,
        e: Tensor,
        context: Context,
        decode: Decode,
        embed_output: EmbedOutput,
        num_steps: int | None = None,
        every_step: bool = False,
    ) -> LoopOutput:
        passes = self.num_passes(num_steps)
        if passes is None:
            return self.over_positions(e, context, decode, embed_output)
        return self.over_passes(e, context, decode, embed_output, passes, every_step)

    def num_passes(self, num_steps: int | None = None) -> int | None:
        """How many passes a call makes; None where it goes position by position."""
        config, num_steps = self.config, self.num_steps if num_steps is None else num_steps
        if num_steps is not None and (not isinstance(num_steps, int) or num_steps < 1):
            raise ValueError(f"num_feedback_steps is {num_steps!r}; it must be a whole number of at least 1.")
        if config.feedback_signal == "none" and config.feedback_type not in RECURRENT_TYPES:
            return 1  # nothing is fed back: every pass would be the same
        if config.feedback_axis == "depth":
            return num_steps or config.num_feedback_steps
        if config.solver == "jacobi" and config.feedback_signal != "none":
            return num_steps or config.solver_steps
        if num_steps is not None and config.feedback_signal != "none":
            raise ValueError(
                "num_feedback_steps has no meaning position by position: leave it out, or set config.solver='jacobi'."
            )
        return None

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

    def one_pass(
        self, e: Tensor, signal: Tensor | None, state: State, context: Context, step: int
    ) -> tuple[Tensor, State]:
        x = self.connect(e, signal, context)
        if self.config.feedback_axis == "depth":
            return self.cell.step(x, state, context.at("cell", step))
        return self.cell(x, context.at("cell", step)), None

    # Depth, and time in parallel

    def over_passes(
        self, e: Tensor, context: Context, decode: Decode, embed_output: EmbedOutput, passes: int, every_step: bool
    ) -> LoopOutput:
        """All positions at once, `passes` times: exact in depth, Jacobi's iteration in time."""
        config, grad = self.config, torch.is_grad_enabled()
        if grad:  # keys kept from a pass without gradient, or within a checkpoint, would lose it
            context = replace(context, cross_attention=None)
        first = passes - (config.gradient_steps or passes)
        signal, state, y = None, None, None
        outputs: list[Tensor] = []
        states: list[Tensor] = []
        for step in range(passes):
            last = step == passes - 1
            with torch.set_grad_enabled(grad and step >= first):
                h, state = self.checkpoint(self.one_pass, e, signal, state, context, step)
                if last or every_step or config.feedback_signal == "output":
                    y = decode(h, context.at("decoder", "last" if last else step))
                    if last or every_step:
                        states.append(h)
                        outputs.append(y)
                if config.feedback_signal == "none" or (last and config.feedback_axis == "depth"):
                    continue  # no later pass or call reads it
                signal = h if config.feedback_signal != "output" or y is None else embed_output(y)
                if config.feedback_axis == "time":
                    signal = self.previous(signal, context.at("signal", step))
        return LoopOutput(states, outputs)

    def checkpoint(self, function: Callable, *args: object) -> tuple[Tensor, State]:
        """Recomputes a pass in the backward, so that only its input is kept."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(function, *args)
        return function(*args)

    def previous(self, signal: Tensor, context: Context) -> Tensor:
        """S: each position reads the signal at the end of the chunk before its own. [B, T, D] -> [B, T, D]."""
        interval, (batch, length, size) = self.config.feedback_interval, signal.shape
        state = context.state()
        held = signal.new_zeros(batch, size) if state is None else state[0]
        known = torch.cat([held[:, None].to(signal.dtype), signal], dim=1)  # what stands at column t + 1 happened at t
        columns = torch.arange(length, device=signal.device)
        end = columns - (context.count[:, None] + columns) % interval
        real = columns.new_tensor(length) if context.lengths is None else context.lengths
        end_of_call = real - (context.count + real) % interval
        index = torch.cat([end, end_of_call[:, None].expand(batch, 1)], dim=1).clamp(min=0)
        known = known.gather(1, index[..., None].expand(-1, -1, size))
        context.keep((known[:, -1],))
        return known[:, :-1]

    # Time, position by position

    def over_positions(self, e: Tensor, context: Context, decode: Decode, embed_output: EmbedOutput) -> LoopOutput:
        """A chunk of `feedback_interval` positions after the other: exact, and what decoding does."""
        if context.cache is None:  # the cell's memory of this call
            context = replace(context, cache=FeedbackCache())
        feeds = self.config.feedback_signal != "none"
        here = context.at("signal")
        state = here.state()
        held = torch.zeros_like(e[:, 0]) if state is None else state[0].to(e.dtype)
        states, outputs = [], []
        for start, stop in self.chunks(context):
            if self.config.gradient_steps and start and start % self.config.gradient_steps == 0:
                held = held.detach()
                context.cache.detach()
            span = context.span(start, stop)
            h, _ = self.one_pass(e[:, start:stop], held[:, None].expand(-1, stop - start, -1), None, span, 0)
            states.append(h)
            signal = h
            if self.config.feedback_signal == "output":
                outputs.append(decode(h, span.at("decoder", "last")))
                signal = embed_output(outputs[-1])
            if feeds:
                held = torch.where(self.ends_chunk(context, stop)[:, None], signal[:, -1], held)
        if feeds:
            here.keep((held,))
        h = torch.cat(states, dim=1)
        y = torch.cat(outputs, dim=1) if outputs else decode(h, context.at("decoder", "last"))
        return LoopOutput([h], [y])

    def chunks(self, context: Context) -> list[tuple[int, int]]:
        """The spans of positions that no row's feedback changes within."""
        length = context.position_ids.shape[1]
        bounds = {0, length}
        if self.config.feedback_signal != "none":
            interval = self.config.feedback_interval
            offsets = {0} if interval == 1 else set((-context.count % interval).tolist())
            bounds.update(start for offset in offsets for start in range(offset, length, interval))
        if self.config.gradient_steps and torch.is_grad_enabled():
            bounds.update(range(0, length, self.config.gradient_steps))
        starts = sorted(bounds)
        return list(zip(starts, starts[1:], strict=False))

    def ends_chunk(self, context: Context, stop: int) -> Tensor:
        """[B] whether the real position before column `stop` is the last of its chunk."""
        ends = (context.count + stop) % self.config.feedback_interval == 0
        return ends if context.lengths is None else ends & (stop <= context.lengths)
