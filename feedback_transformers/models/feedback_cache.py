"""The cache that a feedback network keeps between calls, and the context that each part sees of its positions.

Shapes: B batch, T positions of this call, P positions before it, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache


class Slot(NamedTuple):
    """Place in a cache: whose, in which pass, and what within that part."""

    part: str = ""  # encoder, cell, decoder or signal
    step: int | str = ""  # number of a pass; "last" where only the last one is kept, "shared" where all share one
    within: tuple[int | str, ...] = ()  # level, layer

    @lru_cache(maxsize=4096)  # noqa: B019  (a slot is a value, and there are few)
    def inner(self, *names: int | str) -> Slot:
        """Return the slot of something within this part."""
        return self._replace(within=(*self.within, *names))

    def before(self) -> Slot:
        """Return the same slot of the pass before."""
        return self._replace(step=int(self.step) - 1)

    @lru_cache(maxsize=4096)  # noqa: B019
    def key(self) -> str:
        """Name the slot, as `cell/2/0/`: what exporters save of a cache is JSON, whose keys are strings."""
        return "".join(f"{name}/" for name in (self.part, self.step, *self.within) if name != "")


class PositionState(NamedTuple):
    """What a model without attention knows of the positions it has read: all that the next one needs."""

    length: int  # columns seen, padding included
    seen: Tensor  # [B] real positions
    states: tuple[tuple[str, tuple[Tensor, ...]], ...]  # of each recurrent part, with the name of its slot


def wide(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 where it has that: the precision of states and of probabilities to stop."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rewinder(*caches: Cache | None) -> Callable[[], None]:
    """Return a function that takes caches back to what they hold now, so that a recomputed step finds the same."""

    def copied(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: [copy.copy(item) for item in value] if isinstance(value, list) else copy.copy(value)
            for name, value in values.items()
            if isinstance(value, (list, dict))
        }

    held = [(vars(cache), copied(vars(cache))) for cache in caches if cache is not None]

    def rewind() -> None:
        for now, then in held:
            now.update(copied(then))

    return rewind


class FeedbackCache(Cache):
    """Cache of keys and values by slot (part, step, layer), of recurrent states by slot, and of padding.

    A layer that runs at several steps has a slot for each, through a small view of this cache (`KeyValueSlots`).
    States are replaced and never written in place, so that gradients flow through them.
    """

    is_compileable = False

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.slots: dict[str, int] = {}
        self.states: dict[str, tuple[Tensor, ...]] = {}
        self.cross_attention: EncoderDecoderCache | None = None  # keys and values of the source of a target
        self.length = 0  # columns seen, padding included
        self.count: Tensor | None = None  # [B] real positions seen
        self.key_mask: Tensor | None = None  # [B, P] which columns are real; None where all are
        # Number of passes that filled the cache, whether each was decoded, and whether they shared slots.
        self.steps: tuple[int, bool, bool] | None = None

    def restore(self, state: PositionState) -> None:
        """Go on from a state."""
        self.length, self.count, states = state
        self.states = {slot: tuple(kept) for slot, kept in states}

    def position_state(self) -> PositionState:
        """Return the state of the positions read, without keys and values."""
        return PositionState(self.length, cast(Tensor, self.count), tuple(self.states.items()))

    def index(self, slot: Slot) -> int:
        """Return the number of a slot's layer; a new slot gets the next number."""
        return self.slots.setdefault(slot.key(), len(self.slots))

    def keys_values(self, slot: Slot) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values [B, heads, P, head_dim] of a slot, or None where nothing was written."""
        index = self.slots.get(slot.key())
        if index is None or index >= len(self.layers) or not self.layers[index].is_initialized:
            return None
        layer: Any = self.layers[index]
        return layer.keys, layer.values

    def crop_slot(self, slot: Slot, length: int) -> None:
        """Keep the first `length` columns of a slot."""
        if self.keys_values(slot) is not None:
            layer: Any = self.layers[self.index(slot)]
            layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]

    def repeat_pass(self, before: Slot, slot: Slot, offset: int) -> None:
        """Copy what the pass `before` wrote from column `offset` on to the pass `slot`, as if it had been repeated."""
        old, new = before.key(), slot.key()
        for known, index in list(self.slots.items()):
            layer: Any = self.layers[index]
            if known.startswith(old) and layer.is_initialized:
                index = self.slots.setdefault(new + known.removeprefix(old), len(self.slots))
                self.update(layer.keys[:, :, offset:], layer.values[:, :, offset:], index)
        for known in [known for known in self.states if known.startswith(old)]:
            self.states[new + known.removeprefix(old)] = self.states[known]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of columns seen, padding included."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: the cache grows without a limit."""
        return -1

    def advance(self, context: Context, keep_mask: bool) -> None:
        """Count the positions of a finished call; keep its mask where attention must know the padding later."""
        batch, columns = context.position_ids.shape
        if keep_mask and (self.key_mask is not None or context.mask is not None):
            device = context.position_ids.device
            past = torch.ones(batch, self.length, dtype=torch.bool, device=device)
            now = torch.ones(batch, columns, dtype=torch.bool, device=device)
            past = past if self.key_mask is None else self.key_mask
            self.key_mask = torch.cat([past, now if context.mask is None else context.mask], dim=1)
        self.length += columns
        self.count = context.count + (columns if context.lengths is None else context.lengths)

    def num_bytes(self) -> int:
        """Return the memory of keys, values and states, in bytes."""
        kept = [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        kept += [t for state in self.states.values() for t in state]
        return sum(t.numel() * t.element_size() for t in kept)

    def detach(self) -> None:
        """Cut the gradient through keys, values and states."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        self.states = {slot: tuple(t.detach() for t in state) for slot, state in self.states.items()}

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.states, self.slots, self.layers = {}, {}, []
        self.length, self.count, self.key_mask, self.cross_attention, self.steps = 0, None, None, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ValueError: tokens can't be taken back, as states keep no history."""
        raise ValueError(
            "A feedback cache can't be cropped, since its states keep no history: leave past_key_values out and read "
            "the shorter text anew, or keep a copy.deepcopy of the cache from before."
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in the order of beam_idx [B]."""
        self._each_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._each_batch(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these numbers."""
        self._each_batch(lambda t: t[indices.to(t.device)])

    def _each_batch(self, change: Callable[[Tensor], Tensor]) -> None:
        layers: list[Any] = list(self.layers)
        if self.cross_attention is not None:
            layers += self.cross_attention.cross_attention_cache.layers
        for layer in layers:
            if layer.is_initialized:
                layer.keys, layer.values = change(layer.keys), change(layer.values)
        self.states = {slot: tuple(change(t) for t in state) for slot, state in self.states.items()}
        self.count = None if self.count is None else change(self.count)
        self.key_mask = None if self.key_mask is None else change(self.key_mask)


@dataclass
class KeyValueSlots:
    """View of the cache for a borrowed layer, whose `update` goes to its own slot within `slot`.

    Where `running` [B, T] is False, a position stopped at an earlier step, and others go on to see its keys and values
    of then. With `overwrites`, all steps share one slot, and each replaces what the step before wrote from column
    `offset` on.
    """

    cache: FeedbackCache
    slot: Slot
    shared: tuple[Tensor, Tensor] | None = None  # keys and values of a memory that all layers read
    running: Tensor | None = None
    overwrites: bool = False
    offset: int = 0

    is_compileable = False

    @classmethod
    def of(cls, context: Context, overwrites: bool = False) -> KeyValueSlots | None:
        """Return the view for the slot of a context, or None without a cache."""
        if context.cache is None:
            return None
        return cls(context.cache, context.slot, None, context.running, overwrites, context.offset)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, heads, T, head_dim] of this call, and return all of the slot."""
        if self.shared is not None:
            return torch.cat([self.shared[0], keys], dim=-2), torch.cat([self.shared[1], values], dim=-2)
        if self.running is not None:
            before = self.shared_slot if self.overwrites else self.slot.before()
            old_keys, old_values = self.cache.keys_values(before.inner(layer_idx)) or (keys, values)
            running, length = self.running[:, None, :, None], keys.shape[2]
            keys = torch.where(running, keys, old_keys[:, :, -length:])
            values = torch.where(running, values, old_values[:, :, -length:])
        if self.overwrites:
            slot = self.shared_slot.inner(layer_idx)
            self.cache.crop_slot(slot, self.offset)
            return self.cache.update(keys, values, self.cache.index(slot))
        return self.cache.update(keys, values, self.cache.index(self.slot.inner(layer_idx)))

    @property
    def shared_slot(self) -> Slot:
        """Slot that all passes of a part share."""
        return self.slot._replace(step="shared")


@dataclass
class MaskSizes:
    """Stand-in for a cache that tells the mask functions of transformers where the queries begin."""

    offset: int
    is_compileable = False

    def get_query_offset(self, layer_idx: int | None = None) -> int:
        return self.offset

    def get_mask_sizes(self, query_length: int, layer_idx: int | None = None) -> tuple[int, int]:
        return self.offset + query_length, 0


@dataclass
class Context:
    """Positions [B, T] of a call, or a slice of them, as the parts of the model see them.

    Real positions come first and padding last (see `first_real` in feedback_padding.py), so padding can reach a real
    position only through what a cache holds from earlier calls, which `key_mask` marks.
    """

    position_ids: Tensor  # [B, T]
    count: Tensor  # [B] real positions before this call
    offset: int = 0  # P
    mask: Tensor | None = None  # [B, T], True where real; None where all are
    key_mask: Tensor | None = None  # [B, P + T], True where real; None where all are
    cache: FeedbackCache | None = None
    slot: Slot = Slot()
    running: Tensor | None = None  # [B, T], False where a position stopped at an earlier step
    grid: tuple[int, ...] = ()  # whose cells the positions are, in the order in which they were given
    order: Tensor | None = None  # [B, T] the given places of the positions, real ones first; None where they are alike
    blocks: Tensor | None = None  # [B, T], 0 for positions that see each other on both sides, -1 for others
    source: Tensor | None = None  # [B, S, D] the encoded source of a sequence-to-sequence model
    source_mask: Tensor | None = None  # [B, S]
    cross_attention: EncoderDecoderCache | None = None  # keys and values of the source, computed once a text
    memo: dict[Any, Any] = field(default_factory=dict)  # masks and rotary tables, made once for these positions
    iterations: list[int] = field(default_factory=list)  # of Newton's method in this call, one number a layer

    def for_part(self, part: str, step: int | str = "", *within: int | str) -> Context:
        """Return the context of the same positions for a part, in a pass."""
        other = object.__new__(Context)  # without __init__, as each layer of each pass asks for one
        other.__dict__.update(self.__dict__)
        other.slot = Slot(part, step, within)
        return other

    def within(self, *names: int | str) -> Context:
        """Return the context of the same positions for a level or a layer of this part."""
        return self.for_part(self.slot.part, self.slot.step, *self.slot.within, *names)

    def span(self, start: int, stop: int) -> Context:
        """Return the context of the positions from `start` to `stop` of this call."""
        return replace(
            self,
            position_ids=self.position_ids[:, start:stop],
            offset=self.offset + start,
            mask=None if self.mask is None else self.mask[:, start:stop],
            key_mask=None if self.key_mask is None else self.key_mask[:, : self.offset + stop],
            memo={},
        )

    def state(self) -> tuple[Tensor, ...] | None:
        """Return what the part at this slot kept from an earlier call, or None."""
        return None if self.cache is None else self.cache.states.get(self.slot.key())

    def keep(self, state: tuple[Tensor, ...]) -> None:
        """Keep a state for the next call at this slot."""
        if self.cache is not None:
            self.cache.states[self.slot.key()] = tuple(state)

    def rewinder(self) -> Callable[[], None]:
        """Return a function that undoes what is written to the caches from now on."""
        source = self.cross_attention
        return rewinder(self.cache, source, None if source is None else source.cross_attention_cache)

    @property
    def lengths(self) -> Tensor | None:
        """Number of real positions in each row, [B]; None where all are real."""
        return None if self.mask is None else self.mask.sum(dim=1)
