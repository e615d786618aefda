"""Which rows of a batch belong to which member, and a check that a model keeps them in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary


class Rows:
    """The rows of members in a batch: neighbours, and equally many of each member.

    Args:
        members: number of members of this process.
        follow: whether rows are followed from layer to layer within `following`, which costs a
            byte for each number that a layer gives, and time.
    """

    def __init__(self, members: int, follow: bool = False) -> None:
        self.members = members
        self._marks = _Marks() if follow else None
        self.used = False
        """Whether a layer has given rows."""

    def following(self) -> AbstractContextManager[Any]:
        """The context in which rows are followed."""
        return nullcontext() if self._marks is None else self._marks

    def of_member(self, x: Tensor, path: str) -> int:
        """How many rows of the input of a layer each member has.

        Args:
            x: input, (rows, ...).
            path: name of the layer, for errors.

        Raises:
            ValueError: if rows cannot be divided so, or are known to lie in another way.
        """
        if x.dim() == 0 or len(x) == 0 or len(x) % self.members:
            raise ValueError(
                f"{path} got an input of shape {tuple(x.shape)}, whose first dimension must hold "
                f"the rows of {self.members} members, equally many of each. Make the input by "
                "`repeat`."
            )
        marks = None if self._marks is None else self._marks.of(x)
        if marks is not None:
            wrong = (marks != self._expected(x)) & (marks != _UNKNOWN)
            if wrong.any():
                raise ValueError(
                    f"{path} would compute rows with the weights of other members: the layers "
                    "before it left the rows of members in another order or dimension of its "
                    "input. They must lie in the first dimension, those of a member side by side; "
                    "for recurrent layers without batch_first in the second. Transpose the input "
                    "between layers that are time first and others."
                )
        return len(x) // self.members

    def mark(self, output: Tensor) -> Tensor:
        """Say that a tensor (rows, ...) is the output of a layer; returns it."""
        self.used = True
        if self._marks is not None:
            self._marks.put(output, self._expected(output).expand_as(output))
        return output

    def _expected(self, x: Tensor) -> Tensor:
        """The marks of rows where they should be, to broadcast over (rows, ...)."""
        numbers = torch.arange(len(x), device=x.device) // (len(x) // self.members)
        return (numbers % _UNKNOWN).to(torch.uint8).view(-1, *[1] * (x.dim() - 1))


_UNKNOWN = 255
"""The mark of numbers that no layer has given; members have smaller marks, in turn."""

_RESHAPING = frozenset(
    ("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel")
)
"""Functions that keep the order of the numbers."""

_TRANSPOSING = ("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "adjoint")
_TRANSPOSED = ("t", "T", "mT", "H", "mH")
_RESIZING = ("squeeze", "unsqueeze", "expand", "expand_as", "repeat", "tile", "repeat_interleave")
_CHOOSING = ("__getitem__", "select", "narrow", "index_select", "flip", "roll")
_SPLITTING = ("chunk", "split", "tensor_split", "unbind")
_JOINING = ("cat", "concat", "concatenate", "stack", "hstack", "vstack")

_PACKING = ("_pack_padded_sequence", "_pad_packed_sequence")

_MOVING = frozenset(
    (
        *_TRANSPOSING,
        *_TRANSPOSED,
        *_RESIZING,
        *_CHOOSING,
        *_SPLITTING,
        *_JOINING,
        *_PACKING,
    )
)
"""Functions whose result has the numbers of their first argument in other places."""

_OPAQUE = frozenset(("einsum", "gather", "take_along_dim", "scatter"))
"""Functions that may move numbers although the shape stays."""


class _Marks(TorchFunctionMode):
    """Follows what layers give through the functions of torch, as far as it can be told where.

    Functions that move numbers move the marks as well. A result of the same shape has the marks of
    the argument, so that activations, sums and normalisations keep them. Of others nothing is
    known.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known = WeakTensorKeyDictionary()

    def of(self, x: Tensor) -> Tensor | None:
        """The marks of the numbers of a tensor, of its shape, uint8; None if they are not known."""
        marks: Tensor | None = self._known.get(x)  # type: ignore[no-untyped-call]
        return marks if marks is not None and marks.shape == x.shape else None

    def put(self, x: Tensor, marks: Tensor | None) -> None:
        """Set what `of` gives."""
        if marks is not None:
            self._known[x] = marks
        elif x in self._known:
            del self._known[x]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if isinstance(output, Tensor):
            self.put(output, self._result(func, args, kwargs, output))
        elif isinstance(output, tuple | list) and _name(func) in _MOVING:
            parts = self._moved(func, args, kwargs)
            for part, marks in zip(output, parts or [None] * len(output), strict=True):
                self.put(part, marks)
        return output

    def _result(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor
    ) -> Tensor | None:
        """The marks of a result."""
        name = _name(func)
        if name in _MOVING:
            marks: Tensor | None = self._moved(func, args, kwargs)
            return marks
        if name in _RESHAPING and args and isinstance(args[0], Tensor):
            marks = self.of(args[0])
            return None if marks is None or marks.numel() != x.numel() else marks.reshape(x.shape)
        made = name.endswith("_like") or name.startswith("new_")
        if made or name in _OPAQUE or name.rstrip("_") in _MOVING:
            return None
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.shape == x.shape:
                marks = self.of(leaf)
                if marks is not None:
                    return marks
        return None

    def _moved(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What a function makes of the marks of its first argument, or of the tensors in it."""
        if not args or not isinstance(args[0], Tensor | list | tuple) or "out" in kwargs:
            return None
        first, *others = args
        parts = [first] if isinstance(first, Tensor) else list(first)
        known = [self.of(part) for part in parts]
        if all(marks is None for marks in known):
            return None
        unknown = torch.tensor(_UNKNOWN, dtype=torch.uint8, device=parts[0].device)
        marks = [
            unknown.expand(part.shape) if marks is None else marks
            for part, marks in zip(parts, known, strict=True)
        ]
        if _name(func) == "_pad_packed_sequence":
            others[2] = _UNKNOWN  # the value of the padding
        return func(marks[0] if isinstance(first, Tensor) else marks, *others, **kwargs)


def _name(func: Callable[..., Any]) -> str:
    """Of a function, a method or an attribute of tensors."""
    name: str = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", "") if name == "__get__" else name  # type: ignore[attr-defined]
