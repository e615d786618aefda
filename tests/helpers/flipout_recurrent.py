"""An independent truth about FlipoutLSTM and FlipoutGRU: explicit weights, sequence by sequence."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from lightning_revflip.flipout import FlipoutGRU, FlipoutLSTM, NoiseSource, Perturbation
from lightning_revflip.flipout.draw import Draw

CELLS = [FlipoutLSTM, FlipoutGRU]
PLAIN = {FlipoutLSTM: nn.LSTM, FlipoutGRU: nn.GRU}
FEATURES, HIDDEN = 4, 3


class UniformNoise(Perturbation):
    """A perturbation as a user writes one: uniform noise and a spread that is learnt."""

    spread_names = ("rho",)

    def noise(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        uniform = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
        return (uniform - 0.5) * 12**0.5

    def scale(self, mean: Tensor, *spread: Tensor) -> Tensor:
        return mean.cos() * spread[0].exp()

    def initial_spread(self, mean: Tensor) -> list[Tensor]:
        return [torch.full_like(mean, -2.0)]


def reseed(layer: Any, seed: int) -> None:
    """Let the noise of a layer start from a seed."""
    layer.noise_source = NoiseSource(torch.Generator().manual_seed(seed))


def make(cell: type[Any], *, seed: int = 0, **options: Any) -> Any:
    """A layer in float64, its parameters and its noise depend on nothing but the arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = cell(FEATURES, HIDDEN, **{"dtype": torch.float64, **options})
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                if name.endswith("_rho"):
                    parameter.copy_(torch.randn_like(parameter) - 1)
    reseed(layer, seed)
    return layer


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that depend on nothing but the arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def states(layer: Any, batch: int, seed: int = 5) -> list[Tensor]:
    """Initial states, to be differentiated by."""
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    dtype = layer.weight_ih_l0.dtype
    return [
        normal(count, batch, layer.hidden_size, seed=seed + number, dtype=dtype).requires_grad_()
        for number in range(2 if isinstance(layer, nn.LSTM) else 1)
    ]


def as_hx(parts: Sequence[Tensor]) -> Any:
    """h, or (h, c), as a layer takes and returns it."""
    return parts[0] if len(parts) == 1 else tuple(parts)


def as_parts(hx: Any) -> list[Tensor]:
    """[h] or [h, c]."""
    return [hx] if isinstance(hx, Tensor) else list(hx)


def draws_of(layer: Any, call: int = 0) -> dict[str, Draw]:
    """What the layer draws in a later call (0: the next), which it does all the same."""
    generator = layer.noise_source.generator
    before = generator.get_state()
    draws = [layer.draws() for _ in range(call + 1)]
    generator.set_state(before)
    return draws[call]


def explicit_weight(layer: Any, draws: dict[str, Draw], name: str, row: int, batch: int) -> Tensor:
    """W + dW_m * (r_n s_n^T) of the sequence in a row of the batch."""
    mean = getattr(layer, name)
    if name not in draws:
        return mean
    draw, spread = draws[name], layer.spread(name)
    (group,) = (m for m, rows in enumerate(draw.groups(batch)) if rows.start <= row < rows.stop)
    noise = layer.perturbation.unit_noise(mean.detach(), draw.weight_seed(group))
    delta = layer.perturbation.scale(mean, *spread) * noise
    if not draw.signed:
        return mean + delta
    s = draw.input_signs(batch, mean.shape[1], mean)[row]
    r = draw.output_signs(batch, mean.shape[0], mean)[row]
    return mean + delta * torch.outer(r, s)


def cell_step(kind: type[nn.Module], a: Tensor, u: Tensor, state: list[Tensor]) -> list[Tensor]:
    """The equations in the documentation of nn.LSTM and nn.GRU."""
    if issubclass(kind, nn.LSTM):
        i, f, g, o = (a + u).chunk(4)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return [o.sigmoid() * c.tanh(), c]
    (a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3), u.chunk(3)
    r, z = (a_r + u_r).sigmoid(), (a_z + u_z).sigmoid()
    return [(1 - z) * (a_n + r * u_n).tanh() + z * state[0]]


def explicit_sequence(
    layer: Any, draws: dict[str, Draw], x: Tensor, initial: list[Tensor], row: int, batch: int
) -> tuple[Tensor, list[Tensor]]:
    """Output (steps, ...) and last states of one sequence x (steps, features)."""
    finals = []
    for number in range(layer.num_layers):
        outputs = []
        for suffix in ("", "_reverse") if layer.bidirectional else ("",):
            place = f"l{number}{suffix}"
            w_ih = explicit_weight(layer, draws, f"weight_ih_{place}", row, batch)
            w_hh = explicit_weight(layer, draws, f"weight_hh_{place}", row, batch)
            b_ih = getattr(layer, f"bias_ih_{place}") if layer.bias else 0
            b_hh = getattr(layer, f"bias_hh_{place}") if layer.bias else 0
            state = [part[len(finals)] for part in initial]
            hidden = []
            for step in x.flip(0) if suffix else x:
                state = cell_step(type(layer), w_ih @ step + b_ih, w_hh @ state[0] + b_hh, state)
                hidden.append(state[0])
            outputs.append(torch.stack(hidden[::-1] if suffix else hidden))
            finals.append(state)
        x = torch.cat(outputs, dim=-1)
    return x, [torch.stack(parts) for parts in zip(*finals, strict=True)]


def explicit(
    layer: Any, draws: dict[str, Draw], sequences: Sequence[Tensor], initial: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of all sequences (steps, features), and last states in the shape of the initial.

    Row n of the signs belongs to the n-th longest sequence, as PackedSequence sorts them.
    """
    lengths = torch.tensor([len(x) for x in sequences])
    rows = pack_sequence(list(sequences), enforce_sorted=False).unsorted_indices
    if (lengths == lengths[0]).all():
        rows = torch.arange(len(sequences))
    results = []
    for number, x in enumerate(sequences):
        own = [part[:, number] for part in initial]
        results.append(explicit_sequence(layer, draws, x, own, int(rows[number]), len(sequences)))
    finals = zip(*(last for _, last in results), strict=True)
    return [output for output, _ in results], [torch.stack(parts, dim=1) for parts in finals]


def objective(outputs: Sequence[Tensor], finals: Sequence[Tensor]) -> Tensor:
    """A scalar to which every number contributes differently."""
    total = torch.zeros((), dtype=torch.float64)
    for number, tensor in enumerate([*outputs, *finals]):
        total = total + (tensor * normal(*tensor.shape, seed=100 + number)).sum()
    return total


def two_sample_distance(a: Tensor, b: Tensor) -> float:
    """Kolmogorov-Smirnov: the largest distance of two empirical distribution functions."""
    grid = torch.cat([a, b])
    below = [torch.searchsorted(x.sort().values, grid, right=True) / len(x) for x in (a, b)]
    return float((below[0] - below[1]).abs().max())
