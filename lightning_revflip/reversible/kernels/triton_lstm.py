"""Half-steps of RevLSTM in Triton: forward, reverse and vector-Jacobian product, a kernel each.

`act` is what the matrix product with the recurrent weights filled, rows of 5 * half in the order
z, p, f, o, g. The reverse kernel replaces it by the activations, for the gradient. A state's row is
[c | h]. See `triton.py` for the other pointers.
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


@triton.jit
def activations(act, projected, half, alive):
    """Sigmoids of z, p, f, o and tanh of g; and where one of them got NaN or infinity."""
    z = tl.load(act, mask=alive, other=0.0) + tl.load(projected, mask=alive, other=0.0)
    act += half
    projected += half
    p = tl.load(act, mask=alive, other=0.0) + tl.load(projected, mask=alive, other=0.0)
    act += half
    projected += half
    f = tl.load(act, mask=alive, other=0.0) + tl.load(projected, mask=alive, other=0.0)
    act += half
    projected += half
    o = tl.load(act, mask=alive, other=0.0) + tl.load(projected, mask=alive, other=0.0)
    act += half
    projected += half
    g = tl.load(act, mask=alive, other=0.0) + tl.load(projected, mask=alive, other=0.0)
    bad = not_finite(z) | not_finite(p) | not_finite(f) | not_finite(o) | not_finite(g)
    return sigmoid(z), sigmoid(p), sigmoid(f), sigmoid(o), tanh(g), bad


@triton.jit(do_not_specialize=["count", "capacity", "kept"])
def lstm_forward(
    act,
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
    """C <- z * c + f * g; h <- p * h + o * tanh(c); new_h is h as floats.

    The h of the first `kept` units is not counted.
    """
    row, column, alive = units_of_program(count, half, BLOCK)
    act += row * 5 * half + column
    s_z, s_p, f, o, g, bad = activations(act, projected + row * stride + column, half, alive)
    raise_flag(flags, NOT_FINITE, bad)
    z = limited(s_z, scale, offset, lowest)
    p = limited(s_p, scale, offset, lowest)
    tl.atomic_add(gate_counts + z, tl.full(z.shape, 1, tl.int64), mask=alive, sem="relaxed")
    counted = alive & (column >= kept)
    tl.atomic_add(gate_counts + p, tl.full(p.shape, 1, tl.int64), mask=counted, sem="relaxed")

    at_c = row * 2 * half + column
    at_h = at_c + half
    c = tl.load(state + at_c, mask=alive, other=0)
    h = tl.load(state + at_h, mask=alive, other=0)
    b_c = tl.load(buffer + at_c, mask=alive, other=LOWEST)
    b_h = tl.load(buffer + at_h, mask=alive, other=LOWEST)
    if STORE:
        program = tl.program_id(0)
        base = tl.load(start + program)
        height = tl.load(top + program)
        height = push(b_c, alive & (b_c >= z * EMIT), words, base, height, capacity, flags)
        height = push(b_h, alive & (b_h >= p * EMIT), words, base, height, capacity, flags)
        tl.store(top + program, height)
    c, b_c = multiplied(c, b_c, z)
    h, b_h = multiplied(h, b_h, p)
    c += rounded(f * g * ONE)
    h += rounded(o * tanh(to_float(c, ONE)) * ONE)
    tl.store(state + at_c, c, mask=alive)
    tl.store(state + at_h, h, mask=alive)
    tl.store(buffer + at_c, b_c, mask=alive)
    tl.store(buffer + at_h, b_h, mask=alive)
    tl.store(new_h + row * half + column, to_float(h, ONE), mask=alive)


@triton.jit(do_not_specialize=["count"])
def lstm_reverse(
    act,
    projected,
    state,
    buffer,
    words,
    start,
    top,
    flags,
    old_h,
    old_c,
    tanh_c,
    count,
    half,
    stride,
    scale,
    offset,
    lowest,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Undoes `lstm_forward`; old_h and old_c are the states as floats, tanh_c is of the new c."""
    row, column, alive = units_of_program(count, half, BLOCK)
    act += row * 5 * half + column
    s_z, s_p, f, o, g, bad = activations(act, projected + row * stride + column, half, alive)
    raise_flag(flags, NOT_FINITE, bad)
    z = limited(s_z, scale, offset, lowest)
    p = limited(s_p, scale, offset, lowest)

    at_c = row * 2 * half + column
    at_h = at_c + half
    c = tl.load(state + at_c, mask=alive, other=0)
    h = tl.load(state + at_h, mask=alive, other=0)
    b_c = tl.load(buffer + at_c, mask=alive, other=LOWEST)
    b_h = tl.load(buffer + at_h, mask=alive, other=LOWEST)
    t = tanh(to_float(c, ONE))
    h -= rounded(o * t * ONE)
    c -= rounded(f * g * ONE)
    h, b_h = divided(h, b_h, p)
    c, b_c = divided(c, b_c, z)
    program = tl.program_id(0)
    base = tl.load(start + program)
    height = tl.load(top + program)
    b_h, height = pop(b_h, alive & (b_h < LOWEST), words, base, height, flags)
    b_c, height = pop(b_c, alive & (b_c < LOWEST), words, base, height, flags)
    tl.store(top + program, height)
    tl.store(state + at_c, c, mask=alive)
    tl.store(state + at_h, h, mask=alive)
    tl.store(buffer + at_c, b_c, mask=alive)
    tl.store(buffer + at_h, b_h, mask=alive)

    tl.store(act, s_z, mask=alive)
    tl.store(act + half, s_p, mask=alive)
    tl.store(act + 2 * half, f, mask=alive)
    tl.store(act + 3 * half, o, mask=alive)
    tl.store(act + 4 * half, g, mask=alive)
    at = row * half + column
    tl.store(old_h + at, to_float(h, ONE), mask=alive)
    tl.store(old_c + at, to_float(c, ONE), mask=alive)
    tl.store(tanh_c + at, t, mask=alive)


