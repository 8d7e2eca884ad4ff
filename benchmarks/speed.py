"""Measure how fast the recurrences are, forward and backward, against those of other packages.

    python -m benchmarks.speed                                # all cases
    python -m benchmarks.speed --cases min_gru-b8 gru-b8      # some

A case is timed only after its outputs and gradients were found equal to the reference. It needs the extra `bench`.

Shapes: B batch, T positions, D hidden size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from minGRU_pytorch import minGRU
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import benchmarks.speed_models  # noqa: F401  (enters its cases)
from benchmarks.timing import CASES, Result, at_least, at_most, case, ratio, run
from feedback_transformers.models.feedback_scan import RECURRENCES, scan, scan_reference

LENGTH, WIDTH = 512, 256
TORCH: dict[str, type[nn.GRU] | type[nn.LSTM]] = {"gru": nn.GRU, "lstm": nn.LSTM}


class Ours(nn.Module):
    """Run one recurrence over all positions, from a state of zero: [B, T, D] -> [B, T, D]."""

    def __init__(self, kind: str, mask: Tensor | None = None, function: Callable = scan) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.mask, self.function = RECURRENCES[kind](WIDTH), mask, function
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(WIDTH**-0.5), WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.cell, x, self.cell.initial_state(x[:, 0]), self.mask)[0]


class Torch(nn.Module):
    """Run nn.GRU or nn.LSTM, by a packed sequence where rows have `lengths` [B]: [B, T, D] -> [B, T, D]."""

    def __init__(self, kind: str, lengths: Tensor | None = None) -> None:
        super().__init__()
        self.rnn, self.lengths = TORCH[kind](WIDTH, WIDTH, batch_first=True), lengths

    def forward(self, x: Tensor) -> Tensor:
        if self.lengths is None:
            return self.rnn(x)[0]
        packed = pack_padded_sequence(x, self.lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]


def padded(batch: int) -> tuple[Tensor, Tensor]:
    """Return lengths [B] from half of LENGTH to all of it, and the mask [B, T]."""
    lengths = torch.linspace(LENGTH // 2, LENGTH, batch).long()
    return lengths, torch.arange(LENGTH) < lengths[:, None]


def training_step(module: nn.Module, batch: int) -> Callable[[], list[Tensor]]:
    """Return a forward and backward at [batch, LENGTH, WIDTH], which gives the output and all gradients."""
    torch.manual_seed(1)
    x = torch.randn(batch, LENGTH, WIDTH, requires_grad=True)
    with torch.no_grad():
        direction = torch.randn(module(x).shape)  # contiguous, whatever the strides of the output are

    def call() -> list[Tensor]:
        x.grad = None
        module.zero_grad()
        y = module(x)
        y.backward(direction)
        return [t for t in (y.detach(), x.grad, *(p.grad for p in module.parameters())) if t is not None]

    return call


def check(kind: str, batch: int, with_padding: bool = False) -> None:
    """Check that it equals the loop over positions within 1e-5, relative to the largest entry if that is over 1."""
    mask = padded(batch)[1] if with_padding else None
    actual, expected = (training_step(Ours(kind, mask, function), batch)() for function in (scan, scan_reference))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5 * max(1.0, e.abs().max().item()), rtol=0.0)


def against(kind: str, theirs: nn.Module, batch: int, mask: Tensor | None = None) -> tuple[float, dict]:
    return ratio(training_step(Ours(kind, mask), batch), training_step(theirs, batch))


# diagonal_gru


def diagonal_gru(batch: int, target: float) -> Result:
    measured = against("diagonal_gru", Torch("gru"), batch)
    return at_least(f"diagonal_gru-b{batch}", "nn.GRU", target, measured)


def diagonal_gru_projection(batch: int) -> Result:
    measured = against("diagonal_gru", nn.Linear(WIDTH, 3 * WIDTH), batch)
    return at_most(f"diagonal_gru-b{batch}-projection", "its input projection", 2.5, measured)


for size, times in ((8, 3.0), (1, 10.0)):
    correct = partial(check, "diagonal_gru", size)
    case(f"diagonal_gru-b{size}", correct)(partial(diagonal_gru, size, times))
    case(f"diagonal_gru-b{size}-projection", correct)(partial(diagonal_gru_projection, size))


# min_gru


@case("min_gru-b8", partial(check, "min_gru", 8))
def min_gru() -> Result:
    return at_least("min_gru-b8", "minGRU-pytorch", 4.0, against("min_gru", minGRU(WIDTH), 8))


# gru and lstm must never be slower. Where ours is torch's own kernel, the ratio is 1 but for the noise.


def torchs(kind: str, batch: int) -> Result:
    measured = against(kind, Torch(kind), batch)
    return at_least(f"{kind}-b{batch}", f"nn.{kind.upper()}", 0.95 if kind == "lstm" else 1.0, measured)


def torchs_padded(kind: str, batch: int) -> Result:
    lengths, mask = padded(batch)
    measured = against(kind, Torch(kind, lengths), batch, mask)
    return at_least(f"{kind}-b{batch}-padded", f"nn.{kind.upper()}, packed", 1.0, measured)


for name in TORCH:
    for size in (1, 8, 32):
        case(f"{name}-b{size}", partial(check, name, size))(partial(torchs, name, size))
    case(f"{name}-b8-padded", partial(check, name, 8, True))(partial(torchs_padded, name, 8))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    return 0 if all(result.passed for result in run(arguments.cases, arguments.threads)) else 1


if __name__ == "__main__":
    sys.exit(main())
