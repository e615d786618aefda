"""Products with the recurrent weights of a half-step, with and without a perturbation.

A perturbation costs a second product. The two cannot share one: they differ in their inputs (x and
x * s) and are joined by signs r of their results, and a batched product of both takes the time of
two.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_revflip.reversible.perturbation import RecurrentPerturbation
from lightning_revflip.reversible.products import Products


class HalfWeights:
    """Recurrent weights of a half-step: implements `cells.Recurrent`.

    Args:
        weight: (gates * half, half), in the dtype of `products`.
        sizes: rows of each block.
        products: how to multiply.
        dtype: of the results.
    """

    def __init__(
        self, weight: Tensor, sizes: Sequence[int], products: Products, dtype: torch.dtype
    ) -> None:
        self._sizes = list(sizes)
        self._products = products
        self._dtype = dtype
        self._blocks = torch.split(weight, self._sizes)
        self._packed = [products.pack(block) for block in self._blocks]

    def linear(self, x: Tensor, block: int) -> Tensor:
        """`x @ weight[block].T`."""
        return self._products.linear(x, self._packed[block], self._dtype)

    def transposed(self, grad: Tensor, block: int) -> Tensor:
        """`grad @ weight[block]`."""
        return self._products.linear(grad, self._blocks[block].t(), self._dtype)

    def accumulate(self, total: Tensor, grad: Tensor, inputs: Sequence[Tensor]) -> None:
        """Add the gradient of the weights over a chunk.

        Args:
            total: receives it, (gates * half, half).
            grad: of what `linear` returned for all blocks, (chunk rows, gates * half).
            inputs: what it was given for each block, (chunk rows, half).
        """
        totals, grads = torch.split(total, self._sizes), torch.split(grad, self._sizes, dim=1)
        for part, part_grad, x in zip(totals, grads, inputs, strict=True):
            self._products.accumulate(part, part_grad, x)


class PerturbedHalfWeights(HalfWeights):
    """Recurrent weights of a half-step, for each sequence n its own: `W + dW * (r_n s_n^T)`.

    The sequences alive at a step are the first ones of the batch.

    Args:
        weight: W, as above.
        delta: dW, likewise.
        signs_in: s, shape (batch, half), of the dtype of results.
        signs_out: r, (batch, gates * half), likewise.
        sizes: rows of each block.
        products: how to multiply.
        dtype: of the results.
    """

    def __init__(
        self,
        weight: Tensor,
        delta: Tensor,
        signs_in: Tensor,
        signs_out: Tensor,
        sizes: Sequence[int],
        products: Products,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(weight, sizes, products, dtype)
        self._delta = HalfWeights(delta, sizes, products, dtype)
        self._signs_in = signs_in.contiguous()
        self._signs_out = [part.contiguous() for part in torch.split(signs_out, self._sizes, 1)]

    def linear(self, x: Tensor, block: int) -> Tensor:
        """`x_n @ W_n[block].T` for every row n."""
        signs_in, signs_out = self._signs(len(x), block)
        change = self._delta.linear(x * signs_in, block)
        return super().linear(x, block).addcmul_(change, signs_out)

    def transposed(self, grad: Tensor, block: int) -> Tensor:
        """`grad_n @ W_n[block]` for every row n."""
        signs_in, signs_out = self._signs(len(grad), block)
        change = self._delta.transposed(grad * signs_out, block)
        return super().transposed(grad, block).addcmul_(change, signs_in)

    def accumulate_delta(
        self, total: Tensor, grad: Tensor, inputs: Sequence[Tensor], rows: Sequence[int]
    ) -> None:
        """Add the gradient of dW over a chunk: `(grad * r).T @ (x * s)` of each block.

        Args:
            total: as in `accumulate`.
            grad: likewise.
            inputs: likewise.
            rows: sequences alive at each step of the chunk, in the order of its rows.
        """
        totals, grads = torch.split(total, self._sizes), torch.split(grad, self._sizes, dim=1)
        for block, (part, part_grad, x) in enumerate(zip(totals, grads, inputs, strict=True)):
            signs = [self._signs(count, block) for count in rows]
            signs_in, signs_out = (torch.cat(parts) for parts in zip(*signs, strict=True))
            self._products.accumulate(part, signs_out.mul_(part_grad), signs_in.mul_(x))

    def _signs(self, rows: int, block: int) -> tuple[Tensor, Tensor]:
        """Those of the first sequences: s and r."""
        return self._signs_in[:rows], self._signs_out[block][:rows]


def half_weights(
    weight_hh: Tensor,
    perturbation: RecurrentPerturbation | None,
    sizes: Sequence[int],
    products: Products,
    dtype: torch.dtype,
) -> list[HalfWeights]:
    """The recurrent weights of both half-steps.

    Args:
        weight_hh: (gate_rows, half), in the dtype of `products`.
        perturbation: of them, likewise, with signs; or None.
        sizes: rows of each block of a half.
        products: how to multiply.
        dtype: of the results.
    """
    weights = weight_hh.chunk(2, dim=0)
    if perturbation is None:
        return [HalfWeights(weight, sizes, products, dtype) for weight in weights]
    assert perturbation.signs_in is not None
    assert perturbation.signs_out is not None
    deltas = perturbation.delta.chunk(2, dim=0)
    signs_in = perturbation.signs_in.to(dtype).chunk(2, dim=1)
    signs_out = perturbation.signs_out.to(dtype).chunk(2, dim=1)
    return [
        PerturbedHalfWeights(*tensors, sizes, products, dtype)
        for tensors in zip(weights, deltas, signs_in, signs_out, strict=True)
    ]
