"""The compiled recurrences as autograd functions, each with its exact backward.

Gradients have gradients too (create_graph=True), by the plain path in torch. Inputs are saved as they were given,
since a copy would cut the graph that second derivatives follow.

Shapes: B batch, T positions, D hidden size. All tensors are float32 on the CPU, masks [B, T] are bool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional as F

from .feedback_kernels import (
    diagonal_gru_backward,
    diagonal_gru_forward,
    gru_backward,
    gru_forward,
    linear_backward,
    linear_forward,
    min_gru_backward,
    min_gru_forward,
)


def arrays(*tensors: Tensor) -> list[Any]:
    """Return the memory of tensors, or of a copy of those inputs that are not contiguous, as numpy arrays."""
    return [tensor.detach().contiguous().numpy() for tensor in tensors]


def plain_gradients(ctx: Any, walk: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Return the gradients of walk(*inputs), which have gradients themselves: for create_graph=True.

    Each input is read through a view of its own: one may depend on another, as the state after a first call depends
    on the weight, and that way is not this function's.
    """
    with torch.enable_grad():
        views = [x.view_as(x) for x in inputs]
        needed = [view for view, need in zip(views, ctx.needs_input_grad, strict=False) if need]
        made = iter(torch.autograd.grad(walk(*views), needed, grad, create_graph=True))
    return [next(made) if need else None for _, need in zip(views, ctx.needs_input_grad, strict=False)]


def plain_walk(
    step: Callable[[Tensor, Tensor], Tensor], gates: Tensor, start: Tensor, mask: Tensor, reverse: bool
) -> Tensor:
    """Walk the positions in torch: h = step(gates of a position [B, ...], h [B, D]), kept where mask is False."""
    h, before = [], start
    for t in reversed(range(mask.shape[1])) if reverse else range(mask.shape[1]):
        before = torch.where(mask[:, t, None], step(gates[:, t], before), before)
        h.append(before)
    return torch.stack(h[::-1] if reverse else h, dim=1)


def gru_step(gates: Tensor, projected: Tensor, h: Tensor) -> Tensor:
    """Return h_t of a GRU from gates and U h_{t-1} [B, 3D], and h_{t-1} [B, D]."""
    (x_r, x_z, x_n), (u_r, u_z, u_n) = gates.chunk(3, -1), projected.chunk(3, -1)
    return torch.lerp(torch.tanh(x_n + torch.sigmoid(x_r + u_r) * u_n), h, torch.sigmoid(x_z + u_z))


class LinearScan(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, start: Tensor, reverse: bool) -> Tensor:
        h = b.new_empty(b.shape)
        linear_forward(*arrays(a, b, start), reverse, *arrays(h))
        ctx.save_for_backward(a, start, h)
        ctx.reverse = reverse
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, start, h = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient of h is a linear scan too, from the end
            first, later = (-1, a[:, :-1]) if ctx.reverse else (0, a[:, 1:])
            zeros = torch.zeros_like(start)
            coefficients = torch.cat([zeros[:, None], later] if ctx.reverse else [later, zeros[:, None]], dim=1)
            grad_h = linear_scan(coefficients, grad, zeros, not ctx.reverse)
            before = torch.cat([h[:, 1:], start[:, None]] if ctx.reverse else [start[:, None], h[:, :-1]], dim=1)
            return grad_h * before, grad_h, grad_h[:, first] * a[:, first], None
        grad_a, grad_b, carry = torch.empty_like(h), torch.empty_like(h), h.new_zeros(start.shape)
        linear_backward(*arrays(grad, a, start, h), ctx.reverse, *arrays(grad_a, grad_b, carry))
        return grad_a, grad_b, carry, None


class DiagonalGRUScan(Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, start: Tensor, mask: Tensor, reverse: bool) -> Tensor:
        h = gates.new_empty(*mask.shape, start.shape[-1])
        diagonal_gru_forward(*arrays(gates, weight, start, mask), reverse, *arrays(h))
        ctx.save_for_backward(gates, weight, start, mask, h)
        ctx.reverse = reverse
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gates, weight, start, mask, h = ctx.saved_tensors
        if torch.is_grad_enabled():

            def walk(gates: Tensor, weight: Tensor, start: Tensor) -> Tensor:
                def step(x: Tensor, h: Tensor) -> Tensor:
                    return gru_step(x, (h[:, None] * weight).flatten(1), h)

                return plain_walk(step, gates, start, mask, ctx.reverse)

            return *plain_gradients(ctx, walk, [gates, weight, start], grad), None, None
        grad_gates, carry = gates.new_empty(gates.shape), start.new_zeros(start.shape)
        grad_weight = weight.new_zeros(start.shape[0], *weight.shape)
        given = arrays(grad, gates, weight, start, mask)
        diagonal_gru_backward(*given, ctx.reverse, *arrays(h, grad_gates, grad_weight, carry))
        return grad_gates, grad_weight.sum(0), carry, None, None


