"""A linear layer and the cross-entropy of its outputs in one: the read-out of a language model.

For a row h, logits z = W h + b, a target t and label smoothing e over V classes

    loss      = lse - (1 - e) z_t - e mean(z)           lse = log(sum_j exp(z_j))
    dloss/dz  = softmax(z) - (1 - e) onehot(t) - e / V

Ordinary modules keep the logits and their log-softmax, and make two gradients of that size. Here
one buffer (rows, V) becomes in turn the logits, their softmax and the gradient. Or there is none
at all: with `vocab_chunk`, lse is gathered chunk by chunk of the vocabulary (Milakov & Gimelshein,
2018) and the backward pass computes the logits of every chunk again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_revflip.reversible.errors import refuse_double_backward
from lightning_revflip.reversible.products import Products, onednn_available
from lightning_revflip.reversible.tables import cast, multiplied_in, total_of

_REDUCTIONS = ("sum", "mean", "none")


class LinearCrossEntropy(nn.Linear):
    """`nn.Linear` followed by `F.cross_entropy`, in the memory of one of its outputs.

    It is an `nn.Linear`: its parameters have the same names and shapes, and its weight can be tied
    to an embedding (`head.weight = embedding.weight`). Losses are computed in float32 at least;
    under autocast only the products are in the lower precision. Inside `InPlaceGradients` the
    gradients of weight and bias are added in place to the totals.

    Without `vocab_chunk` the backward pass uses up what the forward pass kept, and a second one
    through the same graph (`retain_graph=True`) raises a RuntimeError. Double backward
    (`create_graph=True`) is refused in any case.

    Args:
        in_features: size of each hidden row.
        num_classes: V, the size of the vocabulary.
        bias: whether logits have a bias.
        ignore_index: rows with this target have loss 0 and no gradient.
        reduction: "sum"; "mean", the sum over the number of rows that are not ignored, or over the
            sum of their weights where weights are given; or "none" for the loss of every row.
            Inside a `ReversibleSequence`, which calls this on one chunk of steps after the other
            and adds up, use "sum": a sum of means over chunks is not the mean.
        label_smoothing: e, in [0, 1).
        vocab_chunk: classes whose logits are held at a time; None for all. Chunks cost a further
            product of the size of the forward pass.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if an argument is out of its range.

    Examples:
        >>> import torch
        >>> head = LinearCrossEntropy(8, 100)
        >>> hidden, target = torch.randn(5, 3, 8), torch.randint(100, (5, 3))
        >>> head(hidden, target).shape
        torch.Size([])
        >>> head.logits(hidden).shape
        torch.Size([5, 3, 100])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        ignore_index: int = -100,
        reduction: str = "sum",
        label_smoothing: float = 0.0,
        vocab_chunk: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if reduction not in _REDUCTIONS:
            raise ValueError(
                f"reduction must be one of {', '.join(map(repr, _REDUCTIONS))}, got {reduction!r}."
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be in [0, 1), got {label_smoothing}. Use 0 for none."
            )
        if vocab_chunk is not None and vocab_chunk < 1:
            raise ValueError(
                f"vocab_chunk must be at least 1, got {vocab_chunk}. Use None for no chunks."
            )
        super().__init__(in_features, num_classes, bias, device=device, dtype=dtype)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.vocab_chunk = vocab_chunk

    def extra_repr(self) -> str:
        options = [f"reduction={self.reduction!r}"]
        if self.ignore_index != -100:
            options.append(f"ignore_index={self.ignore_index}")
        if self.label_smoothing:
            options.append(f"label_smoothing={self.label_smoothing}")
        if self.vocab_chunk is not None:
            options.append(f"vocab_chunk={self.vocab_chunk}")
        return ", ".join([super().extra_repr(), *options])

    def logits(self, hidden: Tensor) -> Tensor:
        """What `nn.Linear` returns.

        Args:
            hidden: (..., in_features).

        Returns:
            Shape (..., V).
        """
        return F.linear(hidden, self.weight, self.bias)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, target: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """The loss of some rows.

        Args:
            hidden: (..., in_features).
            target: (...,), the class of every row, or `ignore_index`.
            weight: (...,), factors of the losses; gradients flow into them as well.

        Returns:
            The loss, a scalar; with reduction "none" shape (...,).

        Raises:
            ValueError: if shapes or dtypes do not fit.
            IndexError: on a CPU, if a target is no class. On CUDA the device asserts, later.
        """
        self._check(hidden, target, weight)
        target = target.flatten().long()
        counts = target != self.ignore_index
        classes = target.masked_fill(~counts, 0)
        if classes.device.type == "cpu":
            _check_classes(classes, self.out_features)
        rows = hidden.reshape(-1, self.in_features)
        losses = _losses(
            rows, classes, self.weight, self.bias, self.label_smoothing, self.vocab_chunk
        )
        losses = losses.masked_fill(~counts, 0.0)
        if weight is not None:
            losses = losses * weight.flatten()
        if self.reduction == "none":
            return losses.view(hidden.shape[:-1])
        if self.reduction == "sum":
            return losses.sum()
        shares = counts if weight is None else weight.flatten().masked_fill(~counts, 0.0)
        return losses.sum() / shares.sum()

    def _check(self, hidden: Tensor, target: Tensor, weight: Tensor | None) -> None:
        if hidden.dim() == 0 or hidden.shape[-1] != self.in_features:
            raise ValueError(
                f"hidden must have shape (..., {self.in_features}), got {tuple(hidden.shape)}. "
                "Its last dimension is in_features."
            )
        if target.shape != hidden.shape[:-1]:
            raise ValueError(
                f"target must have the shape of hidden without the last dimension, "
                f"{tuple(hidden.shape[:-1])}, got {tuple(target.shape)}. Nothing is flattened or "
                "broadcast."
            )
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise ValueError(
                f"target must hold class numbers of an integer dtype, got {target.dtype}. Convert "
                "it by target.long(); probabilities are not supported."
            )
        if weight is not None and weight.shape != target.shape:
            raise ValueError(
                f"weight must have one factor per target, shape {tuple(target.shape)}, got "
                f"{tuple(weight.shape)}. Use weight.expand_as(target) to repeat factors."
            )
        same = hidden.dtype == self.weight.dtype
        if not same and (
            torch.float64 in (hidden.dtype, self.weight.dtype)
            or not torch.is_autocast_enabled(hidden.device.type)
        ):
            raise ValueError(
                f"hidden must have the dtype of the weight, {self.weight.dtype}, got "
                f"{hidden.dtype}. Convert it, or use autocast."
            )


