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
        frugal: whether to do without packed copies of weights and with temporaries of about 1 MB,
            which takes up to a tenth longer where there are few rows.
    """

    dtype: torch.dtype
    onednn: bool
    frugal: bool = False

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
        if not self.onednn or self.frugal:
            return weight
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        return packed

    def accumulate(self, total: Tensor, grad: Tensor, x: Tensor) -> None:
        """`total += grad.T @ x`: (rows, m), (rows, n) into (m, n), in blocks."""
        if total.dtype == self.dtype and not self.onednn:
            total.addmm_(grad.t(), x)
            return
        # Of columns of a wider matrix, oneDNN takes the left factor, but crawls through the right.
        right = x.to(self.dtype).contiguous().t()
        size = self._block_rows(total)
        parts = zip(torch.split(total, size), torch.split(grad, size, dim=1), strict=True)
        for part, columns in parts:
            part.add_(self.linear(columns.t(), right, self.dtype))

    def _block_rows(self, total: Tensor) -> int:
        """Into how many rows at a time to accumulate, in equal blocks.

        Blocks of 1.2 or 2.5 MB stay in a cache. What has up to 9 MB, as recurrent weights have, is
        done in one piece, which saves 4 to 10 % of the time where `grad` has only 100 rows.
        """
        largest = 5 * 2 ** (16 if self.frugal else 17)
        whole = 0 if self.frugal else 9 * 2**18
        if total.device.type != "cpu":
            largest = whole = 9 * 2**18  # small products would leave an accelerator idle
        if total.numel() <= max(whole, largest):
            return max(1, len(total))
        blocks = -(-total.numel() // largest)
        rows = -(-len(total) // blocks)
        return -(-rows // 64) * 64
