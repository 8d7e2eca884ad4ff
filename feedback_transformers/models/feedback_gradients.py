"""Weight gradients of a loop, computed by one matrix product for all steps.

A linear layer that runs at T steps has the weight gradient Σ_t δ_t x_tᵀ. Back-propagation adds it up step by step, and
each step reads and writes the whole weight. Deferred until the last step, it is one product [out, T·B] [T·B, in].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Ledger:
    """Inputs [N, in] and output gradients [N, out] of one weight, from the steps whose backward has run."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.call = -1  # the backward pass they belong to

    def opened(self) -> Ledger:
        """Drop what an earlier backward left, which did not ask for this weight's gradient; return the ledger."""
        call = torch._C._current_graph_task_id()
        if call != self.call:
            self.call, self.inputs, self.gradients = call, [], []
        return self

    def sum_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients [out, in] of the weight and [out] of the bias, and empty the ledger."""
        x, gradient = torch.cat(self.inputs), torch.cat(self.gradients)
        self.inputs, self.gradients = [], []
        return gradient.t() @ x, gradient.sum(dim=0)


class Deferred(torch.autograd.Function):
    """Pass a weight on to its steps; its gradient is the sum of what the ledger holds after their backward, and of
    the gradients that they return themselves."""

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ctx.ledger, ctx.has_bias = ledger, bias is not None
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[None, Tensor | None, Tensor | None]:
        if not ctx.ledger.opened().inputs:
            return None, given[0], given[1]
        weight, bias = (s if g is None else s + g for s, g in zip(ctx.ledger.sum_gradients(), given, strict=True))
        return None, weight, bias if ctx.has_bias else None


class Step(torch.autograd.Function):
    """Compute x W^T + b at one step; the backward returns the gradient of x and enters the rest into the ledger.

    With create_graph=True it returns all gradients, as a linear layer does, so that they have gradients too.
    """

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.ledger = ledger
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x = gradient @ weight if ctx.needs_input_grad[1] else None
        x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        if torch.is_grad_enabled():
            return None, to_x, gradient.t() @ x, gradient.sum(dim=0) if ctx.needs_input_grad[3] else None
        ledger = ctx.ledger.opened()
        ledger.inputs.append(x.detach())
        ledger.gradients.append(gradient)
        return None, to_x, None, None


class DeferredWeightGradients(TorchFunctionMode):
    """Context in which the gradient of every weight of linear layers is computed once, after all steps.

    It replaces torch.nn.functional.linear, where linear layers end whatever wraps them, so that adapters and hooks
    stay in force.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[
            tuple[int, int], tuple
        ] = {}  # by ids of weight and bias; kept alive, so that ids stay theirs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and self.takes(*args):
            x, weight, bias = (*args, None)[:3]
            pair = id(weight), id(bias)
            known = self.weights.get(pair)
            if known is None:
                ledger = Ledger()
                known = self.weights[pair] = (weight, bias, ledger, *Deferred.apply(ledger, weight, bias))
            return Step.apply(known[2], x, *known[3:])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        """Return whether the weight is trained, plain (not of a quantizer) and not copied by autocast."""
        return (
            torch.is_grad_enabled()
            and all(type(p) in (Tensor, nn.Parameter) and p.requires_grad for p in (weight, bias) if p is not None)
            and x.dtype == weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and not torch._C._are_functorch_transforms_active()
        )
