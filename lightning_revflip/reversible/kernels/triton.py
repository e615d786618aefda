r"""What the Triton kernels of RevGRU and RevLSTM share; `cells.py` is the specification.

A program owns a block of units, consecutive in the flattened (rows, half): all their states, their
buffers and a stack of words. Ragged batches use a prefix of the units, so a unit never changes its
program. Of a unit's states c is multiplied before h, and divided after it.

Integers are int32. No intermediate result needs more, if a product is taken apart at 10 bits:

    multiply:  h * z + d     = 1024 * ((h >> 10) * z) + ((h mod 1024) * z + d)
    divide:    h * 1024 + u  = 1024 * (h // z) * z    + ((h mod z) * 1024 + u)

Forward and reverse call the same functions for gates, compiled without contraction to fused
multiply-adds, and without approximate instructions: they get the same bits, as does the compiled C
(`native.c`) and Triton's interpreter.

Pointers, for the tests that compile each kernel: `act` and everything named after a gate or a
gradient is float32, `state` and `buffer` int32 (rows, states * half), `words` int16 with the first
index of each program's stack in `start` (int64) and its height in `top` (int32), `flags` int32 (1,)
and `gate_counts` int64 (1025,). Rows of `projected` and `grad_projected` are `stride` apart; all
else is dense.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

OVERFLOW = tl.constexpr(1)
"""Flag: a stack was full, and words were lost."""
EMPTY = tl.constexpr(2)
"""Flag: a stack was empty where a word had to be taken back."""
NOT_FINITE = tl.constexpr(4)
"""Flag: a gate was computed from NaN or infinity."""
EMIT = tl.constexpr(1 << 21)
"""A word is due where b >= z * EMIT, before the multiplication."""
LOWEST = tl.constexpr(1 << 15)
"""A word is missing where b < LOWEST, after the division."""


def launch(
    kernel: Any, grid: tuple[int, ...], block: int, *tensors: Tensor, **numbers: Any
) -> None:
    """Run a kernel on the current stream of the tensors' device, without waiting for it.

    Args:
        kernel: one of this package, whose arguments are tensors, then numbers, by name.
        grid: number of programs along each axis; 0 runs nothing.
        block: elements of a program, a power of two, at least 64 on a GPU.
        tensors: in the order of the kernel's arguments; a kernel gets their first elements.
        numbers: the other arguments.
    """
    if 0 in grid:
        return
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](
            *tensors,
            **numbers,
            BLOCK=block,
            num_warps=min(4, max(1, block // 64)),
            enable_fp_fusion=False,  # the same bits from every kernel that computes a gate
        )


@triton.jit
def add(a, b):
    """Combines two elements of a sum."""
    return a + b


@triton.jit
def raise_flag(flags, flag, where):
    """Remember that something happened somewhere; the host looks once per pass."""
    tl.atomic_or(flags + where.to(tl.int32) * 0, flag, mask=where)


# --- floats -------------------------------------------------------------------------------------


@triton.jit
def rounded(x):
    """The nearest integer, ties to even, as int32: exact for float32 below 2^31."""
    lower = tl.floor(x)
    rest = x - lower
    whole = lower.to(tl.int32)
    up = (rest > 0.5) | ((rest == 0.5) & ((whole & 1) == 1))
    return whole + up.to(tl.int32)


@triton.jit
def exponential(x):
    """Exp by range reduction and a polynomial (Cephes), relative error below 1e-7."""
    x = tl.minimum(tl.maximum(x, -87.0), 87.0)
    whole = rounded(x * 1.44269504)
    n = whole.to(tl.float32)
    r = x - n * 0.693359375 + n * 2.12194440e-4
    p = 1.9875691500e-4
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = p * r * r + r + 1.0
    return p * ((whole + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    """Correct to a unit in the last place."""
    return tl.div_rn(1.0, 1.0 + exponential(-x))


@triton.jit
def tanh(x):
    """Absolute error 1e-7; the states keep no more than 2^-23 of it."""
    return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def limited(s, scale, offset, lowest):
    """A forget gate, limited from below, as an integer in 1..1023."""
    return tl.minimum(tl.maximum(rounded(s * scale + offset), lowest), 1023)


@triton.jit
def to_float(fixed, ONE: tl.constexpr):
    """Fixed point as float32, rounded once."""
    return fixed.to(tl.float32) * (1.0 / ONE)


@triton.jit
def not_finite(x):
    """Where x is NaN or infinite."""
    return ~(tl.abs(x) < float("inf"))


# --- the lossless multiplication -----------------------------------------------------------------


@triton.jit
def push(b, due, words, base, top, capacity, flags):
    """Put the low 16 bits of b where due on the stack; returns its new height."""
    at = top + tl.associative_scan(due.to(tl.int32), 0, add) - 1
    tl.store(words + base + at, (b & 0xFFFF).to(tl.int16), mask=due & (at < capacity))
    raise_flag(flags, OVERFLOW, due & (at >= capacity))
    return top + tl.reduce(due.to(tl.int32), 0, add)


@triton.jit
def pop(b, due, words, base, top, flags):
    """Put words of the stack below b where due; returns b and the new height."""
    rank = tl.associative_scan(due.to(tl.int32), 0, add)
    top = top - tl.reduce(due.to(tl.int32), 0, add)
    at = top + rank - 1
    word = tl.load(words + base + at, mask=due & (at >= 0), other=0).to(tl.int32) & 0xFFFF
    raise_flag(flags, EMPTY, due & (at < 0))
    return tl.where(due, (b << 16) | word, b), top


@triton.jit
def multiplied(h, b, z):
    """`h * z / 1024` and the buffer, from which a due word was pushed."""
    b = tl.where(b >= z * EMIT, b >> 16, b)
    quotient = b // z
    low = (h & 1023) * z + (b - quotient * z)
    return (h >> 10) * z + (low >> 10), quotient * 1024 + (low & 1023)


@triton.jit
def divided(h, b, z):
    """Undoes `multiplied`, except that a due word is not popped yet."""
    sign = h >> 31
    quotient = ((h ^ sign) // z) ^ sign  # rounded down for negative h as well
    low = (h - quotient * z) * 1024 + (b & 1023)
    extra = low // z
    return quotient * 1024 + extra, (b >> 10) * z + (low - extra * z)


@triton.jit
def units_of_program(count, half, BLOCK: tl.constexpr):
    """This program's units: row, column, and which of them exist."""
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = unit // half
    return row, unit - row * half, unit < count


