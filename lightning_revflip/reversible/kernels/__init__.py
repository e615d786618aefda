"""Faster implementations of the cells, chosen per pass; `cells.py` is the specification."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from lightning_revflip.reversible.cells import Cell, RevGRUCell, RevLSTMCell

_native_allowed: ContextVar[bool] = ContextVar("native_allowed", default=True)


def fastest(cell: Cell[Any], device: torch.device, dtype: torch.dtype) -> Cell[Any]:
    """The same cell in the fastest implementation there is.

    Both passes of a sweep must use what the first one got.

    Args:
        cell: of `cells.py`.
        device: where it computes.
        dtype: of matrix products.
    """
    if not cell.forgets or dtype == torch.float64 or not _native_allowed.get():
        return cell
    kind = _implementations(device).get(type(cell))
    return cell if kind is None else kind(cell.hidden_size, cell.max_forget_bits)


def _implementations(device: torch.device) -> dict[type[Cell[Any]], type[Cell[Any]]]:
    if device.type == "cpu":
        from lightning_revflip.reversible.kernels import native, native_cells

        if native.LIBRARY.available:
            return {
                RevGRUCell: native_cells.NativeGRUCell,
                RevLSTMCell: native_cells.NativeLSTMCell,
            }
    if device.type == "cuda" and triton_runs_on(device):
        from lightning_revflip.reversible.kernels import triton_cells

        return {RevGRUCell: triton_cells.TritonGRUCell, RevLSTMCell: triton_cells.TritonLSTMCell}
    return {}


def triton_runs_on(device: torch.device) -> bool:
    """Whether there are kernels for this GPU, and Triton works; `REVFLIP_TRITON=0` says no.

    Args:
        device: a CUDA device.
    """
    return (
        os.environ.get("REVFLIP_TRITON") != "0"
        and torch.cuda.is_available()
        and torch.version.hip is None  # untested there
        and torch.cuda.get_device_capability(device) >= (7, 0)
        and importlib.util.find_spec("triton") is not None
        and _triton_builds()
    )


@functools.cache
def _triton_builds() -> bool:
    """Whether Triton can make its launcher, for which it compiles C with Python's headers."""
    try:
        from triton.runtime import driver

        _ = driver.active.utils
    except Exception as error:  # whatever Triton, a compiler or the loader may raise
        warnings.warn(
            f"Triton cannot be used, so reversible layers run by torch calls alone: {error}. "
            "Install gcc and Python's headers, or set REVFLIP_TRITON=0 to accept this.",
            stacklevel=2,
        )
        return False
    return True


@contextmanager
def torch_only() -> Iterator[None]:
    """Within this context layers run by torch alone, as without a C compiler and without Triton."""
    token = _native_allowed.set(False)
    try:
        yield
    finally:
        _native_allowed.reset(token)
