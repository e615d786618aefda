"""Samplers under settings where everything matters, and steps of them."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_revflip.sgld import PSGLD, SGHMC, SGLD, LangevinOptimizer
from tests.helpers.langevin import ReferencePSGLD, ReferenceSGHMC, ReferenceSGLD

SAMPLERS: dict[str, tuple[Any, type[ReferenceSGLD], dict[str, Any]]] = {
    "sgld": (SGLD, ReferenceSGLD, {}),
    "psgld": (PSGLD, ReferencePSGLD, {"stabilizer": 0.1, "smoothing": 0.7, "adaptation_steps": 5}),
    "sghmc": (SGHMC, ReferenceSGHMC, {"friction": 0.3}),
}
SHAPES = [(7, 5), (1500,), (), (3, 2, 2)]  # together longer than one round of the compiled noise

each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
list_and_flat = pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(SHAPES)]


def build(sampler: str, params: Any, **changes: Any) -> LangevinOptimizer:
    """An optimizer with settings under which prior, gradient and noise all matter."""
    make, _, settings = SAMPLERS[sampler]
    usual = {"lr": 0.1, "num_data": 10, "temperature": 0.5, "prior_precision": 3.0}
    if "generator" not in changes:
        changes["generator"] = torch.Generator().manual_seed(5)
    optimizer: LangevinOptimizer = make(params, **usual | settings | changes)
    return optimizer


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """Gradients that depend on the number of the step, and on the place in the list."""
    for i, param in enumerate(params):
        param.grad = normal(*param.shape, seed=1000 * step + i, dtype=param.dtype)


def take_steps(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: Any) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def trajectory(sampler: str, steps: int = 8, **changes: Any) -> list[Tensor]:
    """Where a sampler is after some steps."""
    params = parameters()
    take_steps(build(sampler, params, **changes), params, range(steps))
    return values(params)


def values(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def through_file(state: Any) -> Any:
    """What is loaded of a saved state, with the weights-only loader."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
