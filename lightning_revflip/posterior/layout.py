"""Names and shapes of the tensors of one sample, and how they lie in one flat row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

Parameters = dict[str, Tensor]
"""Stacked values of n samples by name, each of shape (n, *shape)."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors of one sample, in the order in which a row holds them.

    Args:
        names: names in the module, each once.
        shapes: their shapes.

    Examples:
        >>> layout = Layout.of_parameters(nn.Linear(2, 3))
        >>> layout.names, layout.shapes, layout.numel
        (('weight', 'bias'), ((3, 2), (3,)), 9)
        >>> {name: tuple(t.shape) for name, t in layout.unflatten(torch.zeros(5, 9)).items()}
        {'weight': (5, 3, 2), 'bias': (5, 3)}

    Raises:
        ValueError: for names that repeat, or not as many shapes as names.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes) or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"a layout needs one shape for each name and no name twice, got {self.names} and "
                f"{self.shapes}."
            )

    @classmethod
    def of_parameters(cls, module: nn.Module) -> Layout:
        """The parameters that require gradients; those that modules share count once.

        Frozen parameters are no part of a sample: they stay the module's own.

        Args:
            module: holds the parameters.

        Raises:
            ValueError: if no parameter requires a gradient.
        """
        layout = cls._of((name, p) for name, p in module.named_parameters() if p.requires_grad)
        if not layout.names:
            raise ValueError(
                f"{type(module).__name__} has no parameter that requires a gradient, so there is "
                "nothing to sample. Call requires_grad_(True) on what should vary."
            )
        return layout

    @classmethod
    def of_buffers(cls, module: nn.Module) -> Layout:
        """The persistent buffers, such as the statistics of batch normalization; may be empty.

        Args:
            module: holds the buffers.
        """
        transient = {
            f"{path}.{name}".lstrip(".")
            for path, part in module.named_modules(remove_duplicate=False)
            for name in part._non_persistent_buffers_set
        }
        return cls._of((name, b) for name, b in module.named_buffers() if name not in transient)

    @classmethod
    def _of(cls, tensors: Iterable[tuple[str, Tensor]]) -> Layout:
        found = {name: tuple(tensor.shape) for name, tensor in tensors}
        return cls(tuple(found), tuple(found.values()))

    @cached_property
    def by_name(self) -> dict[str, tuple[int, ...]]:
        """The shape of each name."""
        return dict(zip(self.names, self.shapes, strict=True))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def numel(self) -> int:
        """Number of elements of one sample, P."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """One sample as a row.

        Args:
            tensors: exactly the names and shapes of this layout, in any order.
            out: shape (P,), of any dtype and device, receives the values; None: a new row in the
                dtype and on the device of the tensors.

        Returns:
            Shape (P,), detached.

        Raises:
            ValueError: for other names or shapes, naming the first difference.
        """
        self.check_tensors(tensors)
        with torch.no_grad():
            flat = [tensors[name].reshape(-1) for name in self.names]
            if out is None:
                return torch.cat(flat)
            if all(part.device == out.device for part in flat):
                return torch.cat(flat, out=out)
            return out.copy_(torch.cat(flat))  # one transfer instead of one for each tensor

    def unflatten(self, rows: Tensor) -> Parameters:
        """Samples from rows.

        Args:
            rows: shape (n, P).

        Returns:
            Views of shape (n, *shape), in the order of `names`.

        Raises:
            ValueError: for another number of dimensions or of columns.
        """
        if rows.dim() != 2 or rows.shape[1] != self.numel:
            raise ValueError(
                f"rows must have shape (n, {self.numel}), as a sample has {self.numel} elements; "
                f"got {tuple(rows.shape)}."
            )
        parts = torch.split(rows, list(self.sizes), dim=1)
        return {
            name: part.view(len(rows), *shape)
            for (name, shape), part in zip(self.by_name.items(), parts, strict=True)
        }

    def check(self, other: Layout, what: str) -> None:
        """Raise unless another layout is the same.

        Args:
            other: the layout to check.
            what: whose layout that is, for the message.

        Raises:
            ValueError: naming the first difference.
        """
        if other == self:
            return
        for name, shape in self.by_name.items():
            if name not in other.by_name:
                raise ValueError(f"{what} lacks {name!r} of shape {shape}, which is expected.")
            if other.by_name[name] != shape:
                found = other.by_name[name]
                raise ValueError(f"{what} has {name!r} of shape {found}, expected {shape}.")
        for name, shape in other.by_name.items():
            if name not in self.by_name:
                raise ValueError(f"{what} has {name!r} of shape {shape}, which is not expected.")
        raise ValueError(
            f"{what} has the same tensors in another order: {other.names}, expected {self.names}."
        )

    def check_module(self, module: nn.Module) -> None:
        """Raise unless samples of these parameters fit a module.

        Parameters of the layout may be frozen in the module; those outside must be, or the module
        would predict with weights that were never sampled.

        Raises:
            ValueError: naming the first difference.
        """
        parameters = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad or name in self.by_name
        }
        try:
            self.check_tensors(parameters)
        except ValueError as error:
            raise ValueError(
                f"{type(module).__name__} is of another architecture than the samples: {error} "
                "A parameter that was frozen while sampling has to be frozen here, too: call "
                "requires_grad_(False) on it."
            ) from None

    def check_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise unless the tensors have exactly the names and shapes of the layout.

        Args:
            tensors: by name.

        Raises:
            ValueError: naming the first difference.
        """
        for name, shape in self.by_name.items():
            if name not in tensors:
                raise ValueError(f"{name!r} of shape {shape} is missing.")
            if tensors[name].shape != shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(tensors[name].shape)}, expected {shape}."
                )
        if len(tensors) > len(self.names):
            extra = next(name for name in tensors if name not in self.by_name)
            raise ValueError(f"{extra!r} is not expected.")

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        return {"names": list(self.names), "shapes": [list(shape) for shape in self.shapes]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Layout:
        """The inverse of `to_json`.

        Args:
            values: what `to_json` returned.
        """
        return cls(tuple(values["names"]), tuple(tuple(shape) for shape in values["shapes"]))
