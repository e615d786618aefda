"""Random numbers that are drawn from a seed, and drawn again in the backward pass.

Nothing that is as large as a weight is kept between the passes: a seed is, and everything else
follows from it. The numbers of a seed are the same in one build of torch on one kind of device;
compiled and torch path differ.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import c_uint64
from pathlib import Path

import torch
from torch import Tensor

from lightning_revflip._native import ARRAY, DOUBLE, FLOAT, SIZE, NativeLibrary

_MASK = 2**64 - 1

LIBRARY = NativeLibrary(
    Path(__file__).with_name("native.c"),
    {
        "normal": [SIZE, c_uint64, ARRAY],
        "normal_times": [SIZE, c_uint64, ARRAY, FLOAT, ARRAY],
        "gaussian": [SIZE, c_uint64, ARRAY, ARRAY],
        "gaussian_vjp": [SIZE, c_uint64, ARRAY, ARRAY, ARRAY],
        "signs": [SIZE, c_uint64, ARRAY],
        "signs_times": [SIZE, c_uint64, ARRAY, ARRAY],
        "gaussian_kl": [SIZE, ARRAY, ARRAY, FLOAT],
        "gaussian_kl_vjp": [SIZE, ARRAY, ARRAY, FLOAT, FLOAT, ARRAY, ARRAY],
        "lstm_advance": [SIZE, SIZE, *[ARRAY] * 5],
        "lstm_retreat": [SIZE, SIZE, *[ARRAY] * 5],
        "gru_advance": [SIZE, SIZE, *[ARRAY] * 4],
        "gru_retreat": [SIZE, SIZE, *[ARRAY] * 5],
    },
    {"gaussian_kl": DOUBLE, "gaussian_kl_vjp": DOUBLE},
    flags=["-ffp-contract=fast"],
    without="Flipout layers",
)


def native(*tensors: Tensor) -> bool:
    """Whether the compiled functions take these tensors."""
    return (
        all(
            tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
            for tensor in tensors
        )
        and LIBRARY.available
    )


def composing() -> bool:
    """Whether torch is transforming, compiling or tracing the running code.

    Then only torch's own operations will do: no seeds, no compiled functions, no
    `torch.autograd.Function`.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or torch._C._are_functorch_transforms_active()
    )


class NoiseSource:
    """Where the seeds of a layer come from: a generator, or torch's global one for the CPU.

    Seeds are drawn on the CPU whatever the device of the layer, so drawing one never waits for it.

    Args:
        generator: a CPU generator; None: torch's global one, which `torch.manual_seed` seeds.

    Raises:
        ValueError: for a generator of another device.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(
                f"seeds are drawn on the CPU, got a generator of {generator.device}. "
                "Use torch.Generator(), which serves layers on every device."
            )
        self.generator = generator

    def seed(self) -> int:
        """A fresh seed.

        Raises:
            RuntimeError: in a backward pass that calls the layer again, as activation checkpointing
                does: a private generator does not go back to where it was.
        """
        if self.generator is not None and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a flipout layer with a generator of its own is called in the backward pass (by "
                "activation checkpointing?), where it would draw other noise than before. Use "
                "torch's global generator (generator=None), which checkpointing restores, or the "
                "callback Flipout."
            )
        return int(torch.randint(2**62, (), generator=self.generator))

    # Generators cannot be copied; a copy of a source goes on where the original is.
    def __getstate__(self) -> tuple[Tensor | None]:
        # Not None itself, for which copy and pickle would not call `__setstate__`.
        return (None if self.generator is None else self.generator.get_state(),)

    def __setstate__(self, states: tuple[Tensor | None]) -> None:
        (state,) = states
        self.generator = None if state is None else torch.Generator().set_state(state)


def derive(seed: int, *numbers: int) -> int:
    """A seed that belongs to `seed` and some small numbers, by SplitMix64 (Steele et al., 2014)."""
    for number in numbers:
        seed = _mix((seed ^ _mix(number + 1)) & _MASK)
    return seed >> 1


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def seeded(seed: int, device: torch.device) -> torch.Generator:
    """A private generator that starts from a seed."""
    return torch.Generator(device).manual_seed(seed)


def normal(like: Tensor, seed: int) -> Tensor:
    """Standard normal numbers in the shape, dtype and device of `like`."""
    # By shape, never by strides: both passes of a call must take the same way.
    if like.device.type == "cpu" and like.dtype == torch.float32 and LIBRARY.available:
        out = torch.empty(like.shape, dtype=torch.float32, device="cpu")
        LIBRARY.call("normal", out.numel(), seed, out)
        return out
    generator = seeded(seed, like.device)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def signs(shape: Sequence[int], seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers -1 and +1 with equal probability, one random bit for each, the same in any dtype."""
    if device.type == "cpu" and LIBRARY.available:
        out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
        LIBRARY.call("signs", out.numel(), seed, out)
        return out.to(dtype)
    count = torch.Size(shape).numel()
    words = torch.empty(-(-count // 64), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=seeded(seed, device))
    table = _signs_of_bytes(dtype, device)
    return table[words.view(torch.uint8).int()].view(-1)[:count].view(tuple(shape))


def hashed_signs(seed: int, *numbers: Tensor) -> Tensor:
    """A sign for each tuple of int64 numbers, -1 or +1 as int64, by a hash (SplitMix64).

    For a few places of a matrix of signs that would be too large to draw.
    """
    z = torch.zeros((), dtype=torch.int64, device=numbers[0].device)
    for place, number in enumerate(numbers):
        z = z ^ number ^ derive(seed, place)
        for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
            z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * multiplier
        z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return 1 - ((z >> 39) & 2)


@functools.cache
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The 8 signs of each byte, shape (256, 8)."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (1 - 2 * bits).to(device, dtype)
