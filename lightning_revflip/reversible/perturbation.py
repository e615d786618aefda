r"""Perturbed recurrent weights: one perturbation per pass, and signs for every sequence.

Flipout (Wen et al., 2018, arXiv 1803.04386) gives every sequence n of a batch its own weights from
one draw, by signs r_n and s_n that are +1 or -1 with equal probability:

    W_n = W + dW * (r_n s_n^T)        W_n x = W x + r_n * (dW (s_n * x))

The same dW and signs hold at all steps of a pass, so a half-step that is undone forms the gates
that it had. Nothing is drawn in here, and nothing is kept per step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RecurrentPerturbation:
    """What a pass adds to the recurrent weights of a layer and direction.

    `weight_hh` has the rows of both halves of the units, and each half sees the other one, so the
    perturbation of sequence n is, for half i and the i-th half of each tensor's last dimension
    (of `delta`, of its rows), `delta_i * outer(signs_out_i[n], signs_in_i[n])`.

    Args:
        delta: dW, shape (gate_rows, hidden_size / 2), in the dtype of `weight_hh`. Gradients flow
            back to what it was computed from.
        signs_in: s, shape (batch, hidden_size), +1 or -1 in any dtype; no gradient.
        signs_out: r, shape (batch, gate_rows), likewise. Without signs all sequences share the
            perturbation as it is.

    Raises:
        ValueError: if only one of the signs is given.

    Examples:
        >>> from lightning_revflip.reversible import RevGRU
        >>> class NoisyGRU(RevGRU):
        ...     def recurrent_perturbation(self, suffix, weight_hh, batch):
        ...         rows, half = weight_hh.shape
        ...         signs_in, signs_out = (
        ...             2 * torch.randint(2, (batch, size)) - 1 for size in (2 * half, rows)
        ...         )
        ...         return RecurrentPerturbation(
        ...             0.1 * torch.randn_like(weight_hh), signs_in, signs_out
        ...         )
        >>> output, h_n = NoisyGRU(8, 16)(torch.randn(70, 4, 8))
        >>> output.sum().backward()
    """

    delta: Tensor
    signs_in: Tensor | None = None
    signs_out: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.signs_in is None) != (self.signs_out is None):
            missing = "signs_in" if self.signs_in is None else "signs_out"
            raise ValueError(
                f"a recurrent perturbation takes signs_in and signs_out together, {missing} is "
                "missing. Give both, or neither for one perturbation of all sequences."
            )

    def check(self, name: str, weight_hh: Tensor, batch: int, hidden_size: int) -> None:
        """Raise unless this can perturb some weights.

        Args:
            name: of the weights.
            weight_hh: (gate_rows, hidden_size / 2).
            batch: sequences.
            hidden_size: units of both halves.

        Raises:
            ValueError: for another shape, dtype or device, or signs other than +1 and -1.
        """
        delta = self.delta
        same_kind = (delta.dtype, delta.device) == (weight_hh.dtype, weight_hh.device)
        if delta.shape != weight_hh.shape or not same_kind:
            raise ValueError(
                f"the perturbation of {name} must have its shape {tuple(weight_hh.shape)}, "
                f"{weight_hh.dtype} and {weight_hh.device}, got {tuple(delta.shape)}, "
                f"{delta.dtype} and {delta.device}."
            )
        columns = {"signs_in": hidden_size, "signs_out": len(weight_hh)}
        for field, size in columns.items():
            signs: Tensor | None = getattr(self, field)
            if signs is None:
                continue
            if tuple(signs.shape) != (batch, size) or signs.device != weight_hh.device:
                raise ValueError(
                    f"{field} of the perturbation of {name} must have shape {(batch, size)}, a row "
                    f"for each sequence, on {weight_hh.device}, got {tuple(signs.shape)} on "
                    f"{signs.device}."
                )
            if signs.dtype == torch.bool or not bool((signs.abs() == 1).all()):
                raise ValueError(
                    f"{field} of the perturbation of {name} must hold +1 and -1 only, got other "
                    f"values of {signs.dtype}. Use 2 * torch.randint(2, shape) - 1."
                )

    def signs(self, order: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """`signs_in` and `signs_out` as a pass keeps them, int8; None without signs.

        Args:
            order: which sequence stands in each row of the pass; None for the given order.
        """
        if self.signs_in is None or self.signs_out is None:
            return None
        rows = [signs.to(torch.int8) for signs in (self.signs_in, self.signs_out)]
        if order is not None:
            rows = [signs.index_select(0, order) for signs in rows]
        return rows[0], rows[1]
