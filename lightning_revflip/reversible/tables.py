"""Gradients of large tables, added where they belong instead of being made anew by every chunk.

A module that is run on short chunks of time steps uses the same weight many times. For each use,
autograd makes a gradient of the size of the whole weight and then adds it to the others. With an
embedding or softmax table of V words that temporary is larger than all else in the chunk, though
the chunk looks up a few words only. Inside `InPlaceGradients`

    embedding: total[index[i]] += g[i]           for every looked up i
    linear:    total += g.T @ x                  in blocks of a few MB
               bias_total += sum_i g[i]

happen in place while backward runs, and autograd is handed nothing for these weights.
"""

from collections.abc import Callable, Iterable
from contextvars import ContextVar, Token
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_revflip.reversible.errors import refuse_double_backward
from lightning_revflip.reversible.products import Products, onednn_available

_active: ContextVar[tuple["InPlaceGradients", ...]] = ContextVar("active", default=())


class InPlaceGradients(TorchFunctionMode):
    """While active, `F.linear` and `F.embedding` add gradients of given weights to given totals.

    What matters is where forward runs; backward may run outside. These calls, and with them
    `nn.Linear` and `nn.Embedding`, hand autograd no gradient for the weight. It must still be
    among the inputs of `torch.autograd.grad`, since autograd visits only what leads to them, with
    `allow_unused=True`: what comes back for it is `None`, or the gradient of its other uses, yet
    to be added to the total. A backward pass that is repeated (`retain_graph=True`) adds again.

    Every other use of the weight gets its gradient from autograd as ever, among them a product
    with the transposed weight (`x @ weight.t()`), `F.embedding` with `max_norm`, `sparse` or
    `scale_grad_by_freq`, and calls inside a function of `torch.nn.functional` that is itself made
    of many, such as `F.multi_head_attention_forward`.

    Under autocast, products are those of torch's autocast, but a weight is cast only once in the
    life of the mode: do not change weights in that time.

    Args:
        pairs: weights (or biases), recognised by identity, and what to add their gradients to:
            tensors of the same shape and device, in float32 or float64.

    Raises:
        ValueError: if a total does not fit its weight.

    Examples:
        >>> import torch
        >>> embedding = torch.nn.Embedding(5, 2)
        >>> total = torch.zeros(5, 2)
        >>> with InPlaceGradients([(embedding.weight, total)]):
        ...     loss = embedding(torch.tensor([1, 3, 3])).sum()
        >>> torch.autograd.grad(loss, [embedding.weight], allow_unused=True)
        (None,)
        >>> total[:, 0]
        tensor([0., 1., 0., 2., 0.])
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._pairs = {id(leaf): (leaf, total) for leaf, total in pairs}
        for leaf, total in self._pairs.values():
            _check_total(leaf, total)
        self._used: set[int] = set()
        self._cast: dict[tuple[int, torch.dtype], Tensor] = {}
        self._tokens: list[Token[tuple[InPlaceGradients, ...]]] = []

    def __enter__(self) -> "InPlaceGradients":
        self._tokens.append(_active.set((*_active.get(), self)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        _active.reset(self._tokens.pop())

    def total_of(self, leaf: Tensor | None) -> Tensor | None:
        """What the gradient of this weight is added to; None for any other tensor."""
        known = self._pairs.get(id(leaf))
        if known is None or not known[0].requires_grad:
            return None
        if torch.is_grad_enabled():
            self._used.add(id(leaf))
        return known[1]

    def used(self, leaf: Tensor) -> bool:
        """Whether anything asked for the total of this weight, to add to it."""
        return id(leaf) in self._used

    def cast(self, leaf: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight of this mode in another dtype, cast at most once."""
        if leaf.dtype == dtype:
            return leaf.detach()
        key = (id(leaf), dtype)
        if key not in self._cast:
            self._cast[key] = leaf.detach().to(dtype)
        return self._cast[key]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _CALLS.get(func)
        if call is not None:
            result = call(self, *args, **(kwargs or {}))
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


