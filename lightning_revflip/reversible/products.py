"""Matrix products of a sweep, by the fastest route that torch offers.

On a CPU in float32, torch multiplies by MKL, which on processors that are not Intel's runs at half
the speed of oneDNN (the library behind torch's own nn.LSTM, see `benchmarks/README.md`). oneDNN is
called through the operators that torch's compiler uses; where they are missing or switched off
(`torch.backends.mkldnn.flags(enabled=False)`), everything falls back to `torch.mm`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def onednn_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype on this device can and should go to oneDNN."""
    return (
        device.type == "cpu"
        and dtype == torch.float32
        and torch._C._has_mkldnn
        and torch._C._get_mkldnn_enabled()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


@dataclass(frozen=True)
class Products:
    """Products in a given dtype; operands are converted, results are in the dtype asked for.

    Args:
        dtype: of the multiplication.
        onednn: whether to use oneDNN; both passes of a sweep must agree.
    """

    dtype: torch.dtype
    onednn: bool

    def linear(
        self, x: Tensor, weight: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None
    ) -> Tensor:
        """`x @ weight.T + bias`: (rows, n), (m, n), (m,) -> (rows, m).

        `weight` may come from `pack`; weight and bias have the dtype of the multiplication.
        """
        x = x.to(self.dtype)
        product: Tensor
        if self.onednn:
            product = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        else:
            product = torch.mm(x, weight.t())
            if bias is not None:
                product += bias
        return product.to(out_dtype)

    def pack(self, weight: Tensor) -> Tensor:
        """A copy of `weight` in the layout that suits repeated calls of `linear`, if there is one.

        The result is opaque: only `linear` may use it.
        """
        if not self.onednn:
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        return packed

    def accumulate(self, total: Tensor, grad: Tensor, x: Tensor) -> None:
        """`total += grad.T @ x`: (rows, m), (rows, n) into (m, n)."""
        if total.dtype == self.dtype and not self.onednn:
            total.addmm_(grad.t(), x)
        else:
            total += self.linear(grad.t(), x.t().to(self.dtype), total.dtype)
