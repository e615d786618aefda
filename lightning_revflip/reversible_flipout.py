"""RevGRU and RevLSTM with perturbed recurrent weights: both methods in one layer.

Each sequence n of a batch has its own recurrent weights W + dW * (r_n s_n^T), the same at all of
its steps, in the forward sweep and when that is undone. So reversal stays exact, and what is kept
beyond the layer's own is one dW and one byte per sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_revflip.flipout.layer import Estimator, PerturbedLayer
from lightning_revflip.flipout.perturbation_sample import sample
from lightning_revflip.flipout.perturbations import Perturbation
from lightning_revflip.reversible import RecurrentPerturbation, RevGRU, RevLSTM
from lightning_revflip.reversible.rnn_base import ReversibleRNNBase


class _FlipoutReversible(PerturbedLayer, ReversibleRNNBase):
    """What both layers have in common; mixed in before the reversible class."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        max_forget_bits: float | None = 3.0,
        chunk_steps: int | None = None,
        forget_bias: float = 0.0,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        perturbation: Perturbation | None = None,
        estimator: Estimator = "flipout",
        base_perturbations: int = 1,
        perturbed: Sequence[str] = ("weight_hh",),
    ) -> None:
        self._check_limits(base_perturbations, perturbed)
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            max_forget_bits=max_forget_bits,
            chunk_steps=chunk_steps,
            forget_bias=forget_bias,
            proj_size=proj_size,
            device=device,
            dtype=dtype,
        )
        self._perturb(perturbation, estimator, base_perturbations)

    @classmethod
    def check_upgrade(cls, module: nn.Module, **arguments: Any) -> None:
        """Raise a ValueError if `upgrade` could not be called; changes nothing."""
        limited = ("base_perturbations", "perturbed")
        cls._check_limits(**{name: arguments[name] for name in limited if name in arguments})
        super().check_upgrade(module, **arguments)

    @classmethod
    def _check_limits(
        cls, base_perturbations: int = 1, perturbed: Sequence[str] = ("weight_hh",)
    ) -> None:
        """Raise a ValueError for what the layers of torch allow, and these do not."""
        if base_perturbations != 1:
            raise ValueError(
                f"{cls.__name__} has one base perturbation per batch, got base_perturbations="
                f"{base_perturbations}. Use 1, or nn.LSTM and FlipoutLSTM."
            )
        if list(perturbed) != ["weight_hh"]:
            raise ValueError(
                f"{cls.__name__} perturbs recurrent weights alone, got perturbed={perturbed}. "
                "Use perturbed=['weight_hh']."
            )

    def _configure(self, perturbed: Sequence[str] = ("weight_hh",)) -> None:
        """Nothing to set: `_check_limits` has seen that it is the recurrent weights."""

    @staticmethod
    def names_to_perturb(module: nn.Module, **arguments: Any) -> Sequence[str]:
        """Names of the recurrent weights."""
        return [name for name in module._parameters if name.startswith("weight_hh_l")]

    def perturbed_names(self) -> Sequence[str]:
        """Names of the recurrent weights, without the parameters of their perturbation."""
        return [f"weight_hh_{suffix}" for _, suffix in self._layers()]

    def recurrent_perturbation(
        self, suffix: str, weight_hh: Tensor, batch: int
    ) -> RecurrentPerturbation | None:
        """The dW and the signs of a layer and direction in this call."""
        draws = self.draws()
        if draws is None:
            return None
        name = f"weight_hh_{suffix}"
        draw = draws[name]
        delta = sample(self.perturbation, draw.weight_seed(0), weight_hh, self.spread(name))
        return RecurrentPerturbation(
            delta,
            draw.input_signs(batch, self.hidden_size, weight_hh),
            draw.output_signs(batch, len(weight_hh), weight_hh),
        )


class FlipoutRevGRU(_FlipoutReversible, RevGRU):
    """RevGRU whose recurrent weights are perturbed, see `FlipoutRevLSTM`."""

    unsupported: ClassVar[tuple[type[nn.Module], ...]] = ()


class FlipoutRevLSTM(_FlipoutReversible, RevLSTM):
    """RevLSTM whose recurrent weights are perturbed independently for each sequence.

    Flipout (Wen et al., 2018, arXiv 1803.04386) within the exact reversible pass (MacKay et al.,
    2018, arXiv 1810.10999). `DropConnect()` regularises as weight drop does, with weights of its
    own for each sequence in place of one mask per batch.

    Args:
        input_size: as for RevLSTM.
        hidden_size: as for RevLSTM.
        num_layers: as for RevLSTM.
        bias: as for RevLSTM.
        batch_first: as for RevLSTM.
        dropout: as for RevLSTM.
        bidirectional: as for RevLSTM.
        max_forget_bits: as for RevLSTM.
        chunk_steps: as for RevLSTM.
        forget_bias: as for RevLSTM.
        proj_size: only 0, as for RevLSTM.
        device: of the parameters.
        dtype: of the parameters.
        perturbation: how the recurrent weights are perturbed; by default `Gaussian()`.
        estimator: `flipout` or `shared`.
        base_perturbations: only 1; present because FlipoutLSTM has it.
        perturbed: only `("weight_hh",)`, likewise.

    Raises:
        ValueError: for settings that do not fit together.

    Examples:
        >>> from lightning_revflip.flipout import DropConnect
        >>> rnn = FlipoutRevLSTM(8, 16, perturbation=DropConnect())
        >>> output, (h_n, c_n) = rnn(torch.randn(70, 4, 8))
        >>> output.sum().backward()
    """

    unsupported: ClassVar[tuple[type[nn.Module], ...]] = ()


REVERSIBLE_FLIPOUT_LAYERS: dict[type[nn.Module], type[PerturbedLayer]] = {
    RevGRU: FlipoutRevGRU,
    RevLSTM: FlipoutRevLSTM,
}
"""The flipout layer of each reversible one: rules for `lightning_revflip.convert.convert`."""
