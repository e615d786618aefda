"""Faster implementations of the cells, chosen per pass; `cells.py` is the specification."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from lightning_revflip.reversible.cells import Cell, RevGRUCell, RevLSTMCell

_native_allowed: ContextVar[bool] = ContextVar("native_allowed", default=True)


def fastest(cell: Cell[Any], device: torch.device, dtype: torch.dtype) -> Cell[Any]:
    """The same cell in the fastest implementation there is for a device and dtype of products.

    Both passes of a sweep must use what the first one got.
    """
    if not (cell.forgets and device.type == "cpu" and dtype != torch.float64):
        return cell
    from lightning_revflip.reversible.kernels import native, native_cells

    if not _native_allowed.get() or native.library() is None:
        return cell
    native_types: dict[type[Cell[Any]], type[Cell[Any]]] = {
        RevGRUCell: native_cells.NativeGRUCell,
        RevLSTMCell: native_cells.NativeLSTMCell,
    }
    kind = native_types.get(type(cell))
    return cell if kind is None else kind(cell.hidden_size, cell.max_forget_bits)


@contextmanager
def torch_only() -> Iterator[None]:
    """Within this context layers run by torch alone, as where there is no C compiler."""
    token = _native_allowed.set(False)
    try:
        yield
    finally:
        _native_allowed.reset(token)
