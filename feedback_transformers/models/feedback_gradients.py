"""Weight gradients of a loop in one matrix product, rather than one a step.

A linear layer that runs at T steps has the weight gradient Σ_t δ_t x_tᵀ. Back-propagation adds it up step by step, and
each step reads and writes the whole weight; kept back until the last of them, it is one product [out, T·B] [T·B, in].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Ledger:
    """Of one weight: inputs [N, in] and output gradients [N, out] of the steps whose backward has run."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def settle(self) -> tuple[Tensor, Tensor]:
        """The gradients [out, in] of the weight and [out] of the bias; then the ledger is empty."""
        x, gradient = torch.cat(self.inputs), torch.cat(self.gradients)
        self.inputs, self.gradients = [], []
        return gradient.t() @ x, gradient.sum(dim=0)


class Deferred(torch.autograd.Function):
    """A weight, whose gradient is what the ledger holds once the backward of all its steps has run."""

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ctx.ledger, ctx.has_bias = ledger, bias is not None
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Any) -> tuple[None, Tensor | None, Tensor | None]:
        if not ctx.ledger.inputs:
            return None, None, None
        weight, bias = ctx.ledger.settle()
        return None, weight, bias if ctx.has_bias else None


class Step(torch.autograd.Function):
    """x W^T + b at one step; its backward gives the gradient of x, and enters the rest into the ledger."""

    @staticmethod
    def forward(ctx: Any, ledger: Ledger, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.ledger = ledger
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        ctx.ledger.inputs.append(x.flatten(0, -2))
        ctx.ledger.gradients.append(gradient.flatten(0, -2))
        return None, gradient @ weight if ctx.needs_input_grad[1] else None, None, None


class DeferredWeightGradients(TorchFunctionMode):
    """Within it, the gradient of every weight that linear layers read is computed once, after that of the last step.

    It takes the place of the function linear layers end in, whatever wraps them: adapters and hooks stay in force.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[int, tuple] = {}  # by id, with the weight lest another takes its id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and self.takes(*args):
            x, weight, bias = (*args, None)[:3]
            known = self.weights.get(id(weight))
            if known is None:
                ledger = Ledger()
                known = self.weights[id(weight)] = (weight, bias, ledger, *Deferred.apply(ledger, weight, bias))
            return Step.apply(known[2], x, *known[3:])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def takes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        """A weight that is trained, not of a quantizer, and that autocast doesn't copy first."""
        return (
            torch.is_grad_enabled()
            and all(type(p) in (Tensor, nn.Parameter) and p.requires_grad for p in (weight, bias) if p is not None)
            and x.dtype == weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )
