"""Recurrences compiled for the CPU by numba; feedback_fused.py makes them functions of autograd.

Each kernel walks the positions once, one row of the batch after the other, and LLVM vectorises its inner loop over the
channels. For that, all arrays are slices that begin at zero (LLVM must rule out negative indices), and exp is written
out, since libm's is not vectorised. One thread is enough: most of the time goes to the projections, which are matrix
products.

Imported only where numba is installed (`pip install feedback_transformers[fast]`).

Shapes: B batch, T positions, D hidden size. All arrays are contiguous float32, masks [B, T] bool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import numba
    import numpy as np
    from llvmlite import ir
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError("The compiled recurrences need numba: pip install numba.") from error

Array = Any
Scalar = Any


def compiled(function: Callable) -> Any:
    """Compile a function; NaN and infinity pass as in torch. The result is kept on disk where that can be written."""
    options: dict[str, Any] = {"nogil": True, "fastmath": {"contract"}, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the folder of this file nor the user's cache can be written
        return numba.njit(**options)(function)


@intrinsic
def bits_of(context: Any, x: Scalar) -> Any:
    """Return the int32 of the same bits as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return numba.types.int32(numba.types.float32), generate


@intrinsic
def float_of(context: Any, bits: Scalar) -> Any:
    """Return the float32 of the same bits as an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return numba.types.float32(numba.types.int32), generate


# Cephes' expf: e^x = 2^n e^r with |r| <= ln(2) / 2, a polynomial for e^r, and n added to the exponent's bits.
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
LIMIT = np.float32(87)  # beyond e^87 a gate is 0 or 1
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUND = np.float32(1.5 * 2**23)  # x + ROUND is rounded to an integer, which stands in its last bits
C0, C1, C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
C3, C4, C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
MANTISSA, EXPONENT_OF_ONE = np.int32(23), np.int32(127 << 23)


@compiled
def exp(x: Scalar) -> Scalar:
    """Return e^x within 1e-7, relative; x is clamped to ±87, and NaN stays."""
    x = LIMIT if x > LIMIT else x
    x = -LIMIT if x < -LIMIT else x
    shifted = x * LOG2_E + ROUND
    n = shifted - ROUND
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = ((((C0 * r + C1) * r + C2) * r + C3) * r + C4) * r + C5
    return (p * r * r + r + ONE) * float_of((bits_of(shifted) << MANTISSA) + EXPONENT_OF_ONE)  # type: ignore[call-arg]


@compiled
def sigmoid(x: Scalar) -> Scalar:
    return ONE / (ONE + exp(-x))


@compiled
def tanh(x: Scalar) -> Scalar:
    return TWO / (ONE + exp(-TWO * x)) - ONE


# h_t = a_t ∘ h_{t-1} + b_t


@compiled
def linear_forward(a: Array, b: Array, start: Array, reverse: bool, h: Array) -> None:
    """Write h [B, T, D] from a and b [B, T, D] and start [B, D]."""
    batch, length, size = h.shape
    for row in range(batch):
        before = start[row]
        for i in range(length):
            t = length - 1 - i if reverse else i
            a_t, b_t, h_t = a[row, t], b[row, t], h[row, t]
            for d in range(size):
                h_t[d] = a_t[d] * before[d] + b_t[d]
            before = h_t


@compiled
def linear_backward(
    grad: Array, a: Array, start: Array, h: Array, reverse: bool, grad_a: Array, grad_b: Array, carry: Array
) -> None:
    """Write the gradients of a and b; carry [B, D] begins at zero and becomes the gradient of start."""
    batch, length, size = h.shape
    for row in range(batch):
        c = carry[row]
        for i in range(length - 1, -1, -1):
            t = length - 1 - i if reverse else i
            before = start[row] if i == 0 else h[row, t + 1 if reverse else t - 1]
            g, a_t, grad_a_t, grad_b_t = grad[row, t], a[row, t], grad_a[row, t], grad_b[row, t]
            for d in range(size):
                dh = g[d] + c[d]
                grad_b_t[d] = dh
                grad_a_t[d] = dh * before[d]
                c[d] = dh * a_t[d]


# The GRU of diagonal matrices


@compiled
def diagonal_gru_forward(gates: Array, weight: Array, start: Array, mask: Array, reverse: bool, h: Array) -> None:
    """Write h [B, T, D] from gates [B, T, 3D], weight [3, D] and start [B, D]."""
    batch, length, size = h.shape
    weight_r, weight_z, weight_n = weight[0], weight[1], weight[2]
    for row in range(batch):
        before = start[row]
        for i in range(length):
            t = length - 1 - i if reverse else i
            x, h_t = gates[row, t], h[row, t]
            x_r, x_z, x_n = x[:size], x[size : 2 * size], x[2 * size :]
            if mask[row, t]:
                for d in range(size):
                    p = before[d]
                    r = sigmoid(x_r[d] + weight_r[d] * p)
                    z = sigmoid(x_z[d] + weight_z[d] * p)
                    n = tanh(x_n[d] + r * (weight_n[d] * p))
                    h_t[d] = n + z * (p - n)
            else:
                h_t[:] = before
            before = h_t


@compiled
def diagonal_gru_backward(
    grad: Array,
    gates: Array,
    weight: Array,
    start: Array,
    mask: Array,
    reverse: bool,
    h: Array,
    grad_gates: Array,
    grad_weight: Array,
    carry: Array,
) -> None:
    """Write all gradients; grad_weight [B, 3, D] and carry [B, D], which becomes that of start, begin at zero.

    r, z and n are computed again, which is faster than reading them from memory.
    """
    batch, length, size = h.shape
    weight_r, weight_z, weight_n = weight[0], weight[1], weight[2]
    for row in range(batch):
        c = carry[row]
        grad_r, grad_z, grad_n = grad_weight[row, 0], grad_weight[row, 1], grad_weight[row, 2]
        for i in range(length - 1, -1, -1):
            t = length - 1 - i if reverse else i
            before = start[row] if i == 0 else h[row, t + 1 if reverse else t - 1]
            g, x, dx = grad[row, t], gates[row, t], grad_gates[row, t]
            x_r, x_z, x_n = x[:size], x[size : 2 * size], x[2 * size :]
            dx_r, dx_z, dx_n = dx[:size], dx[size : 2 * size], dx[2 * size :]
            if mask[row, t]:
                for d in range(size):
                    p, dh = before[d], g[d] + c[d]
                    r = sigmoid(x_r[d] + weight_r[d] * p)
                    z = sigmoid(x_z[d] + weight_z[d] * p)
                    n = tanh(x_n[d] + r * (weight_n[d] * p))
                    dn = dh * (ONE - z) * (ONE - n * n)
                    dz = dh * (p - n) * z * (ONE - z)
                    dr = dn * (weight_n[d] * p) * r * (ONE - r)
                    dx_r[d], dx_z[d], dx_n[d] = dr, dz, dn
                    grad_r[d] += dr * p
                    grad_z[d] += dz * p
                    grad_n[d] += dn * r * p
                    c[d] = dh * z + dr * weight_r[d] + dz * weight_z[d] + dn * r * weight_n[d]
            else:
                dx[:] = 0
                for d in range(size):
                    c[d] += g[d]


# minGRU: the linear scan together with its coefficients


@compiled
def candidate(x: Scalar) -> Scalar:
    return x + HALF if x >= ZERO else sigmoid(x)


@compiled
def min_gru_forward(gates: Array, start: Array, mask: Array, reverse: bool, h: Array) -> None:
    """Write h [B, T, D] from gates [B, T, 2D] and start [B, D]."""
    batch, length, size = h.shape
    for row in range(batch):
        before = start[row]
        for i in range(length):
            t = length - 1 - i if reverse else i
            x, h_t = gates[row, t], h[row, t]
            x_n, x_z = x[:size], x[size:]
            if mask[row, t]:
                for d in range(size):
                    h_t[d] = before[d] + sigmoid(x_z[d]) * (candidate(x_n[d]) - before[d])
            else:
                h_t[:] = before
            before = h_t


@compiled
def min_gru_backward(
    grad: Array, gates: Array, start: Array, mask: Array, reverse: bool, h: Array, grad_gates: Array, carry: Array
) -> None:
    """Write the gradient of the gates; carry [B, D] begins at zero and becomes the gradient of start."""
    batch, length, size = h.shape
    for row in range(batch):
        c = carry[row]
        for i in range(length - 1, -1, -1):
            t = length - 1 - i if reverse else i
            before = start[row] if i == 0 else h[row, t + 1 if reverse else t - 1]
            g, x, dx = grad[row, t], gates[row, t], grad_gates[row, t]
            x_n, x_z, dx_n, dx_z = x[:size], x[size:], dx[:size], dx[size:]
            if mask[row, t]:
                for d in range(size):
                    dh, z, n = g[d] + c[d], sigmoid(x_z[d]), candidate(x_n[d])
                    dx_z[d] = dh * (n - before[d]) * z * (ONE - z)
                    dx_n[d] = dh * z * (ONE if x_n[d] >= ZERO else n * (ONE - n))
                    c[d] = dh * (ONE - z)
            else:
                dx[:] = 0
                for d in range(size):
                    c[d] += g[d]


# The GRU: the elementwise part of one step, between matrix products


@compiled
def gru_forward(gates: Array, projected: Array, mask: Array, t: int, state: Array, h: Array, saved: Array) -> None:
    """Step state [B, D] to position t, from gates [B, T, 3D] and projected = U h_{t-1} [B, 3D].

    Also writes h [B, T, D] and saved = (r, z, n, U_n h_{t-1}) [B, T, 4D] at t.
    """
    batch, _, size = h.shape
    for row in range(batch):
        x, u, s, p, h_t = gates[row, t], projected[row], saved[row, t], state[row], h[row, t]
        x_r, x_z, x_n = x[:size], x[size : 2 * size], x[2 * size :]
        u_r, u_z, u_n = u[:size], u[size : 2 * size], u[2 * size :]
        s_r, s_z, s_n, s_u = s[:size], s[size : 2 * size], s[2 * size : 3 * size], s[3 * size :]
        if mask[row, t]:
            for d in range(size):
                r = sigmoid(x_r[d] + u_r[d])
                z = sigmoid(x_z[d] + u_z[d])
                n = tanh(x_n[d] + r * u_n[d])
                s_r[d], s_z[d], s_n[d], s_u[d] = r, z, n, u_n[d]
                p[d] = n + z * (p[d] - n)
        h_t[:] = p


@compiled
def gru_backward(
    grad: Array,
    before: Array,
    mask: Array,
    t: int,
    saved: Array,
    carry: Array,
    grad_gates: Array,
    grad_n: Array,
    grad_projected: Array,
) -> None:
    """Write the gradients of the gates at t and of U h_{t-1} [B, 3D], whose last part grad_n [B, T, D] keeps.

    before [B, T, D] is h_{t-1} at t. carry [B, D] is the gradient of h_t from later steps, and becomes that of h_{t-1}
    without the part that comes through U.
    """
    batch, _, size = before.shape
    for row in range(batch):
        g, p, s, c = grad[row, t], before[row, t], saved[row, t], carry[row]
        dx, du, kept = grad_gates[row, t], grad_projected[row], grad_n[row, t]
        s_r, s_z, s_n, s_u = s[:size], s[size : 2 * size], s[2 * size : 3 * size], s[3 * size :]
        dx_r, dx_z, dx_n = dx[:size], dx[size : 2 * size], dx[2 * size :]
        du_r, du_z, du_n = du[:size], du[size : 2 * size], du[2 * size :]
        if mask[row, t]:
            for d in range(size):
                r, z, n = s_r[d], s_z[d], s_n[d]
                dh = g[d] + c[d]
                dn = dh * (ONE - z) * (ONE - n * n)
                dz = dh * (p[d] - n) * z * (ONE - z)
                dr = dn * s_u[d] * r * (ONE - r)
                dx_r[d], dx_z[d], dx_n[d] = dr, dz, dn
                du_r[d], du_z[d], du_n[d], kept[d] = dr, dz, dn * r, dn * r
                c[d] = dh * z
        else:
            dx[:], du[:], kept[:] = 0, 0, 0
            for d in range(size):
                c[d] += g[d]
