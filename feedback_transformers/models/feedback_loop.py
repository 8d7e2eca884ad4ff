"""The feedback loop: h_t = f(c(e_t, φ(y_{t-1})), h_{t-1}), y_t = g(h_t).

"t" is a position (axis `time`) or a pass over all positions (axis `depth`). Both solve h = F(e, S·h), where S shifts
by one position (time) or by none (depth). The solver says how the solution is reached.

Shapes: B batch, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_feedback import FeedbackConfig
from .feedback_cache import Context
from .feedback_cells import State
from .feedback_connections import CONNECTIONS
from .feedback_halting import halting_rule
from .feedback_layers import CrossAttention, dropout, make_norm
from .feedback_names import RECURRENT_TYPES
from .feedback_recursions import RECURSIONS
from .feedback_solvers import LoopOutput, Pass, Passes, Readout, solver_of
from .feedback_states import INITIAL_STATES, FeedbackState

logger = logging.get_logger(__name__)


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
        solver = solver_of(self.config)
        if passes is not None and not solver.makes_passes:
            solver = Passes  # one, as nothing is fed back
        made = solver(self).solve(e, context, readout, passes or 1, every_step, start)
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
        connect = partial(self.connect, e, context=context)
        if self.config.feedback_axis == "time":
            h, state = self.recursion.along(self.cell, self.config, connect, signal, here), None
        else:
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
