"""CELLS: one step h = f(x, h') of the loop in feedback_loop.py.

`forward` runs a cell along the positions of a call. `step` makes one pass over all positions on the depth axis, where
h' is the state of the pass before. Cells without a recurrence of their own get the past through the connection only,
so both are the same for them.

Shapes: x and h are [B, T, D].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_feedback import FeedbackConfig
from .feedback_backbones import family_member
from .feedback_cache import Context, KeyValueSlots
from .feedback_layers import ConvStack, MLPStack, TransformerStack
from .feedback_newton import newton
from .feedback_scan import RECURRENCES, RecurrentStack

State = tuple[Any, ...] | None  # a GRUState or LSTMState for each layer


class RecurrentCell(RecurrentStack):
    """Layers of one recurrence. Along time, each reads its state of the position before; in depth, of the pass
    before."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config, config.num_feedback_layers, kind=config.feedback_type)
        self.config = config

    def run(self, cell: Any, x: Tensor, state: Any, context: Context) -> tuple[Tensor, Any]:
        if self.config.solver != "newton" or x.shape[1] == 1:
            return super().run(cell, x, state, context)
        h, state, iterations = newton(cell, x, state, context.mask, self.config.solver_tolerance or 1e-6)
        context.iterations.append(iterations)
        return h, state

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        new: list[Any] = []
        for i, layer in enumerate(self.layers):
            cell: Any = layer[0]
            before = cell.initial_state(x) if state is None else cell.state_type(*state[i])
            new.append(cell.step(cell.input_proj(x), before))
            x = new[-1].h.to(x.dtype)
        return x, tuple(new)


class MLPCell(MLPStack):
    """h = MLP(x), in the spirit of Jordan 1986 with output feedback, and of Elman 1990 with state feedback."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config, config.num_feedback_layers)

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        return self(x, context), None


class ConvCell(ConvStack):
    """h = convolutions of x, two-dimensional for images."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config, config.num_feedback_layers, causal=config.is_causal or config.feedback_axis == "time")

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        return self(x, context), None


class TransformerCell(TransformerStack):
    """h = transformer layers of x. Each layer keeps its own keys and values of earlier positions."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config, config.num_feedback_layers, causal=config.is_causal or config.feedback_axis == "time")
        self.config = config

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.states(x, context, KeyValueSlots.of(context, overwrites=self.config.shared_step_cache))[-1]

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        return self(x, context), None


class MemoryTransformerCell(TransformerCell):
    """Cell in the spirit of the Feedback Transformer (Fan et al. 2020, arXiv:2002.09402):

    m_t = Σ_l softmax(w)_l x_t^l    x_t^{l+1} = layer_l(x_t^l, keys and values of m_{<t})

    All layers read one memory, whose keys and values the projections of the first layer compute once. A position also
    sees itself, other than in the paper. Position by position, the memory holds all earlier positions; in Jacobi's
    passes, it holds what the pass before made of them.
    """

    same_in_passes = False

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config)
        self.rotate = family_member(self.backbone.model_type, "apply_rotary_pos_emb")
        self.layer_weights = nn.Parameter(torch.empty(config.num_feedback_layers + 1))

    def init_parameters(self) -> None:
        init.zeros_(self.layer_weights)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        cache = context.cache
        if cache is None:
            raise ValueError("The shared memory lives in a cache; run the cell through FeedbackLoop.")
        slot = context.slot
        past = cache.keys_values((slot.before() if self.config.in_passes else slot).inner("memory"))
        states = self.states(x, context, KeyValueSlots(cache, slot, shared=past or self.no_memory(x)))
        memory = torch.einsum("l,lbtd->btd", self.layer_weights.softmax(0).to(x.dtype), torch.stack(states))
        cache.update(*self.keys_values(memory, context), cache.index(slot.inner("memory")))
        return states[-1]

    def attention_mask(self, x: Tensor, context: Context, kind: str) -> Any:
        """Return the mask; in passes, a position sees the memory of those before it, and itself."""
        if not self.config.in_passes:
            return super().attention_mask(x, context, kind)
        batch, length, _ = x.shape
        known = torch.ones(batch, length, context.offset + length, dtype=torch.bool, device=x.device)
        known = known.tril(context.offset - 1)
        if context.key_mask is not None:
            known = known & context.key_mask[:, None]
        if kind == "sliding_attention":
            real = known.new_ones(batch, known.shape[-1]) if context.key_mask is None else context.key_mask
            places = real.cumsum(dim=1)
            known = known & (places[:, context.offset :, None] - places[:, None] < self.backbone.sliding_window)
        itself = torch.eye(length, dtype=torch.bool, device=x.device).expand(batch, -1, -1)
        seen = itself if context.slot.step == 0 else torch.cat([known, itself], dim=-1)
        return x.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(x.dtype).min)[:, None]

    def no_memory(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of no position."""
        attention: Any = self.layers[0].self_attn
        groups = getattr(self.backbone, "num_key_value_heads", self.backbone.num_attention_heads)
        return (x.new_zeros(x.shape[0], groups, 0, attention.head_dim),) * 2

    def keys_values(self, memory: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Compute keys and values [B, heads, T, head_dim] of a memory [B, T, D]."""
        first: Any = self.layers[0]
        attention = first.self_attn
        memory = getattr(first, "input_layernorm", nn.Identity())(memory)
        keys, values = attention.k_proj(memory), attention.v_proj(memory)
        if hasattr(attention, "k_norm") and attention.k_norm.weight.numel() == keys.shape[-1]:
            keys = attention.k_norm(keys)
        keys, values = (t.unflatten(-1, (-1, attention.head_dim)) for t in (keys, values))
        if hasattr(attention, "k_norm") and attention.k_norm.weight.numel() == attention.head_dim:
            keys = attention.k_norm(keys)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        return self.rotate(keys, keys, *self.rotary(memory, context.position_ids))[1], values


CELLS: dict[str, type[nn.Module]] = {
    "mlp": MLPCell,
    **dict.fromkeys(RECURRENCES, RecurrentCell),
    "conv": ConvCell,
    "transformer": TransformerCell,
}


def make_cell(config: FeedbackConfig) -> nn.Module:
    """Return the cell of `config.feedback_type`; the `memory` connection has a transformer cell of its own."""
    if config.feedback_connection == "memory" and config.feedback_signal != "none":
        return MemoryTransformerCell(config)
    return CELLS[config.feedback_type](config)