@triton.jit(do_not_specialize=["count"])
def lstm_vjp(
    act,
    old_h,
    old_c,
    tanh_c,
    grad_h,
    grad_c,
    grad_projected,
    grad_old_h,
    grad_old_c,
    count,
    half,
    stride,
    scale,
    offset,
    lowest,
    slope,
    BLOCK: tl.constexpr,
):
    """Gradients of the projected input and of the old states from those of the new ones."""
    row, column, alive = units_of_program(count, half, BLOCK)
    act += row * 5 * half + column
    s_z = tl.load(act, mask=alive, other=0.0)
    s_p = tl.load(act + half, mask=alive, other=0.0)
    f = tl.load(act + 2 * half, mask=alive, other=0.0)
    o = tl.load(act + 3 * half, mask=alive, other=0.0)
    g = tl.load(act + 4 * half, mask=alive, other=0.0)
    z = limited(s_z, scale, offset, lowest).to(tl.float32) * (1.0 / 1024.0)
    p = limited(s_p, scale, offset, lowest).to(tl.float32) * (1.0 / 1024.0)

    at = row * half + column
    t = tl.load(tanh_c + at, mask=alive, other=0.0)
    d_h = tl.load(grad_h + at, mask=alive, other=0.0)
    d_c = tl.load(grad_c + at, mask=alive, other=0.0) + d_h * o * (1.0 - t * t)
    d_z = d_c * tl.load(old_c + at, mask=alive, other=0.0) * slope
    d_p = d_h * tl.load(old_h + at, mask=alive, other=0.0) * slope

    grad_projected += row * stride + column
    tl.store(grad_projected, d_z * s_z * (1.0 - s_z), mask=alive)
    tl.store(grad_projected + half, d_p * s_p * (1.0 - s_p), mask=alive)
    tl.store(grad_projected + 2 * half, d_c * g * f * (1.0 - f), mask=alive)
    tl.store(grad_projected + 3 * half, d_h * t * o * (1.0 - o), mask=alive)
    tl.store(grad_projected + 4 * half, d_c * f * (1.0 - g * g), mask=alive)
    tl.store(grad_old_h + at, d_h * p, mask=alive)
    tl.store(grad_old_c + at, d_c * z, mask=alive)
