"""RevGRU and RevLSTM with perturbed recurrent weights, and what these are for each sequence."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_revflip.reversible import RecurrentPerturbation, RevGRU, RevLSTM
from tests.helpers.passes import make, normal

DELTA = "delta_"
"""What the names of the parameters that hold perturbations begin with."""


def signs(*shape: int, seed: int = 0) -> Tensor:
    """Signs +1 and -1 that depend on nothing but the arguments."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randint(2, shape, generator=generator) - 1.0


class _Perturbed:
    """Adds a parameter `delta_<suffix>` for each direction of a layer.

    Signs are a function of suffix and batch, so that every call has the same ones.
    """

    calls: list[str]
    """Suffixes for which a perturbation was asked."""

    def perturb(self) -> None:
        """Make the perturbations, in the dtype of the weights."""
        self.calls = []
        for number, (_, suffix) in enumerate(self._layers()):  # type: ignore[attr-defined]
            weight = getattr(self, f"weight_hh_{suffix}")
            # Of the size of the weights; larger ones make a chaos of rounding errors in float32.
            scale = weight.shape[1] ** -0.5 / 2
            delta = scale * normal(*weight.shape, seed=50 + number, dtype=weight.dtype)
            setattr(self, DELTA + suffix, nn.Parameter(delta))

    def recurrent_perturbation(
        self, suffix: str, weight_hh: Tensor, batch: int
    ) -> RecurrentPerturbation:
        self.calls.append(suffix)
        return RecurrentPerturbation(getattr(self, DELTA + suffix), *self.signs_of(suffix, batch))

    def signs_of(self, suffix: str, batch: int) -> tuple[Tensor, Tensor]:
        """Signs in and out, of the dtype of the weights."""
        weight: Tensor = getattr(self, f"weight_hh_{suffix}")
        seed = sum(map(ord, suffix))
        signs_in = signs(batch, 2 * weight.shape[1], seed=seed)
        return signs_in.to(weight), signs(batch, len(weight), seed=seed + 1).to(weight)


class PerturbedGRU(_Perturbed, RevGRU):
    """RevGRU with a perturbation that can be learnt."""


class PerturbedLSTM(_Perturbed, RevLSTM):
    """RevLSTM with a perturbation that can be learnt."""


PERTURBED = {RevGRU: PerturbedGRU, RevLSTM: PerturbedLSTM}


def perturbed(cell: type[Any], *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """A perturbed RevGRU or RevLSTM whose parameters depend on nothing but the arguments."""
    rnn = make(PERTURBED[cell], *args, seed=seed, **kwargs)
    rnn.perturb()
    return rnn


def plain(rnn: Any) -> Any:
    """The RevGRU or RevLSTM with the settings and weights of a perturbed layer."""
    (kind,) = (kind for kind in PERTURBED if isinstance(rnn, kind))
    layer = kind.from_standard(
        rnn, max_forget_bits=rnn.max_forget_bits, chunk_steps=rnn.chunk_steps
    ).to(rnn.weight_ih_l0)
    layer.load_state_dict(
        {name: value for name, value in rnn.state_dict().items() if not name.startswith(DELTA)}
    )
    return layer


def explicit_weights(rnn: Any, batch: int) -> dict[str, Tensor]:
    """The parameters, with W + dW * (r_n s_n^T) of every sequence as its recurrent weights.

    Autograd goes through; `weight_hh` has shape (batch, gate_rows, half).
    """
    found: dict[str, Tensor] = {}
    for name, parameter in rnn.named_parameters():
        if name.startswith("weight_hh"):
            suffix = name.removeprefix("weight_hh_")
            signs_in, signs_out = rnn.signs_of(suffix, batch)
            seen = signs_in.unflatten(1, (2, 1, -1))  # batch, half-step, 1, half
            rows = signs_out.unflatten(1, (2, -1, 1))  # batch, half-step, rows, 1
            signed = (seen * rows).flatten(1, 2)
            found[name] = parameter + getattr(rnn, DELTA + suffix) * signed
        elif not name.startswith(DELTA):
            found[name] = parameter
    return found
