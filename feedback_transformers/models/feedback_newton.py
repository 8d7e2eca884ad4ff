"""Newton's method over all positions at once, for recurrences whose channels do not read each other.

The states of all positions solve h = F(h) with F(h)_t = f(x_t, h_{t-1}). One step of Newton replaces f by its
linearization, which is a linear scan (DEER, Lim et al. 2023, arXiv:2309.12252; ParaRNN with diagonal Jacobians,
Danieli et al. 2025, arXiv:2510.21450). After k steps the first k positions are exact. Where the recurrence contracts,
a few steps are enough for all positions.

Shapes: B batch, T positions, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from transformers.utils import logging

from .feedback_cache import wide
from .feedback_scan import GRU, DiagonalGRU, GRUState, MinGRU, Recurrence, last, linear_scan, scan

logger = logging.get_logger(__name__)


def newton(
    cell: Recurrence,
    x: Tensor,
    state: GRUState,
    mask: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 32,
) -> tuple[Tensor, GRUState, int]:
    """Compute `scan` by Newton's method; return h [B, T, D], the last state, and the number of iterations.

    It stops when the residual |F(h) - h| is nowhere above `tolerance` times the largest state, or times 1 if that is
    larger. If it has not stopped after `max_iterations`, the positions are walked one by one instead, with a warning.
    Raises ValueError for other recurrences than DiagonalGRU and MinGRU.
    """
    if not isinstance(cell, (DiagonalGRU, MinGRU)):
        raise ValueError("Newton's method needs a recurrence of single channels: use diagonal_gru or min_gru.")
    gates = wide(cell.input_proj(x))
    solved = solve(cell, gates.detach(), state.h.detach(), mask, tolerance, max_iterations)
    if solved is None:
        logger.warning_once(
            f"Newton's method did not converge in {max_iterations} iterations, so positions are walked one by one: "
            "raise solver_tolerance, or use the sequential solver."
        )
        return *scan(cell, x, state, mask), max_iterations
    h, jacobian, iterations = solved
    h = ImplicitGradient.apply(one_step(cell, gates, before(h, state.h), mask), jacobian)
    return h.to(x.dtype), GRUState(last(h, reverse=False)), iterations


@torch.no_grad()
def solve(
    cell: GRU, gates: Tensor, start: Tensor, mask: Tensor | None, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, int] | None:
    """Return h, the diagonal of the Jacobian there, both [B, T, D], and the number of iterations; None without
    convergence.

    A step that makes the residual grow is followed by a step h = F(h), whose states stay in bounds by the gates. The
    next step of Newton then clips slopes to ±1, so that errors don't grow from position to position.
    """
    h = start[:, None].expand(-1, gates.shape[1], -1)
    made, jacobian = linearize(cell, gates, before(h, start), mask)
    residual, bound = (made - h).abs().max(), float("inf")
    for iteration in range(max_iterations + 1):
        if residual <= tolerance * h.abs().max().clamp(min=1.0):
            return h, jacobian, iteration
        jacobian = jacobian.clamp(-bound, bound)
        h = linear_scan(jacobian, made - jacobian * before(h, start), start)
        made, jacobian = linearize(cell, gates, before(h, start), mask)
        grew, bound = not (made - h).abs().max() < residual, float("inf")
        if grew:
            h, bound = made.nan_to_num(0.0, 0.0, 0.0), 1.0
            made, jacobian = linearize(cell, gates, before(h, start), mask)
        residual = (made - h).abs().max()
    return None


def before(h: Tensor, start: Tensor) -> Tensor:
    """Return the state that each position reads, [B, T, D], from h [B, T, D] and the state before them [B, D]."""
    return torch.cat([start[:, None], h[:, :-1]], dim=1)


def one_step(cell: GRU, gates: Tensor, previous: Tensor, mask: Tensor | None) -> Tensor:
    """Make one step at all positions in parallel, each from its own previous state; return h [B, T, D]."""
    h = cell.step(gates, GRUState(previous)).h
    return h if mask is None else torch.where(mask[..., None], h, previous)


def linearize(cell: GRU, gates: Tensor, previous: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return F and the diagonal of its Jacobian, each [B, T, D], which is the gradient of the sum of F."""
    own = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)  # checkpointing would recompute for it
    with torch.enable_grad(), own:
        previous = previous.detach().requires_grad_()
        h = one_step(cell, gates, previous, mask)
        (jacobian,) = torch.autograd.grad(h.sum(), previous)
    return h.detach(), jacobian


class ImplicitGradient(Function):
    """Return F(h) at the solution h as it is, and turn its gradient into the gradient of the solution.

    By the implicit function theorem that is λ with λ_t = g_t + J_{t+1} ∘ λ_{t+1}, a scan from the end. Second
    derivatives would need J as a function of the weights, so they are refused.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, jacobian: Tensor) -> Tensor:
        ctx.save_for_backward(jacobian)
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "Second derivatives don't go through solver='newton': set config.solver='sequential', which computes "
                "the same."
            )
        (jacobian,) = ctx.saved_tensors
        end = torch.zeros_like(grad[:, 0])
        return linear_scan(torch.cat([jacobian[:, 1:], end[:, None]], dim=1), grad, end, reverse=True), None
