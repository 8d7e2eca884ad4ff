"""Sweeps over blocks of positions, each of which reads the signal of the blocks before it.

Shapes: B batch, T positions, D hidden size.
"""

from __future__ import annotations

from math import isqrt
from typing import Any, cast

import torch
from torch import Tensor

from .configuration_feedback import FeedbackConfig
from .feedback_cache import Context
from .feedback_padding import fixed_length


def sweep(
    loop: Any,
    e: Tensor,
    shifted: Tensor | None,
    context: Context,
    readout: Any,
    number: int,
    block: int,
    decoder_slot: int | str,
    truncate: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run blocks of positions in turn; each reads the signal of the blocks before it, and within itself `shifted`,
    the signal of the pass before.

    Returns h [B, T, D], y [B, T, D] if it is fed back, and the last signal [B, D].
    """
    config, (batch, length, size) = loop.config, e.shape
    feeds, by_output = config.feedback_signal != "none", config.feedback_signal == "output"

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
                signal = within_block(config, given, shifted, context, start, stop, block)
            h, _ = loop.step(e[:, start:stop], signal, None, span, number)
            states.append(h)
            signal = h
            if by_output:
                outputs.append(readout.decode(h, span.for_part("decoder", decoder_slot)))
                signal = readout.embed(outputs[-1])
            if feeds:
                held = last_of_chunk(config.feedback_interval, signal, held, context, start, stop)
        return torch.cat(states, dim=1), torch.cat(outputs, dim=1) if outputs else None, held, given

    kept = context.for_part("signal", number).state()
    held = e.new_zeros(batch, size) if kept is None else kept[0].to(e.dtype)  # of the last finished chunk
    given, made = held, []
    runs = [columns(context, block if feeds else None, truncate)]
    if loop.checkpoints:  # √T runs of √T positions, or as many of blocks, keep least
        spans = runs[0] if feeds else columns(context, isqrt(length), truncate)
        each = isqrt(len(spans)) if feeds else 1
        runs = [spans[first : first + each] for first in range(0, len(spans), each)]
    for run in runs:
        h, y, held, given = loop.checkpoint(walk, context, held, given, run)
        made.append((h, y))
    states, outputs = zip(*made, strict=True)
    return torch.cat(states, dim=1), torch.cat(outputs, dim=1) if by_output else None, held


def within_block(
    config: FeedbackConfig, given: Tensor, shifted: Tensor | None, context: Context, start: int, stop: int, block: int
) -> Tensor:
    """Return the signal that positions from `start` to `stop` of a block read, [B, stop - start, D].

    That is `given` [B, D] of the blocks before, or the signal of the pass before if a chunk ends within the block.
    """
    signal, interval = given[:, None].expand(-1, stop - start, -1), config.feedback_interval
    if interval % block == 0:
        return signal
    counts = context.count[:, None] + torch.arange(start, stop, device=given.device)
    old = torch.zeros_like(signal) if shifted is None else shifted[:, start:stop]
    return torch.where((counts % interval >= counts % block)[..., None], signal, old)


def columns(context: Context, block: int | None, truncate: int | None) -> list[tuple[int, int]]:
    """Split the columns so that no block and no gradient window is cut in two."""
    length = fixed_length(context.position_ids.shape[1])
    bounds = {0, length, *range(0, length, truncate or length)}
    if block is not None:
        begins = block == 1 or context.offset == 0  # torch.export can't follow a list of tensor values
        offsets = {0} if begins else set((-context.count % block).tolist())
        bounds.update(start for offset in offsets for start in range(offset, length, block))
    starts = sorted(bounds)
    return list(zip(starts, starts[1:], strict=False))


def last_of_chunk(interval: int, signal: Tensor, held: Tensor, context: Context, start: int, stop: int) -> Tensor:
    """Return the signal of the last chunk finished before `stop`, of `signal` [B, stop - start, D], or `held`."""
    if interval == 1 and context.lengths is None:
        return signal[:, -1]
    real = torch.full_like(context.count, stop) if context.lengths is None else context.lengths.clamp(max=stop)
    end = real - (context.count + real) % interval
    rows = torch.arange(len(signal), device=signal.device)
    return torch.where((end > start)[:, None], signal[rows, (end - 1 - start).clamp(min=0)], held)
