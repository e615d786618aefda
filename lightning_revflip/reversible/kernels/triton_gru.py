"""Half-steps of RevGRU in Triton; two kernels each, with a matrix product between them.

`act` is what the product of the other half with the weights of r and z filled, rows of 2 * half;
`candidate` that of r * other with the weights of g, rows of half. Kernels replace both by the
activations: r at once, z and g in the reverse kernel, for the gradient. Rows of `projected` are
[r | z | g]. See `triton.py` for the other pointers.
"""

import triton
import triton.language as tl

from lightning_revflip.reversible.kernels.triton import (
    EMIT,
    LOWEST,
    NOT_FINITE,
    divided,
    limited,
    multiplied,
    not_finite,
    pop,
    push,
    raise_flag,
    rounded,
    sigmoid,
    tanh,
    to_float,
    units_of_program,
)


@triton.jit(do_not_specialize=["count"])
def gru_reset(act, projected, other, reset_other, count, half, stride, BLOCK: tl.constexpr):
    """r, in place of its pre-activation, and r * other."""
    row, column, alive = units_of_program(count, half, BLOCK)
    at = row * half + column
    act += row * 2 * half + column
    x = tl.load(act, mask=alive, other=0.0)
    x += tl.load(projected + row * stride + column, mask=alive, other=0.0)
    # NaN passes through the next product and reaches the kernel that raises the flag.
    r = tl.where(not_finite(x), float("nan"), sigmoid(x))
    tl.store(act, r, mask=alive)
    tl.store(reset_other + at, r * tl.load(other + at, mask=alive, other=0.0), mask=alive)


@triton.jit
def activations(act, candidate, projected, half, alive):
    """The sigmoid of z and tanh of g; and where one of them got NaN or infinity."""
    z = tl.load(act + half, mask=alive, other=0.0)
    z += tl.load(projected + half, mask=alive, other=0.0)
    g = tl.load(candidate, mask=alive, other=0.0)
    g += tl.load(projected + 2 * half, mask=alive, other=0.0)
    return sigmoid(z), tanh(g), not_finite(z) | not_finite(g)


@triton.jit
def update(z, g, ONE: tl.constexpr):
    """(1 - z) * g in fixed point."""
    return rounded((1.0 - z.to(tl.float32) * (1.0 / 1024.0)) * g * ONE)


