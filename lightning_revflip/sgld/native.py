"""The compiled steps, for float32 on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int64, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from lightning_revflip._native import ARRAY, FLOAT, SIZE, NativeLibrary

_STREAM = [c_uint64, SIZE]  # seed, and whether there is noise

LIBRARY = NativeLibrary(
    Path(__file__).with_name("native.c"),
    {
        "normal": [SIZE, c_uint64, ARRAY],
        "sgld": [SIZE, *[ARRAY] * 3, *_STREAM, *[FLOAT] * 3],
        "sghmc": [SIZE, *[ARRAY] * 4, *_STREAM, *[FLOAT] * 4],
        "psgld": [SIZE, *[ARRAY] * 6, *_STREAM, *[FLOAT] * 5],
    },
    {},
    flags=["-ffp-contract=fast"],
    without="Langevin steps",
)


def takes(*lists: Sequence[Tensor]) -> bool:
    """Whether the compiled steps take all of these tensors."""
    return (
        all(
            each.device.type == "cpu" and each.dtype == torch.float32 and each.is_contiguous()
            for tensors in lists
            for each in tensors
        )
        and LIBRARY.available
    )


def call(
    name: str,
    lists: Sequence[Sequence[Tensor]],
    seed: int | None,
    *numbers: float,
    of_tensors: Sequence[Sequence[float] | Sequence[int]] = (),
) -> None:
    """Call a step on lists of tensors: parameters, gradients, states.

    Args:
        name: of the function in `native.c`.
        lists: of equally many tensors each.
        seed: of the noise; None for none.
        numbers: settings.
        of_tensors: settings that differ from tensor to tensor.
    """
    count = len(lists[0])
    sizes = (c_int64 * count)(*[each.numel() for each in lists[0]])
    addresses = [(c_void_p * count)(*[each.data_ptr() for each in tensors]) for tensors in lists]
    single = [_array(values) for values in of_tensors]
    stream = (0 if seed is None else seed, seed is not None)
    LIBRARY.call(name, count, sizes, *addresses, *single, *stream, *numbers)
    torch.autograd.graph.increment_version(lists[0])  # else autograd would not notice


def _array(values: Sequence[float] | Sequence[int]) -> object:
    if all(isinstance(each, int) for each in values):
        return (c_int64 * len(values))(*map(int, values))
    return (c_float * len(values))(*values)
