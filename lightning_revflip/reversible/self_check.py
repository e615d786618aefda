"""Tries the modules of a `ReversibleSequence` on a few steps before they are relied on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_revflip.reversible.layout import Layout
from lightning_revflip.reversible.sequence_pass import checked_result
from lightning_revflip.reversible.stack_sweep import StackPlan

_STEPS = 4
_TOLERANCE = 0.02
"""Relative: more than bfloat16 rounds, much less than a mean instead of a sum changes."""

Call = Callable[..., tuple[Tensor, ...]]
"""Runs a module on some time steps, given as a range, with generators seeded by `seed`."""


def check_modules(
    plan: StackPlan,
    read_out: nn.Module,
    widths: Sequence[int],
    inputs: Sequence[Tensor],
    per_step: Sequence[Tensor | None],
    shared: Mapping[str, Tensor | None],
) -> bool:
    """Check that modules can be replayed and treat time steps alike.

    They run on the first steps of the inputs and on random hidden states, without gradients and
    without a trace in torch's generators.

    Args:
        plan: of the pass to come.
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
    device = inputs[0].device
    generator = torch.Generator().manual_seed(0)

    def call(
        module: Callable[..., object], sources: Sequence[Tensor | None], **more: object
    ) -> Call:
        def run(steps: range, seed: int = 0) -> tuple[Tensor, ...]:
            cut = [None if source is None else layout.cut(source, steps) for source in sources]
            packed = layout.packed_rows(steps, device)
            with plan.replay.at(-2, seed, packed=packed), plan.autocast.restored():
                return checked_result(module(*cut, **more), layout.shape(steps), None)

        return run

    def hidden(width: int) -> Tensor:
        steps = range(min(_STEPS, layout.steps))
        rows = torch.randn(layout.rows(steps).stop, width, generator=generator)
        return layout.unflat(rows.to(device, plan.products.dtype), steps)

    with torch.no_grad(), plan.replay.running():
        for index, front in enumerate(plan.fronts):
            if isinstance(front, nn.Module):
                name = f"between[{index - 1}]" if index else "read_in"
                sources = [hidden(widths[index - 1])] if index else inputs
                _check(name, front, call(front, sources), layout)
        run = call(read_out, [hidden(widths[-1]), *per_step], **shared)
        return _check("read_out", read_out, run, layout)[0].dim() == 0


def _check(name: str, module: nn.Module, run: Call, layout: Layout) -> tuple[Tensor, ...]:
    """What a module returns for the first steps, if it is sound."""
    whole = range(min(_STEPS, layout.steps))
    result = run(whole)
    if not _equal(result, run(whole)):
        raise ValueError(
            f"{name} returns other numbers when it is called again, so it cannot be replayed in "
            "the backward sweep. Its randomness must come from torch's global generators (as in "
            "nn.Dropout) or from a SequenceNoise (as in LockedDropout), and it must not change a "
            "state of its own."
        )
    if any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training
        for part in module.modules()
    ):
        raise ValueError(
            f"{name} holds a BatchNorm layer, which mixes the time steps of a chunk. Use "
            "LayerNorm, or set it to eval()."
        )
    if len(whole) < 2:
        return result
    middle = len(whole) // 2
    with _evaluating(module):
        together = run(whole)
        if not _equal(together, run(whole, seed=1)):
            return result  # random in evaluation too, so that parts cannot be compared
        apart = [run(range(middle)), run(range(middle, len(whole)))]
    for number, part in enumerate(together):
        if not _agree(part, [pair[number] for pair in apart], layout.time_dim):
            raise ValueError(
                f"{name} mixes time steps: for steps 0 to {whole[-1]} together it returns "
                f"something else than for 0 to {middle - 1} and {middle} to {whole[-1]} apart. "
                'A loss must be a sum over steps (reduction="sum", divided by a constant), and '
                "outputs must not depend on the steps around them or on their place in the chunk."
            )
    return result


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether all are the same, NaN included."""
    pairs = zip(some, others, strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)


def _agree(whole: Tensor, pieces: Sequence[Tensor], time_dim: int) -> bool:
    joined = (
        sum(pieces, torch.zeros_like(whole)) if whole.dim() == 0 else torch.cat([*pieces], time_dim)
    )
    if not whole.is_floating_point():
        return torch.equal(whole, joined)
    scale = torch.maximum(whole.abs().max(), joined.abs().max())
    # Written so that NaN passes: it is reported where it arises.
    return not bool((whole - joined).abs().max() > _TOLERANCE * scale + 1e-6)


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