class MinGRUScan(Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, start: Tensor, mask: Tensor, reverse: bool) -> Tensor:
        h = gates.new_empty(*mask.shape, start.shape[-1])
        min_gru_forward(*arrays(gates, start, mask), reverse, *arrays(h))
        ctx.save_for_backward(gates, start, mask, h)
        ctx.reverse = reverse
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gates, start, mask, h = ctx.saved_tensors
        if torch.is_grad_enabled():

            def walk(gates: Tensor, start: Tensor) -> Tensor:
                x_n, x_z = gates.chunk(2, -1)
                z = torch.sigmoid(x_z) * mask[..., None]
                n = torch.where(x_n >= 0, x_n + 0.5, torch.sigmoid(x_n))
                return linear_scan(1 - z, z * n, start, ctx.reverse)

            return *plain_gradients(ctx, walk, [gates, start], grad), None, None
        grad_gates, carry = gates.new_empty(gates.shape), start.new_zeros(start.shape)
        given = arrays(grad, gates, start, mask)
        min_gru_backward(*given, ctx.reverse, *arrays(h, grad_gates, carry))
        return grad_gates, carry, None, None


class GRUScan(Function):
    """The gradient of U is one product after the walk, where torch's backward adds up one for each step."""

    @staticmethod
    def forward(
        ctx: Any, gates: Tensor, weight: Tensor, bias: Tensor, start: Tensor, mask: Tensor, reverse: bool
    ) -> Tensor:
        (batch, length), size = mask.shape, start.shape[-1]
        state = start.clone(memory_format=torch.contiguous_format)
        h, saved = gates.new_empty(batch, length, size), gates.new_empty(batch, length, 4 * size)
        projected, transposed = gates.new_empty(batch, 3 * size), weight.t().contiguous()
        gates_, projected_, mask_, state_, h_, saved_ = arrays(gates, projected, mask, state, h, saved)
        for t in reversed(range(length)) if reverse else range(length):
            torch.addmm(bias, state, transposed, out=projected)
            gru_forward(gates_, projected_, mask_, t, state_, h_, saved_)
        ctx.save_for_backward(gates, weight, bias, start, mask, h, saved)
        ctx.reverse = reverse
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gates, weight, bias, start, mask, h, saved = ctx.saved_tensors
        if torch.is_grad_enabled():

            def walk(gates: Tensor, weight: Tensor, bias: Tensor, start: Tensor) -> Tensor:
                def step(x: Tensor, h: Tensor) -> Tensor:
                    return gru_step(x, F.linear(h, weight, bias), h)

                return plain_walk(step, gates, start, mask, ctx.reverse)

            return *plain_gradients(ctx, walk, [gates, weight, bias, start], grad), None, None
        (batch, length), size = mask.shape, start.shape[-1]
        before = torch.cat([h[:, 1:], start[:, None]] if ctx.reverse else [start[:, None], h[:, :-1]], dim=1)
        carry, grad_projected = h.new_zeros(batch, size), h.new_empty(batch, 3 * size)
        grad_gates, grad_n = h.new_empty(batch, length, 3 * size), torch.empty_like(h)
        given = arrays(grad, before, mask)
        made = arrays(saved, carry, grad_gates, grad_n, grad_projected)
        for t in range(length) if ctx.reverse else reversed(range(length)):
            gru_backward(*given, t, *made)
            carry.addmm_(grad_projected, weight)
        before, grad_rz, grad_n = before.flatten(0, 1), grad_gates.flatten(0, 1)[:, : 2 * size], grad_n.flatten(0, 1)
        grad_weight = torch.cat([grad_rz.t() @ before, grad_n.t() @ before])
        return grad_gates, grad_weight, torch.cat([grad_rz.sum(0), grad_n.sum(0)]), carry, None, None


# What feedback_scan calls, beside the same in plain torch


def linear_scan(a: Tensor, b: Tensor, start: Tensor, reverse: bool = False) -> Tensor:
    """Solve h_t = a_t ∘ h_{t-1} + b_t: a and b [B, T, D], start [B, D] -> h [B, T, D]."""
    return LinearScan.apply(a, b, start, reverse)


def diagonal_gru(gates: Tensor, weight: Tensor, start: Tensor, mask: Tensor | None, reverse: bool) -> Tensor:
    """Run a diagonal GRU: gates [B, T, 3D], weight [3, D], start [B, D] -> h [B, T, D].

    h stays where mask is False.
    """
    return DiagonalGRUScan.apply(gates, weight, start, everywhere(gates) if mask is None else mask, reverse)


def min_gru(gates: Tensor, start: Tensor, mask: Tensor | None, reverse: bool) -> Tensor:
    """Run a minGRU: gates [B, T, 2D], start [B, D] -> h [B, T, D]; h stays where mask is False."""
    return MinGRUScan.apply(gates, start, everywhere(gates) if mask is None else mask, reverse)


def gru(gates: Tensor, weight: Tensor, bias: Tensor, start: Tensor, mask: Tensor | None, reverse: bool) -> Tensor:
    """Run a GRU: gates [B, T, 3D], weight [3D, D], bias [3D], start [B, D] -> h [B, T, D].

    h stays where mask is False.
    """
    return GRUScan.apply(gates, weight, bias, start, everywhere(gates) if mask is None else mask, reverse)


def everywhere(gates: Tensor) -> Tensor:
    """Return a mask [B, T] without padding."""
    return torch.ones(gates.shape[:2], dtype=torch.bool)


KERNELS: dict[str, Callable[..., Tensor]] = {
    "linear_scan": linear_scan,
    "diagonal_gru": diagonal_gru,
    "min_gru": min_gru,
    "gru": gru,
}