@triton.jit(do_not_specialize=["count", "capacity"])
def multiply(
    state,
    gate,
    buffer,
    words,
    start,
    top,
    flags,
    count,
    half,
    capacity,
    STATES: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lossless multiplication alone, by integer gates, int32 like `state`."""
    program = tl.program_id(0)
    row, column, alive = units_of_program(count, half, BLOCK)
    at = row * STATES * half + column
    if STORE:
        base = tl.load(start + program)
        height = tl.load(top + program)
    for k in tl.static_range(STATES):
        h = tl.load(state + at + k * half, mask=alive, other=0)
        b = tl.load(buffer + at + k * half, mask=alive, other=LOWEST)
        z = tl.load(gate + at + k * half, mask=alive, other=1023)
        if STORE:
            due = b >= z * EMIT
            height = push(b, due, words, base, height, capacity, flags)
        h, b = multiplied(h, b, z)
        tl.store(state + at + k * half, h, mask=alive)
        tl.store(buffer + at + k * half, b, mask=alive)
    if STORE:
        # Once: another warp would not see a height that this one has just stored.
        tl.store(top + program, height)


@triton.jit(do_not_specialize=["count"])
def divide(
    state,
    gate,
    buffer,
    words,
    start,
    top,
    flags,
    count,
    half,
    STATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Undoes `multiply`."""
    program = tl.program_id(0)
    row, column, alive = units_of_program(count, half, BLOCK)
    at = row * STATES * half + column
    base = tl.load(start + program)
    height = tl.load(top + program)
    for i in tl.static_range(STATES):
        k = STATES - 1 - i
        h = tl.load(state + at + k * half, mask=alive, other=0)
        b = tl.load(buffer + at + k * half, mask=alive, other=LOWEST)
        z = tl.load(gate + at + k * half, mask=alive, other=1023)
        h, b = divided(h, b, z)
        b, height = pop(b, alive & (b < LOWEST), words, base, height, flags)
        tl.store(state + at + k * half, h, mask=alive)
        tl.store(buffer + at + k * half, b, mask=alive)
    tl.store(top + program, height)


@triton.jit(do_not_specialize=["blocks"])
def pack(words, start, top, packed, packed_start, blocks, BLOCK: tl.constexpr):
    """Copy each stack to where it starts among densely packed ones; grid (stacks * blocks,)."""
    program = tl.program_id(0)
    stack = program // blocks
    index = (program - stack * blocks) * BLOCK + tl.arange(0, BLOCK)
    used = index < tl.load(top + stack)
    found = tl.load(words + tl.load(start + stack) + index, mask=used)
    tl.store(packed + tl.load(packed_start + stack) + index, found, mask=used)
