"""A language model as a ReversibleSequence and as a user writes it, with the same parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_revflip.reversible import ReversibleSequence, RevLSTM
from tests.helpers.passes import gradients

VOCABULARY, FEATURES, HIDDEN = 11, 6, 8
DOUBLE = 1e-9
"""Relative error that float64 gradients stay below."""


class Loss(nn.Linear):
    """A summed cross-entropy; with weights, each step counts so much."""

    def forward(self, hidden: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:  # type: ignore[override]
        losses = F.cross_entropy(
            super().forward(hidden).flatten(0, -2), target.flatten(), reduction="none"
        )
        return (losses if weight is None else losses * weight.flatten()).sum() / 10


class Plain(nn.Module):
    """The modules of a sequence, called on all steps at once by ordinary autograd."""

    def __init__(self, sequence: ReversibleSequence) -> None:
        super().__init__()
        self.sequence = sequence

    def forward(
        self, inputs: Any, state: Any = None, *per_step: Any, **shared: Any
    ) -> tuple[Any, Any]:
        parts = inputs if type(inputs) is tuple else (inputs,)
        hidden = self.sequence.read_in(*parts)
        states = [state] if self.sequence.single else state or [None] * len(self.sequence.rnns)
        finals = []
        for number, (rnn, start) in enumerate(zip(self.sequence.rnns, states, strict=True)):
            if number and len(self.sequence.between):
                hidden = self.sequence.between[number - 1](hidden)
            hidden, final = rnn(hidden, start)
            finals.append(final)
        result = self.sequence.read_out(hidden, *per_step, **shared)
        return result, finals[0] if self.sequence.single else finals


def language_model(
    cell: type[Any] = RevLSTM, num_layers: int = 1, read_out: nn.Module | None = None, **kwargs: Any
) -> ReversibleSequence:
    """A small model in float64 whose parameters depend on nothing but the arguments."""
    layer = {"num_layers": num_layers, "dropout": kwargs.pop("dropout", 0.0)}
    layer |= {k: kwargs.pop(k) for k in ("batch_first", "max_forget_bits") if k in kwargs}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sequence = ReversibleSequence(
            nn.Embedding(VOCABULARY, FEATURES),
            cell(FEATURES, HIDDEN, **layer),
            read_out or Loss(HIDDEN, VOCABULARY),
            **kwargs,
        )
    return sequence.double()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random tokens of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, shape, generator=generator)


def as_state(parts: Sequence[Tensor]) -> Any:
    """h, or (h, c), as a layer takes it."""
    return parts[0] if len(parts) == 1 else tuple(parts)


def as_parts(state: Any) -> list[Tensor]:
    """[h] or [h, c]."""
    return list(state) if isinstance(state, tuple) else [state]


def loss_and_gradients(
    model: nn.Module, named: Mapping[str, Tensor], *args: Any, **kwargs: Any
) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """Loss, state, and the gradients of the loss times 3 (a scaler's factor)."""
    loss, state = model(*args, **kwargs)
    return loss, state, gradients(3.0 * loss, named)
