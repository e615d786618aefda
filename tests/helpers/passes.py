"""One way to call either layer, and what the tests compare."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_revflip.reversible import RevGRU, RevLSTM
from lightning_revflip.reversible.sweep import SweepState

CELLS = (RevGRU, RevLSTM)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that depend on nothing but the arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(cell: type[Any], *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """A layer whose parameters depend on nothing but the arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cell(*args, **kwargs)


def initial_states(rnn: Any, batch: int, scale: float = 1.0, seed: int = 100) -> list[Tensor]:
    """h_0 (and c_0) that require gradients."""
    directions = 2 if rnn.bidirectional else 1
    shape = (rnn.num_layers * directions, batch, rnn.hidden_size)
    count = 1 if isinstance(rnn, RevGRU) else 2
    dtype = rnn.weight_ih_l0.dtype
    return [
        (scale * normal(*shape, seed=seed + i, dtype=dtype).clamp(-4, 4)).requires_grad_()
        for i in range(count)
    ]


def call(
    rnn: Any, x: Tensor | PackedSequence, states: Sequence[Tensor] = ()
) -> tuple[Any, list[Tensor]]:
    """Output and final states [h_n] or [h_n, c_n], for nn.GRU, nn.LSTM and their replacements."""
    if not states:
        output, final = rnn(x)
    else:
        output, final = rnn(x, states[0] if len(states) == 1 else tuple(states))
    return output, list(final) if isinstance(final, tuple) else [final]


def weighted_sum(tensors: Sequence[Tensor], seed: int = 7) -> Tensor:
    """A loss that depends on every element of `tensors` differently."""
    parts = [(t * normal(*t.shape, seed=seed + i).to(t.dtype)).sum() for i, t in enumerate(tensors)]
    return torch.stack([part.double() for part in parts]).sum()


def gradients(loss: Tensor, named: Mapping[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
    """Gradients of everything in `named` that requires one."""
    wanted = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, **kwargs)
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(wanted.items(), found, strict=True)
    }


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    difference = (found.double() - truth.double()).norm().item()
    return difference / max(truth.double().norm().item(), 1e-300) if difference else 0.0


def assert_close(
    found: Mapping[str, Tensor], truth: Mapping[str, Tensor], tolerance: float
) -> None:
    """Every named tensor within a relative error, and the truth is not trivially zero."""
    assert found.keys() == truth.keys()
    assert any(tensor.abs().sum() > 0 for tensor in truth.values())
    errors = {name: relative_error(found[name], truth[name]) for name in truth}
    assert all(error <= tolerance for error in errors.values()), errors  # a NaN fails as well


def saved_by(call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """What `call()` returns, and the tensors that it saves for backward."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        return call(), saved


@dataclass(frozen=True)
class Recovered:
    """What a backward pass over one layer and direction arrived at."""

    states: list[Tensor]
    """h (and c) as float64, which holds the fixed-point numbers exactly."""
    empty: bool
    """Whether the information buffer holds nothing any more."""


@contextmanager
def recovered_states() -> Iterator[list[Recovered]]:
    """Collects what the backward passes inside the block recover, in the order of the layers."""
    found: list[Recovered] = []
    original = SweepState.check_is

    def check_is(self: SweepState, initial: SweepState) -> None:
        empty = not self.words and all(buffer.is_initial() for buffer in self.buffers)
        found.insert(0, Recovered(self.floats(torch.float64), empty))
        original(self, initial)

    with patch.object(SweepState, "check_is", check_is):
        yield found
