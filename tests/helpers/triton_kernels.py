"""The Triton kernels on a GPU where there is one, else in Triton's interpreter; and their sigmoid.

Triton decides when it decorates a function whether the function will be compiled or interpreted. So
the modules are imported a second time for the interpreter, and the first ones are put back.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

_PACKAGE = "lightning_revflip.reversible.kernels"
_MODULES = ("triton", "triton_gru", "triton_lstm", "device_buffer", "triton_cells")


@dataclass(frozen=True)
class Kernels:
    """The modules, and where their kernels run."""

    device: torch.device
    modules: dict[str, ModuleType]

    def __getattr__(self, name: str) -> Any:
        return self.modules[name]

    def cell(self, kind: str, hidden_size: int, bits: float | None, block: int) -> Any:
        """A TritonGRUCell or TritonLSTMCell whose programs own `block` units."""
        types = {"RevGRU": "TritonGRUCell", "RevLSTM": "TritonLSTMCell"}
        cell = getattr(self.triton_cells, types[kind])(hidden_size, bits)
        cell.block = block
        return cell


@contextmanager
def kernels_on_a_gpu_or_interpreted() -> Iterator[Kernels]:
    """The modules, by name; where there is no GPU, freshly imported inside the block."""
    if torch.cuda.is_available():
        modules = {name: importlib.import_module(f"{_PACKAGE}.{name}") for name in _MODULES}
        yield Kernels(torch.device("cuda"), modules)
        return
    import triton.language as tl  # decorates its own functions, before the variable is set

    package = importlib.import_module(_PACKAGE)
    kept = {name: sys.modules.pop(f"{_PACKAGE}.{name}", None) for name in _MODULES}
    with patch.dict(os.environ, TRITON_INTERPRET="1"):
        modules = {name: importlib.import_module(f"{_PACKAGE}.{name}") for name in _MODULES}
    # The interpreter adds up by numpy where it recognises this function, else number by number.
    modules["triton"].add = tl.standard._sum_combine  # type: ignore[attr-defined]
    try:
        yield Kernels(torch.device("cpu"), modules)
    finally:
        for name, module in kept.items():
            del sys.modules[f"{_PACKAGE}.{name}"]
            delattr(package, name)
            if module is not None:
                sys.modules[f"{_PACKAGE}.{name}"] = module
                setattr(package, name, module)


def kernel_sigmoid(x: Tensor) -> Tensor:
    """The kernels' sigmoid, operation for operation in float32, by torch."""
    x = (-x).clamp(-87.0, 87.0)
    whole = (x * 1.44269504).round()
    r = x - whole * 0.693359375 + whole * 2.12194440e-4
    p = 1.9875691500e-4 * torch.ones_like(r)
    for coefficient in (
        *(1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1),
    ):
        p = p * r + coefficient
    exponential = torch.ldexp(p * r * r + r + 1.0, whole)
    return 1.0 / (1.0 + exponential)