@triton.jit(do_not_specialize=["count", "capacity", "kept"])
def gru_forward(
    act,
    candidate,
    projected,
    state,
    buffer,
    words,
    start,
    top,
    flags,
    gate_counts,
    new_h,
    count,
    half,
    stride,
    capacity,
    scale,
    offset,
    lowest,
    kept,
    ONE: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A half-step, h <- z * h + (1 - z) * g; new_h is h as floats.

    The gates of the first `kept` units are not counted.
    """
    row, column, alive = units_of_program(count, half, BLOCK)
    at = row * half + column
    act += row * 2 * half + column
    projected += row * stride + column
    s, g, bad = activations(act, candidate + at, projected, half, alive)
    raise_flag(flags, NOT_FINITE, bad)
    z = limited(s, scale, offset, lowest)
    counted = alive & (column >= kept)
    tl.atomic_add(gate_counts + z, tl.full(z.shape, 1, tl.int64), mask=counted, sem="relaxed")

    h = tl.load(state + at, mask=alive, other=0)
    b = tl.load(buffer + at, mask=alive, other=LOWEST)
    if STORE:
        program = tl.program_id(0)
        base = tl.load(start + program)
        height = tl.load(top + program)
        height = push(b, alive & (b >= z * EMIT), words, base, height, capacity, flags)
        tl.store(top + program, height)
    h, b = multiplied(h, b, z)
    h += update(z, g, ONE)
    tl.store(state + at, h, mask=alive)
    tl.store(buffer + at, b, mask=alive)
    tl.store(new_h + at, to_float(h, ONE), mask=alive)


@triton.jit(do_not_specialize=["count"])
def gru_reverse(
    act,
    candidate,
    projected,
    state,
    buffer,
    words,
    start,
    top,
    flags,
    old_h,
    count,
    half,
    stride,
    scale,
    offset,
    lowest,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Undoes `gru_forward`; old_h is h as floats."""
    row, column, alive = units_of_program(count, half, BLOCK)
    at = row * half + column
    act += row * 2 * half + column
    projected += row * stride + column
    s, g, bad = activations(act, candidate + at, projected, half, alive)
    raise_flag(flags, NOT_FINITE, bad)
    z = limited(s, scale, offset, lowest)

    h = tl.load(state + at, mask=alive, other=0) - update(z, g, ONE)
    b = tl.load(buffer + at, mask=alive, other=LOWEST)
    h, b = divided(h, b, z)
    program = tl.program_id(0)
    height = tl.load(top + program)
    b, height = pop(b, alive & (b < LOWEST), words, tl.load(start + program), height, flags)
    tl.store(top + program, height)
    tl.store(state + at, h, mask=alive)
    tl.store(buffer + at, b, mask=alive)
    tl.store(act + half, s, mask=alive)
    tl.store(candidate + at, g, mask=alive)
    tl.store(old_h + at, to_float(h, ONE), mask=alive)


@triton.jit(do_not_specialize=["count"])
def gru_vjp_candidate(
    act,
    candidate,
    grad_h,
    grad_candidate,
    count,
    half,
    scale,
    offset,
    lowest,
    BLOCK: tl.constexpr,
):
    """Gradient of what went into the tanh of g."""
    row, column, alive = units_of_program(count, half, BLOCK)
    at = row * half + column
    s = tl.load(act + row * 2 * half + half + column, mask=alive, other=0.0)
    z = limited(s, scale, offset, lowest).to(tl.float32) * (1.0 / 1024.0)
    g = tl.load(candidate + at, mask=alive, other=0.0)
    grad = tl.load(grad_h + at, mask=alive, other=0.0) * (1.0 - z) * (1.0 - g * g)
    tl.store(grad_candidate + at, grad, mask=alive)


@triton.jit(do_not_specialize=["count"])
def gru_vjp_gates(
    act,
    candidate,
    old_h,
    other,
    grad_h,
    grad_candidate,
    grad_reset_other,
    grad_projected,
    grad_old_h,
    grad_other,
    count,
    half,
    stride,
    scale,
    offset,
    lowest,
    slope,
    BLOCK: tl.constexpr,
):
    """The other gradients; grad_other without the share of the product with the gate weights."""
    row, column, alive = units_of_program(count, half, BLOCK)
    at = row * half + column
    act += row * 2 * half + column
    r = tl.load(act, mask=alive, other=0.0)
    s = tl.load(act + half, mask=alive, other=0.0)
    z = limited(s, scale, offset, lowest).to(tl.float32) * (1.0 / 1024.0)
    g = tl.load(candidate + at, mask=alive, other=0.0)
    grad = tl.load(grad_h + at, mask=alive, other=0.0)
    d_reset_other = tl.load(grad_reset_other + at, mask=alive, other=0.0)
    d_r = d_reset_other * tl.load(other + at, mask=alive, other=0.0)
    d_z = grad * (tl.load(old_h + at, mask=alive, other=0.0) - g) * slope
    d_g = tl.load(grad_candidate + at, mask=alive, other=0.0)

    grad_projected += row * stride + column
    tl.store(grad_projected, d_r * r * (1.0 - r), mask=alive)
    tl.store(grad_projected + half, d_z * s * (1.0 - s), mask=alive)
    tl.store(grad_projected + 2 * half, d_g, mask=alive)
    tl.store(grad_old_h + at, grad * z, mask=alive)
    tl.store(grad_other + at, d_reset_other * r, mask=alive)