def _losses(
    hidden: Tensor,
    classes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    smoothing: float,
    vocab_chunk: int | None,
) -> Tensor:
    """Unreduced: (rows, in_features), (rows,) -> (rows,)."""
    dtype = multiplied_in(hidden)
    onednn = onednn_available(hidden.device, dtype) and len(hidden) > 0  # it refuses empty ones
    products = Products(dtype, onednn, frugal=True)
    wide = torch.promote_types(dtype, torch.float32)
    head = _Head(
        products,
        cast(weight, dtype),
        None if bias is None else cast(bias, wide),
        smoothing,
        total_of(weight),
        total_of(bias),
    )
    function: Any = _Stored if vocab_chunk is None else _Recomputed
    hidden = hidden.to(dtype).contiguous()
    losses: Tensor = function.apply(head, vocab_chunk, hidden, weight, bias, classes)
    return losses


@dataclass(frozen=True)
class _Head:
    """What both functions below are told besides the tensors that autograd follows.

    Products are in the dtype of `weight`, all else in float32 at least.
    """

    products: Products
    weight: Tensor
    bias: Tensor | None
    smoothing: float
    weight_total: Tensor | None
    bias_total: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of logits and losses."""
        return torch.promote_types(self.products.dtype, torch.float32)

    def logits(self, hidden: Tensor, part: slice) -> Tensor:
        """A new tensor, (rows, classes of the part)."""
        weight = self.weight[part]
        bias = None if self.bias is None else self.bias[part]
        if bias is None or bias.dtype == weight.dtype:
            return self.products.linear(hidden, weight, self.dtype, bias)
        return self.products.linear(hidden, weight, self.dtype).add_(bias)

    def loss(self, lse: Tensor, at_target: Tensor, mean: Tensor | None) -> Tensor:
        """From the log-sum-exp of the logits, the logit of the target and their mean."""
        loss = lse - at_target
        if mean is not None:
            loss = (1.0 - self.smoothing) * loss + self.smoothing * (lse - mean)
        return loss

    def gradient_(
        self, softmax: Tensor, column: Tensor, inside: Tensor | None, grad: Tensor
    ) -> Tensor:
        """Turn the softmax of some classes, in place, into the gradient of their logits.

        Args:
            softmax: (rows, classes).
            column: of the target in `softmax`, (rows,).
            inside: whether the target is among these classes, (rows,); None for everywhere.
            grad: of the losses, (rows,).
        """
        at_target = torch.full_like(grad, self.smoothing - 1.0)
        if inside is not None:
            at_target = at_target * inside
        softmax.scatter_add_(1, column.unsqueeze(1), at_target.unsqueeze(1))
        if self.smoothing:
            softmax.sub_(self.smoothing / len(self.weight))
        return softmax.mul_(grad.unsqueeze(1))


class _Gradients:
    """Where a backward pass adds the gradients of weight and bias: the totals, or new tensors."""

    def __init__(self, head: _Head, ctx: Any) -> None:
        self._products = head.products
        self._weight, self._bias = head.weight_total, head.bias_total
        self._new_weight: Tensor | None = None
        self._new_bias: Tensor | None = None
        if self._weight is None and ctx.needs_input_grad[3]:
            self._weight = self._new_weight = torch.zeros_like(head.weight, dtype=head.dtype)
        if self._bias is None and head.bias is not None and ctx.needs_input_grad[4]:
            self._bias = self._new_bias = torch.zeros_like(head.bias)

    def add(self, part: slice, logits: Tensor, hidden: Tensor) -> None:
        """Add those of a part of the classes, given the gradient of their logits."""
        if self._weight is not None:
            self._products.accumulate(self._weight[part], logits, hidden)
        if self._bias is not None:
            self._bias[part] += logits.sum(dim=0, dtype=self._bias.dtype)

    def new(self, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is left to hand to autograd, in the dtype of the weight."""
        new_weight, new_bias = self._new_weight, self._new_bias
        return (
            None if new_weight is None else new_weight.to(weight.dtype),
            None if new_bias is None else new_bias.to(weight.dtype),
        )


