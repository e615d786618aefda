"""The tensors that a pass over one layer and direction reads, and their gradients."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class LayerTensors(NamedTuple):
    """The tensors of a layer and direction, or their gradients."""

    weight_ih: Tensor | None
    """(gate_rows, input_size)."""
    weight_hh: Tensor | None
    """(gate_rows, half)."""
    bias: Tensor | None = None
    """(gate_rows,)."""
    delta: Tensor | None = None
    """Perturbation of weight_hh, see `RecurrentPerturbation`."""
    signs_in: Tensor | None = None
    """Its signs, int8, (batch, hidden_size); row n belongs to the n-th row of every step."""
    signs_out: Tensor | None = None
    """Likewise, (batch, gate_rows)."""

    def named(self) -> dict[str, Tensor | None]:
        """Those that may hold numbers that are not finite, by names for an error."""
        names = ("weight_ih", "weight_hh", "a bias", "the recurrent perturbation")
        return dict(zip(names, self, strict=False))


@dataclass
class Gradients:
    """Gradients that a backward sweep accumulates, in the dtype of the states."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    states: list[list[Tensor]]
    """Per half: of h (and c), each (batch, half); of the step that comes next."""
    delta: Tensor | None = None
    """None without a perturbation, or where its gradient is not wanted."""

    def tensors(self) -> LayerTensors:
        """Those of the layer's tensors."""
        return LayerTensors(self.weight_ih, self.weight_hh, self.bias, self.delta)
