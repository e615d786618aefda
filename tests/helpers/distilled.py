"""Banks of samples of known distributions, and a small APDModule for them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revflip.apd import Codec, ParameterCodec
from lightning_revflip.modules import APDModule, SampleBankCodes
from lightning_revflip.posterior import ChainWriter, Layout, SampleBank

MODE = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 0.0, 0.0])
"""The two modes are at plus and minus this; the last two parameters are the same in both."""
SPREAD = 0.3
"""Standard deviation of each parameter around its mode."""


def network() -> nn.Linear:
    """Of 8 parameters."""
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def write_bank(path: Path, *chains: Tensor) -> SampleBank:
    """A bank of the rows of each chain, shape (n, 8)."""
    layout = Layout.of_parameters(network())
    for number, rows in enumerate(chains):
        settings: dict[str, Any] = {"max_samples": None, "dtype": torch.float32}
        with ChainWriter(path, layout, chain=number, **settings) as writer:
            for step, row in enumerate(rows):
                writer.append(step, row)
    return SampleBank(path)


def normal_rows(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Samples of a normal distribution of 8 correlated parameters, its mean and covariance."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) / 2
    mean = torch.linspace(-1, 1, 8)
    rows = mean + torch.randn(n, 8, generator=generator) @ factor.T
    return rows, mean, factor @ factor.T


def two_mode_rows(n: int, seed: int = 0) -> Tensor:
    """Samples of two modes with equal shares."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (n, 1), generator=generator) * 2.0 - 1
    return signs * MODE + SPREAD * torch.randn(n, 8, generator=generator)


def codes_of(bank: SampleBank, **settings: Any) -> tuple[Codec, SampleBankCodes]:
    """A codec of rank 4, and batches of 5 times 32 codes."""
    codec = ParameterCodec.fit(bank, rank=4, residual="diagonal", dtype=torch.float32)
    usual = {"batch_size": 160, "batches_per_epoch": 5}
    return codec, SampleBankCodes(bank, codec, **usual | settings)


def small_apd(codec: Codec | None, seed: int = 0, **settings: Any) -> APDModule:
    """Trains fast on a few numbers."""
    torch.manual_seed(seed)
    wasserstein = {"critic_steps": 5, "gradient_penalty": 1.0, "r1": 0.0, "betas": (0.5, 0.9)}
    usual = {"hidden": (32, 32), "lr": 3e-3, "ema": 0.99, **wasserstein}
    return APDModule(codec, **usual | settings)


def rows_of(samples: dict[str, Tensor]) -> Tensor:
    """Stacked parameters as rows."""
    return torch.cat([values.flatten(1) for values in samples.values()], dim=1)
