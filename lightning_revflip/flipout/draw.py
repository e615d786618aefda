"""What a layer draws in one call, as seeds."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lightning_revflip.flipout.noise import derive, signs

_WEIGHT, _INPUT, _OUTPUT = range(3)


@dataclass(frozen=True)
class Draw:
    """The random numbers of one weight in one call; all follow from the seed.

    Example n of N is perturbed by dW_m * (r_n s_n^T), with m the group of n: the examples are cut
    into `base_perturbations` groups of neighbours, as equal as can be.
    """

    seed: int | None
    """None: from torch's global generators, where torch transforms or compiles the code."""
    signed: bool = True
    """Whether examples have signs; else those of a group share dW as it is."""
    base_perturbations: int = 1

    def weight_seed(self, group: int) -> int | None:
        """Seed of dW of a group."""
        return None if self.seed is None else derive(self.seed, _WEIGHT, group)

    def groups(self, examples: int) -> list[slice]:
        """The examples of each group that has any."""
        count = max(1, min(self.base_perturbations, examples))
        bounds = [examples * group // count for group in range(count + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]

    def input_signs(self, examples: int, features: int, like: Tensor) -> Tensor | None:
        """s, shape (examples, features), in dtype and device of `like`; None without signs."""
        return self._signs(_INPUT, examples, features, like)

    def output_signs(self, examples: int, features: int, like: Tensor) -> Tensor | None:
        """r, as `input_signs`."""
        return self._signs(_OUTPUT, examples, features, like)

    def _signs(self, which: int, examples: int, features: int, like: Tensor) -> Tensor | None:
        if not self.signed:
            return None
        if self.seed is None:
            bits = torch.randint(2, (examples, features), device=like.device)
            return (1 - 2 * bits).to(like.dtype)
        return signs((examples, features), derive(self.seed, which), like.dtype, like.device)
