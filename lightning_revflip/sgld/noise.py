"""Normal noise, of which a step draws all that a group of parameters needs at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_revflip.sgld.native import LIBRARY


class NoiseSource:
    """Seeds of noise, from a generator on the CPU whatever the device of the parameters.

    So its state resumes a run on any device. The numbers of a seed are the same in one build of
    torch on one kind of device; with and without a C compiler they differ.

    Args:
        generator: a CPU generator. None: one that starts from a draw of torch's global generator.

    Raises:
        ValueError: for a generator of another device.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        if generator.device.type != "cpu":
            raise ValueError(
                "generator must be on the CPU, where seeds are drawn for all devices, got one on "
                f"{generator.device}. Use torch.Generator()."
            )
        self.generator = generator

    def seed(self) -> int:
        """A fresh seed."""
        return int(torch.randint(2**62, (), generator=self.generator))


def normal(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Standard normal numbers in the shapes of some tensors of one dtype and device."""
    sizes = [each.numel() for each in like]
    flat = torch.empty(sum(sizes), device=like[0].device, dtype=like[0].dtype)
    if flat.device.type == "cpu" and flat.dtype == torch.float32 and LIBRARY.available:
        LIBRARY.call("normal", flat.numel(), seed, flat)
    else:
        flat.normal_(generator=torch.Generator(flat.device).manual_seed(seed))
    parts = torch.split(flat, sizes)
    return [part.view(each.shape) for part, each in zip(parts, like, strict=True)]
