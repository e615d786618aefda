"""Products and sigmoids that do not depend on memory layout.

Two correct float32 implementations differ in the last place, because the order of summation and
the vectorised sigmoid depend on shapes and strides. One such difference can flip the rounding of a
forget gate, and then the two states differ by 1e-3. Inside `ExactArithmetic` these operations are
evaluated in float64 and rounded once, so two implementations of the same formula agree bit for bit
whatever their layout.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_OPERATIONS = ("sigmoid", "tanh", "exp", "mm", "addmm", "bmm", "baddbmm", "linear")


class ExactArithmetic(TorchDispatchMode):
    """Float32 products and sigmoids are those of float64, rounded, wherever they are called.

    Args:
        sigmoid: used instead of the exact sigmoid, to agree with code that this mode cannot reach.
    """

    def __init__(self, sigmoid: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self._sigmoid = sigmoid

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        operation = name.removesuffix("_")
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if operation not in _OPERATIONS or any(t.dtype != torch.float32 for t in tensors):
            return func(*args, **kwargs)
        out = args[0] if name.endswith("_") else kwargs.pop("out", None)
        if operation == "sigmoid" and self._sigmoid is not None:
            result = self._sigmoid(args[0].contiguous())
            return result if out is None else out.copy_(result)
        exact = [arg.double() if isinstance(arg, Tensor) else arg for arg in args]
        result = getattr(torch.ops.aten, operation)(*exact, **kwargs).float()
        return result if out is None else out.copy_(result)