def total_of(weight: Tensor | None) -> Tensor | None:
    """What an active `InPlaceGradients` adds the gradient of this weight to, if there is one."""
    totals = (mode.total_of(weight) for mode in reversed(_active.get()))
    return next((total for total in totals if total is not None), None)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in another dtype, detached; cast once if an active mode knows the weight."""
    for mode in reversed(_active.get()):
        if mode.total_of(weight) is not None:
            return mode.cast(weight, dtype)
    return weight.detach().to(dtype)


def multiplied_in(x: Tensor) -> torch.dtype:
    """The dtype in which `F.linear` multiplies `x`: its own, or that of autocast."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias` for 2-dimensional x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        leaf: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        total: Tensor,
        bias_total: Tensor | None,
    ) -> Tensor:
        ctx.totals = (total, bias_total)
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            if bias is not None:
                bias = bias.to(x.dtype)
            if not _products(x).onednn:
                return F.linear(x, weight, bias)
            return _products(x).linear(x, weight, x.dtype, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("a linear layer with InPlaceGradients", "nn.Linear")
        x, weight = ctx.saved_tensors
        total, bias_total = ctx.totals
        products = _products(x)
        grad_x = grad_bias = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = products.linear(grad, weight.t(), x.dtype)
            products.accumulate(total, grad, x)
            if bias_total is not None:
                bias_total += grad.sum(dim=0, dtype=bias_total.dtype)
            elif ctx.needs_input_grad[2]:
                grad_bias = grad.sum(dim=0)
        return grad_x, None, grad_bias, None, None, None


class _Embedding(torch.autograd.Function):
    """`weight[index]`; no gradient where the index is `padding_idx` (-1: nowhere)."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, weight: Tensor, total: Tensor, padding_idx: int) -> Tensor:
        ctx.total, ctx.padding_idx = total, padding_idx
        ctx.save_for_backward(index)
        return torch.embedding(weight, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        refuse_double_backward("an embedding with InPlaceGradients", "nn.Embedding")
        (index,) = ctx.saved_tensors
        total = ctx.total
        index = index.flatten()
        grad = grad.reshape(-1, total.shape[1]).to(total.dtype)
        if ctx.padding_idx >= 0:
            grad = grad.masked_fill((index == ctx.padding_idx).unsqueeze(1), 0.0)
        if index.device.type == "cpu":
            total.index_add_(0, index, grad)
        else:  # where index_add_ depends on the order of threads, this sorts
            total.index_put_((index.long(),), grad, accumulate=True)
        return None, None, None, None


def _linear(
    mode: InPlaceGradients, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor | None:
    """`F.linear`, or None if torch shall do it."""
    total = mode.total_of(weight)
    # Mistakes are left to torch, which has the messages.
    if total is None or weight.dim() != 2 or input.dim() == 0 or input.numel() == 0:
        return None
    dtype = multiplied_in(input)
    autocast = torch.is_autocast_enabled(input.device.type)
    if (
        input.shape[-1] != weight.shape[1]
        or not weight.is_contiguous()
        or input.device != weight.device
        or not _becomes(weight, dtype, autocast)
        or (bias is not None and not _becomes(bias, dtype, autocast))
        or (bias is not None and bias.shape != weight.shape[:1])
    ):
        return None
    x = input.reshape(-1, input.shape[-1]).to(dtype)
    apply: Any = _Linear.apply
    out: Tensor = apply(x, weight, bias, mode.cast(weight, dtype), total, mode.total_of(bias))
    return out.view(*input.shape[:-1], len(weight))


def _embedding(
    mode: InPlaceGradients,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """`F.embedding`, or None if torch shall do it."""
    total = mode.total_of(weight)
    if total is None or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    if weight.dim() != 2:
        return None
    if padding_idx is None:
        padding_idx = -1
    elif not -len(weight) <= padding_idx < len(weight):
        return None
    elif padding_idx < 0:
        padding_idx += len(weight)
    apply: Any = _Embedding.apply
    out: Tensor = apply(input, weight, total, padding_idx)
    return out


def _torch_embedding(
    mode: InPlaceGradients,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """`torch.embedding`, to which a negative `padding_idx` means none."""
    given = padding_idx if padding_idx >= 0 else None
    return _embedding(
        mode, indices, weight, given, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse
    )


_CALLS: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.embedding: _torch_embedding,
}


def _products(x: Tensor) -> Products:
    return Products(x.dtype, onednn_available(x.device, x.dtype), frugal=True)


def _becomes(tensor: Tensor, dtype: torch.dtype, autocast: bool) -> bool:
    """Whether the tensor has this dtype, or autocast gives it."""
    return tensor.dtype == dtype or (autocast and tensor.dtype != torch.float64)


def _check_total(leaf: Tensor, total: Tensor) -> None:
    if total.shape != leaf.shape or total.device != leaf.device:
        raise ValueError(
            "a total must have the shape and device of its weight, "
            f"{tuple(leaf.shape)} on {leaf.device}, got {tuple(total.shape)} on {total.device}. "
            "Make it by torch.zeros_like(weight, dtype=torch.float32)."
        )
    if total.dtype not in (torch.float32, torch.float64) or total.requires_grad:
        raise ValueError(
            "a total must be of float32 or float64 and not require a gradient, got "
            f"{total.dtype}, requires_grad={total.requires_grad}. "
            "Make it by torch.zeros_like(weight, dtype=torch.float32)."
        )
