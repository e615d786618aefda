"""Tries the modules of a `ReversibleSequence` on a few steps before they are relied on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revflip.reversible.layout import Layout
from lightning_revflip.reversible.results import checked_result
from lightning_revflip.reversible.sequence_pass import Modules
from lightning_revflip.reversible.stack_sweep import StackPlan

_STEPS = 4
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative: more than rounding changes, less than any mistake that matters."""
_LOW_PRECISION = 0.02


def check_modules(
    plan: StackPlan,
    modules: Modules,
    read_out: nn.Module,
    widths: Sequence[int],
    inputs: Sequence[Tensor],
    per_step: Sequence[Tensor | None],
    shared: Mapping[str, Any],
) -> bool:
    """Check that modules can be replayed and treat time steps alike.

    They run on a few steps from the middle of the inputs and on random hidden states, without a
    trace in torch's generators.

    Args:
        plan: of the pass to come.
        modules: all of them, with their parameters.
        read_out: the module.
        widths: hidden units of each layer.
        inputs: arguments of the read-in.
        per_step: arguments of the read-out.
        shared: keyword arguments of the read-out.

    Returns:
        Whether the read-out returns a loss.

    Raises:
        ValueError: saying which module does what it must not.
    """
    layout = plan.layout
    first = max(0, (layout.steps - _STEPS) // 2)
    steps = range(first, min(layout.steps, first + _STEPS))
    rows = layout.rows(steps)
    generator = torch.Generator().manual_seed(0)
    known = list(modules.parameters())

    def hidden(width: int) -> Tensor:
        numbers = torch.randn(rows.stop - rows.start, width, generator=generator)
        return layout.unflat(numbers.to(inputs[0].device, plan.products.dtype), steps)

    def cut(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [None if tensor is None else layout.cut(tensor, steps) for tensor in tensors]

    with torch.no_grad(), plan.replay.running():
        for index, front in enumerate(plan.fronts):
            if isinstance(front, nn.Module):
                name = f"between[{index - 1}]" if index else "read_in"
                sources = [hidden(widths[index - 1])] if index else cut(inputs)
                _Trial(name, front, plan, steps, sources, {}).check(known)
        sources = [hidden(widths[-1]), *cut(per_step)]
        result = _Trial("read_out", read_out, plan, steps, sources, shared).check(known)
    return result[0].dim() == 0


@dataclass
class _Trial:
    """A module, and what to try it on: arguments that hold `steps`, and others."""

    name: str
    module: nn.Module
    plan: StackPlan
    steps: range
    sources: Sequence[Tensor | None]
    shared: Mapping[str, Any]

    def run(self, steps: range, seed: int = 0) -> tuple[Tensor, ...]:
        """What the module returns for some of the steps."""
        layout, first = self.plan.layout, self.steps.start
        # Where those steps are within the sources, whose layout begins with the first of them.
        part = Layout(
            layout.batch_sizes[first : self.steps.stop], layout.batch_first, layout.packed
        )
        within = range(steps.start - first, steps.stop - first)
        given = [
            None if source is None else part.cut(source, within).detach().clone()
            for source in self.sources
        ]
        shared = {n: v.detach() if isinstance(v, Tensor) else v for n, v in self.shared.items()}
        packed = layout.packed_rows(steps, next(t.device for t in given if t is not None))
        versions = [_version(tensor) for tensor in given]
        with self.plan.replay.at(-2, seed, packed=packed), self.plan.autocast.restored():
            result = self.module(*given, **shared)
        if [_version(tensor) for tensor in given] != versions:
            raise ValueError(
                f"{self.name} changes its input in place, which is needed again in the backward "
                "sweep. Use inplace=False, or work on a copy."
            )
        return checked_result(result, layout.shape(steps), None)

    def check(self, known: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the module returns for all steps, if it is sound."""
        name, steps = self.name, self.steps
        result = self.run(steps)
        if not _equal(result, self.run(steps)):
            raise ValueError(
                f"{name} returns other numbers when it is called again, so it cannot be replayed "
                "in the backward sweep. Its randomness must come from torch's global generators "
                "(as in nn.Dropout) or from a SequenceNoise (as in LockedDropout), and it must not "
                "change a state of its own."
            )
        for part in self.module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training:
                raise ValueError(
                    f"{name} holds a BatchNorm layer, which mixes the time steps of a chunk. Use "
                    "LayerNorm, or set it to eval()."
                )
        if not torch.is_inference_mode_enabled():  # in which nothing has a gradient
            self._check_leaves(known)
        if len(steps) > 1:
            self._check_steps()
        return result

    def _check_leaves(self, known: Sequence[Tensor]) -> None:
        """Every tensor that requires a gradient must be one that the sequence knows."""
        leaves = {id(tensor) for tensor in known}
        with torch.enable_grad():
            result = self.run(range(self.steps.start, self.steps.start + 1))
        waiting: list[Any] = [part.grad_fn for part in result]
        seen = {tensor.grad_fn for tensor in known}  # of parameters that were replaced
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in leaves:
                raise ValueError(
                    f"{self.name} uses a tensor of shape {tuple(leaf.shape)} that requires a "
                    "gradient but is not among the parameters of read_in, between and read_out, so "
                    "its gradient would be lost. Register it in the module (self.name = parameter "
                    "or module), or pass it as a keyword argument of the call."
                )
            waiting += [following for following, _ in node.next_functions]

    def _check_steps(self) -> None:
        """All steps together must give what they give apart."""
        steps, layout = self.steps, self.plan.layout
        middle = steps.start + len(steps) // 2
        first, second = range(steps.start, middle), range(middle, steps.stop)
        low = self.plan.products.dtype if self.plan.autocast.enabled else None
        with _evaluating(self.module):
            together = self.run(steps)
            if not _equal(together, self.run(steps, seed=1)):
                return  # random in evaluation too, so that parts cannot be compared
            pairs = list(zip(self.run(first), self.run(second), strict=True))
        for whole, pieces in zip(together, pairs, strict=True):
            tolerance = _TOLERANCES.get(low or whole.dtype, _LOW_PRECISION)
            if not _agree(whole, pieces, layout.time_dim, tolerance):
                raise ValueError(
                    f"{self.name} mixes time steps: for steps {steps.start} to {steps.stop - 1} "
                    f"together it returns something else than for {steps.start} to {middle - 1} "
                    f"and {middle} to {steps.stop - 1} apart. A loss must be a sum over steps "
                    '(reduction="sum", divided by a constant), and outputs must not depend on the '
                    "steps around them or on their place in the chunk."
                )


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all are the same, NaN included."""
    pairs = zip(some, others, strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)


def _agree(whole: Tensor, pieces: Sequence[Tensor], time_dim: int, tolerance: float) -> bool:
    """Whether the parts make up the whole."""
    joined = (
        sum(pieces, torch.zeros_like(whole)) if whole.dim() == 0 else torch.cat([*pieces], time_dim)
    )
    if not whole.is_floating_point() or not whole.numel():
        return torch.equal(whole, joined)
    scale = torch.maximum(whole.abs().max(), joined.abs().max())
    # Written so that NaN passes: it is reported where it arises.
    return not bool((whole - joined).abs().max() > tolerance * scale)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off, and everything as it was afterwards."""
    flags = {part: part.training for part in module.modules()}
    for part in flags:
        part.training = False
    try:
        yield
    finally:
        for part, flag in flags.items():
            part.training = flag