class _Stored(torch.autograd.Function):
    """Losses of rows; the softmax is kept, and used up by the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        head: _Head,
        vocab_chunk: None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        classes: Tensor,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = head.logits(hidden, slice(None))
            at_target = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
            mean = logits.mean(dim=1) if head.smoothing else None
            largest = logits.amax(dim=1)
            softmax = torch.softmax(logits, dim=1, out=logits)
            # softmax of the largest = exp(largest - lse), which is 1 / V at least
            lse = largest - softmax.amax(dim=1).log()
            ctx.head, ctx.softmax = head, softmax
            ctx.save_for_backward(hidden, weight, classes)
            return head.loss(lse, at_target, mean)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("LinearCrossEntropy", "nn.Linear and F.cross_entropy")
        head, softmax, ctx.softmax = ctx.head, ctx.softmax, None
        if softmax is None:
            raise RuntimeError(
                "LinearCrossEntropy was differentiated a second time through the same graph, but "
                "the first backward pass used up the only buffer. Call the module again, or give "
                "it a vocab_chunk: then backward passes can be repeated (retain_graph=True)."
            )
        hidden, weight, classes = ctx.saved_tensors
        gradients = _Gradients(head, ctx)
        grad_hidden = None
        with torch.autocast(hidden.device.type, enabled=False):
            logits = head.gradient_(softmax, classes, None, grad)
            low = logits.to(head.products.dtype)
            if ctx.needs_input_grad[2]:
                grad_hidden = head.products.linear(low, head.weight.t(), hidden.dtype)
            gradients.add(slice(None), low, hidden)
        return None, None, grad_hidden, *gradients.new(weight), None


class _Recomputed(torch.autograd.Function):
    """Losses of rows; logits exist for one chunk of the classes at a time, in both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        head: _Head,
        vocab_chunk: int,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        classes: Tensor,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            lse = hidden.new_full((len(hidden),), -torch.inf, dtype=head.dtype)
            at_target, total = torch.zeros_like(lse), torch.zeros_like(lse)
            for part, column, inside in _chunks(head, vocab_chunk, classes):
                logits = head.logits(hidden, part)
                found = logits.gather(1, column.unsqueeze(1)).squeeze(1)
                at_target = torch.where(inside, found, at_target)
                if head.smoothing:
                    total += logits.sum(dim=1)
                lse = torch.logaddexp(lse, logits.logsumexp(dim=1))
            ctx.head, ctx.vocab_chunk = head, vocab_chunk
            ctx.save_for_backward(hidden, weight, bias, classes, lse)
            return head.loss(lse, at_target, total / len(weight) if head.smoothing else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("LinearCrossEntropy", "nn.Linear and F.cross_entropy")
        head: _Head = ctx.head
        hidden, weight, _, classes, lse = ctx.saved_tensors  # which notices changes in place
        gradients = _Gradients(head, ctx)
        grad_hidden = torch.zeros_like(hidden, dtype=head.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for part, column, inside in _chunks(head, ctx.vocab_chunk, classes):
                softmax = head.logits(hidden, part).sub_(lse.unsqueeze(1)).exp_()
                logits = head.gradient_(softmax, column, inside, grad).to(head.products.dtype)
                if ctx.needs_input_grad[2]:
                    grad_hidden += head.products.linear(logits, head.weight[part].t(), head.dtype)
                gradients.add(part, logits, hidden)
        return None, None, grad_hidden.to(hidden.dtype), *gradients.new(weight), None


def _chunks(
    head: _Head, vocab_chunk: int, classes: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Parts of the vocabulary; for each, columns of the targets, and which of these are real."""
    for start in range(0, len(head.weight), vocab_chunk):
        stop = min(start + vocab_chunk, len(head.weight))
        inside = (classes >= start) & (classes < stop)
        yield slice(start, stop), (classes - start).clamp(0, stop - start - 1), inside


def _check_classes(classes: Tensor, num_classes: int) -> None:
    wrong = classes[(classes < 0) | (classes >= num_classes)]
    if len(wrong):
        raise IndexError(
            f"target {wrong[0].item()} is no class: classes are 0 to {num_classes - 1}. Set "
            "ignore_index to the value that marks rows without a target."
        )
