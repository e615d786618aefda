"""The two networks of APD: one makes codes of random numbers, the other judges them.

Both are those of Wang et al. (2018), three hidden layers of 100 ReLUs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_revflip.posterior.fitted import normal_rows


class Generator(nn.Module):
    """Codes of latent vectors, which are drawn from N(0, 1).

    Args:
        latent_size: numbers of a latent vector.
        code_size: numbers of a code.
        hidden: units of each hidden layer.
        skip: g(z) = z + f(z) with f = 0 at first, instead of g(z) = f(z). On whitened codes the
            generator then starts as the low-rank Gaussian, and learns what differs from it.

    Raises:
        ValueError: for sizes below 1, and for `skip` between different sizes.

    Examples:
        >>> generator = Generator(8, 8, hidden=[16], skip=True)
        >>> z = generator.draw_latents(3)
        >>> generator(z).equal(z)
        True
    """

    def __init__(
        self,
        latent_size: int,
        code_size: int,
        hidden: Sequence[int] = (100, 100, 100),
        skip: bool = False,
    ) -> None:
        super().__init__()
        if skip and latent_size != code_size:
            raise ValueError(
                "a generator with skip adds to its latent vector, so latent_size and code_size "
                f"must be equal, got {latent_size} and {code_size}."
            )
        self.latent_size = latent_size
        self.code_size = code_size
        self.hidden = tuple(hidden)
        self.skip = skip
        self.layers = _mlp([latent_size, *self.hidden, code_size])
        self.skip_weight: Tensor | None
        self.register_buffer("skip_weight", torch.eye(code_size) if skip else None)
        """The identity, until `standardized` changes it; shape (code_size, code_size)."""
        if skip:
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    @property
    def last(self) -> nn.Linear:
        """The layer that makes the codes."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, latents: Tensor) -> Tensor:
        """Codes of latent vectors.

        Args:
            latents: shape (n, latent_size).

        Returns:
            Shape (n, code_size).
        """
        codes: Tensor = self.layers(latents)
        return codes if self.skip_weight is None else codes + latents @ self.skip_weight.T

    def draw_latents(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw latent vectors.

        Args:
            n: how many.
            generator: a CPU generator to draw from; None: torch's global one.

        Returns:
            Shape (n, latent_size), on the device and in the dtype of the network.
        """
        latents = normal_rows(n, self.latent_size, generator)
        return latents.to(next(self.parameters()))

    def settings(self) -> dict[str, Any]:
        """The arguments that make a generator of the same sizes, as plain values."""
        return {
            "latent_size": self.latent_size,
            "code_size": self.code_size,
            "hidden": list(self.hidden),
            "skip": self.skip,
        }


@torch.no_grad()
def standardized(
    generator: Generator,
    random: torch.Generator | None = None,
    n: int = 20_000,
    max_stretch: float = 4.0,
) -> Generator:
    """A copy of a generator whose codes have mean 0, variance 1 and no correlation.

    Those are the moments of whitened codes of samples. A generator that is trained for a short time
    misses them, most often by varying too little. The linear map that gives its codes these moments
    is taken into its last layer. Not for the codes of an `IdentityCodec`, whose moments are others.

    Args:
        generator: makes whitened codes.
        random: a CPU generator, draws latent vectors; None: torch's global one.
        n: number of codes of which the moments are taken.
        max_stretch: no direction is stretched more than this, however little codes vary in it.

    Returns:
        A generator of the same sizes.

    Raises:
        ValueError: for n that is not above the size of a code.
    """
    if n <= generator.code_size:
        raise ValueError(
            f"the covariance of codes of {generator.code_size} numbers takes more codes than that, "
            f"got n={n}."
        )
    codes = generator(generator.draw_latents(n, random)).double()
    mean = codes.mean(0)
    deviations = codes - mean
    variances, directions = torch.linalg.eigh(deviations.T @ deviations / (n - 1))
    stretches = variances.clamp_min(max_stretch**-2).rsqrt()
    whitening = (directions * stretches) @ directions.T
    result = copy.deepcopy(generator)
    last = result.last
    last.weight.copy_(whitening @ last.weight.double())
    last.bias.copy_(whitening @ (last.bias.double() - mean))
    if result.skip_weight is not None:
        result.skip_weight.copy_(whitening @ result.skip_weight.double())
    return result


class Critic(nn.Module):
    """A number for each code, high where it takes the code for that of a real sample.

    Args:
        code_size: numbers of a code.
        hidden: units of each hidden layer.
        spectral_norm: divide each weight matrix by its largest singular value (Miyato et al., 2018,
            arXiv 1802.05957), so that the critic has a Lipschitz constant of at most 1.

    Raises:
        ValueError: for sizes below 1.
    """

    def __init__(
        self,
        code_size: int,
        hidden: Sequence[int] = (100, 100, 100),
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.layers = _mlp([code_size, *hidden, 1])
        if spectral_norm:
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    parametrizations.spectral_norm(layer)

    def forward(self, codes: Tensor) -> Tensor:
        """What the critic makes of codes.

        Args:
            codes: shape (n, code_size).

        Returns:
            Shape (n,).
        """
        values: Tensor = self.layers(codes)
        return values.squeeze(-1)


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these sizes with ReLUs between them."""
    if min(sizes) < 1:
        raise ValueError(f"all sizes must be at least 1, got {', '.join(map(str, sizes))}.")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
