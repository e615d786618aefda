"""`FlipoutConv1d`, `FlipoutConv2d`, `FlipoutConv3d`: convolutions with perturbed weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_revflip.flipout.layer import Estimator, PerturbedLayer
from lightning_revflip.flipout.linear_maps import Convolution
from lightning_revflip.flipout.perturbations import Perturbation
from lightning_revflip.flipout.perturbed import perturbed_map

Size = int | tuple[int, ...]
"""One number for all dimensions of space, or one for each."""


def padded_input(conv: nn.modules.conv._ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input of a convolution, and how much of zeros it still has to pad."""
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return x, conv.padding
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, conv._reversed_padding_repeated_twice, mode), (0,) * len(conv.kernel_size)


class _FlipoutConv(PerturbedLayer, nn.modules.conv._ConvNd):
    """What the three have in common; mixed in before the nn class."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        perturbation: Perturbation | None = None,
        estimator: Estimator = "flipout",
        base_perturbations: int = 1,
    ) -> None:
        options: Any = (padding, dilation, groups, bias, padding_mode, device, dtype)
        # nn.Conv1d to nn.Conv3d take fewer arguments than nn.modules.conv._ConvNd.
        plain: Any = super().__init__
        plain(in_channels, out_channels, kernel_size, stride, *options)
        self._perturb(perturbation, estimator, base_perturbations)

    def forward(self, input: Tensor) -> Tensor:
        """As the plain convolution; an input without a batch dimension is one example."""
        draws = self.draws()
        if draws is None:
            return super().forward(input)  # type: ignore[no-any-return]
        space = len(self.kernel_size)
        if input.dim() not in (space + 1, space + 2):
            raise ValueError(
                f"{type(self).__name__} takes (examples, channels{', space' * space}) or the "
                f"same without examples, got shape {tuple(input.shape)}."
            )
        batched = input.dim() == space + 2
        x, padding = padded_input(self, input if batched else input.unsqueeze(0))
        convolution = Convolution(self.stride, padding, self.dilation, self.groups)
        arguments = (draws["weight"], x, self.weight, self.bias, self.spread("weight"))
        output = perturbed_map(convolution, self.perturbation, *arguments)
        return output if batched else output.squeeze(0)


class FlipoutConv1d(_FlipoutConv, nn.Conv1d):
    """nn.Conv1d with perturbed weights, see `FlipoutConv2d`."""

    unsupported = (nn.ConvTranspose1d,)


class FlipoutConv2d(_FlipoutConv, nn.Conv2d):
    """nn.Conv2d whose weights are perturbed independently for each example.

    Signs belong to an example and a channel, and are constant over space: an example sees one set
    of weights everywhere (Wen et al., 2018, arXiv 1803.04386). The bias is not perturbed.

    Args:
        in_channels: as for nn.Conv2d.
        out_channels: as for nn.Conv2d.
        kernel_size: as for nn.Conv2d.
        stride: as for nn.Conv2d.
        padding: as for nn.Conv2d.
        dilation: as for nn.Conv2d.
        groups: as for nn.Conv2d.
        bias: as for nn.Conv2d.
        padding_mode: as for nn.Conv2d.
        device: of the parameters.
        dtype: of the parameters.
        perturbation: how weights are perturbed; by default `Gaussian()`.
        estimator: `flipout` or `shared`.
        base_perturbations: how many independent dW a batch gets.

    Raises:
        ValueError: for settings that do not fit together, such as local reparameterization.

    Examples:
        >>> layer = FlipoutConv2d(3, 16, kernel_size=3, padding=1)
        >>> layer(torch.randn(8, 3, 32, 32)).shape
        torch.Size([8, 16, 32, 32])
    """

    unsupported = (nn.ConvTranspose2d,)


class FlipoutConv3d(_FlipoutConv, nn.Conv3d):
    """nn.Conv3d with perturbed weights, see `FlipoutConv2d`."""

    unsupported = (nn.ConvTranspose3d,)
