"""`FlipoutLinear`: nn.Linear with perturbed weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_revflip.flipout.draw import Draw
from lightning_revflip.flipout.layer import Estimator, PerturbedLayer
from lightning_revflip.flipout.linear_maps import MatrixProduct
from lightning_revflip.flipout.noise import derive, normal
from lightning_revflip.flipout.perturbations import Perturbation
from lightning_revflip.flipout.perturbed import perturbed_map


class FlipoutLinear(PerturbedLayer, nn.Linear):
    """A linear layer whose weights are perturbed independently for each example.

    With estimator `flipout`, example n sees W + dW * (r_n s_n^T), at the price of a second matrix
    product (Wen et al., 2018, arXiv 1803.04386). `local_reparameterization` draws the outputs
    instead (Kingma et al., 2015, arXiv 1506.02557), which has less variance where each example
    passes once; `shared` perturbs all examples alike. The bias is not perturbed.

    Args:
        in_features: as for nn.Linear.
        out_features: as for nn.Linear.
        bias: as for nn.Linear.
        device: of the parameters.
        dtype: of the parameters.
        perturbation: how weights are perturbed; by default `Gaussian()`.
        estimator: `flipout`, `local_reparameterization` (Gaussian noise, inputs of at most two
            dimensions) or `shared`.
        base_perturbations: how many independent dW a batch gets; more have less variance of the
            gradients by `rho`, and cost a weight's worth of noise each.
        example_dim: which dimension of the input counts examples; signs are constant over the
            others, for example over the time of (batch, time, features).

    Raises:
        ValueError: for settings that do not fit together, or an input without that dimension.

    Examples:
        >>> layer = FlipoutLinear(20, 5)
        >>> layer(torch.randn(8, 20)).shape, layer.weight_rho.shape
        (torch.Size([8, 5]), torch.Size([5, 20]))
    """

    supports_local_reparameterization = True
    unsupported = (nn.Bilinear,)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        perturbation: Perturbation | None = None,
        estimator: Estimator = "flipout",
        base_perturbations: int = 1,
        example_dim: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._configure(example_dim)
        self._perturb(perturbation, estimator, base_perturbations)

    def _configure(self, example_dim: int = 0) -> None:
        self.example_dim = example_dim

    def forward(self, input: Tensor) -> Tensor:
        """Outputs (..., out_features) of inputs (..., in_features).

        An input of one dimension is one example.
        """
        draws = self.draws()
        if draws is None:
            return F.linear(input, self.weight, self.bias)
        if input.dim() == 1:
            return self._perturbed(input.unsqueeze(0), draws["weight"]).squeeze(0)
        last = input.dim() - 1
        if not -last - 1 <= self.example_dim < last or self.example_dim == -1:
            raise ValueError(
                f"example_dim={self.example_dim} is no dimension of examples in an input of shape "
                f"{tuple(input.shape)}, whose last dimension holds features. Use example_dim=0 if "
                "examples come first."
            )
        x = input.movedim(self.example_dim, 0)
        return self._perturbed(x, draws["weight"]).movedim(0, self.example_dim)

    def _perturbed(self, x: Tensor, draw: Draw) -> Tensor:
        """The output for examples (examples, ..., in_features)."""
        spread = self.spread("weight")
        if self.estimator == "local_reparameterization" and draw.signed:
            return self._local(x, draw)
        arguments = (draw, x, self.weight, self.bias, spread)
        return perturbed_map(MatrixProduct(), self.perturbation, *arguments)

    def _local(self, x: Tensor, draw: Draw) -> Tensor:
        """Normal outputs with the mean and the variance that perturbed weights give them."""
        if x.dim() > 2:
            raise ValueError(
                "local reparameterization takes inputs (examples, features), got shape "
                f"{tuple(x.shape)}: rows of one example share their weights, so that outputs are "
                "not independent. Use estimator='flipout'."
            )
        output = F.linear(x, self.weight, self.bias)
        scale = self.perturbation.scale(self.weight, *self.spread("weight"))
        variance = F.linear(x.square(), scale.square())
        # Without slope where an example is all 0, rather than an infinite one.
        std = variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
        noise = torch.randn_like(std) if draw.seed is None else normal(std, derive(draw.seed, 0))
        return output + std * noise

    def extra_repr(self) -> str:
        """The arguments that are not usual."""
        text = super().extra_repr()
        return text if self.example_dim == 0 else f"{text}, example_dim={self.example_dim}"
