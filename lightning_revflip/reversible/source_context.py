"""What a decoder attends to: kept units of the encoder, and embeddings that are made again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revflip.reversible.stack_sweep import StackPlan


@dataclass(frozen=True)
class PaddedContext:
    """What a decoder attends to, in memory: for decoding step by step.

    Args:
        context: (batch, source steps, D).
        mask: bool, (batch, source steps), which steps are real.
    """

    context: Tensor
    mask: Tensor

    def padded(
        self, slices: Tensor, embedded: None, order: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor]:
        """As that of a `SourceContext`; `slices` is the context, or stands for it."""
        context, mask = slices, self.mask
        if order is not None:
            context, mask = context.index_select(0, order[:count]), mask[order[:count]]
        return context[:count], mask[:count]

    def select(self, rows: Tensor) -> PaddedContext:
        """The context of some sequences, (rows,) int64; a sequence may occur more than once."""
        return PaddedContext(self.context.index_select(0, rows), self.mask[rows])

    @property
    def size(self) -> int:
        """D."""
        return self.context.shape[-1]

    @property
    def slices(self) -> Tensor:
        """What gradients flow through: all of the context."""
        return self.context

    @property
    def embedded(self) -> None:
        """None: it is part of the context already."""


@dataclass(frozen=True)
class SourceContext:
    """What a `RevEncoder` returns for attention: kept units, and how to make the rest again.

    Args:
        slices: the kept units after every step, (rows, k), step after step as in a PackedSequence.
        embedded: stands for what the embedding returned, (rows, features), see `stand_in`; None
            if the context is without it. Gradients flow through both into the encoder.
        index: int64, (batch, source steps), the row of each step; 0 for padding.
        mask: bool, of the same shape, which steps are real.
        plan: of the encoder's pass.
        tokens: the source, (rows,).
        modes: training flags of the embedding and the modules in it.
    """

    slices: Tensor
    embedded: Tensor | None
    index: Tensor
    mask: Tensor
    plan: StackPlan
    tokens: Tensor
    modes: tuple[bool, ...]

    @property
    def size(self) -> int:
        """D, features of a step."""
        return self.slices.shape[1] + (0 if self.embedded is None else self.embedded.shape[1])

    def padded(
        self, slices: Tensor, embedded: Tensor | None, order: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor]:
        """Context and mask of some sequences.

        Args:
            slices: `self.slices`, or a tensor in its place by which to differentiate.
            embedded: likewise of `self.embedded`.
            order: int64, (batch,), of the sequences; None: as the encoder got them.
            count: how many of them, from the first.

        Returns:
            (count, source steps, D), and bool, (count, source steps).
        """
        index, mask = self.index, self.mask
        if order is not None:
            index, mask = index[order], mask[order]
        index, mask = index[:count], mask[:count]
        rows = slices
        if embedded is not None:
            rows = torch.cat([self._embed_again() + embedded, slices], dim=1)
        return rows.index_select(0, index.flatten()).view(*index.shape, -1), mask

    @torch.no_grad()
    def _embed_again(self) -> Tensor:
        """What the encoder's embedding returned for all steps: (rows, features)."""
        plan = self.plan
        if training_flags(plan.fronts[0]) != self.modes:
            raise ValueError(
                "The encoder's embedding is in another mode now than when it read the source, so "
                "that its dropout would differ. Call train() or eval() before the encoder, and not "
                "before its context has been used."
            )
        size = plan.schedule.chunk_steps
        parts = []
        with plan.replay.running():
            for number, first in enumerate(range(0, plan.layout.steps, size)):
                steps = range(first, min(first + size, plan.layout.steps))
                packed = plan.layout.packed_rows(steps, self.tokens.device)
                with plan.replay.at(number, 0, packed=packed), plan.autocast.restored():
                    parts.append(plan.fronts[0](plan.layout.cut(self.tokens, steps)))
        return torch.cat(parts)

    def in_memory(self) -> PaddedContext:
        """The context of the whole batch, for decoding step by step."""
        everything = self.padded(self.slices, self.embedded, None, len(self.index))
        return PaddedContext(*everything)


def training_flags(front: Any) -> tuple[bool, ...]:
    """Of a module and all in it; nothing for a function."""
    return tuple(part.training for part in front.modules()) if isinstance(front, nn.Module) else ()
