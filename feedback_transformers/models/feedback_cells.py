"""CELLS: h = f(x, h'), one step each; the loop belongs to feedback_loop.py.

A cell runs along the positions of a call (`forward`) and, on the depth axis, as one pass over all of them at once
(`step`), where h' is the state of the pass before. Cells without a recurrence of their own receive the past
through the connection only, so for them the two are the same.

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

State = tuple[Any, ...] | None  # a GRUState or LSTMState per layer


class RecurrentCell(RecurrentStack):
    """Layers of one recurrence: along time each reads its own state of the position before, in depth that of
    the pass before."""

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
            before = cell.initial_state(x) if state is None else state[i]
            new.append(cell.step(cell.input_proj(x), before))
            x = new[-1].h.to(x.dtype)
        return x, tuple(new)


class MLPCell(MLPStack):
    """h = MLP(x): with output feedback the network of Jordan 1986, with state feedback that of Elman 1990."""

    def __init__(self, config: FeedbackConfig) -> None:
        super().__init__(config, config.num_feedback_layers)

    def step(self, x: Tensor, state: State, context: Context) -> tuple[Tensor, State]:
        return self(x, context), None


class ConvCell(ConvStack):
    """h = convolutions of x, in two dimensions for images."""

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
    """The cell of the Feedback Transformer, Fan et al. 2020 (arXiv:2002.09402):

    m_t = Σ_l softmax(w)_l x_t^l    x_t^{l+1} = layer_l(x_t^l, keys and values of m_{<t})

    All layers read one memory, whose keys and values are computed once, by the projections of the first layer;
    beside it a position sees itself. Position by position, that is the memory of all earlier ones; in Jacobi's passes,
    the one that the pass before made of them.
    """

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
        *part, number = context.slot
        past = cache.keys_values((*part, int(number) - int(self.config.in_passes), "memory"))
        states = self.states(x, context, KeyValueSlots(cache, context.slot, shared=past or self.no_memory(x)))
        memory = torch.einsum("l,lbtd->btd", self.layer_weights.softmax(0).to(x.dtype), torch.stack(states))
        cache.update(*self.keys_values(memory, context), cache.index((*context.slot, "memory")))
        return states[-1]

    def attention_mask(self, x: Tensor, context: Context, kind: str) -> Any:
        """In passes the keys are the memory of all positions, of which each sees those before it, and x itself."""
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
        seen = itself if context.slot[-1] == 0 else torch.cat([known, itself], dim=-1)
        return x.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(x.dtype).min)[:, None]

    def no_memory(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attention: Any = self.layers[0].self_attn
        return (x.new_zeros(x.shape[0], self.backbone.num_key_value_heads, 0, attention.head_dim),) * 2

    def keys_values(self, memory: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> keys and values [B, heads, T, head_dim]."""
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
    """The cell of `config.feedback_type`; feedback through the `memory` has a transformer cell of its own."""
    if config.feedback_connection == "memory" and config.feedback_signal != "none":
        return MemoryTransformerCell(config)
    return CELLS[config.feedback_type](config)
