"""What the last pass of a reversible module stored, against what an ordinary one keeps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from lightning_revflip.reversible.allocator import allocated_bytes
from lightning_revflip.reversible.buffer import information_bits, stored_bits
from lightning_revflip.reversible.cells import Cell

_KEPT_FLOATS = {"cpu": {1: 7, 2: 15}, "other": {1: 4, 2: 5}}
"""Floats per hidden unit and step that nn.GRU (one state, h) and nn.LSTM (two, c and h) keep beside
input and output.

On a CPU as counted in torch 2.13 (a test compares with the profiler). Elsewhere a lower bound:
the gates and the cell state, without which no implementation can differentiate.
"""


@dataclass(frozen=True)
class Pass:
    """One pass over one layer and direction."""

    cell: Cell[Any]
    device_type: str
    batch: int
    rows: int
    """Steps summed over the batch."""
    element_size: int
    """Bytes of a float."""
    stored: bool
    """Whether a backward pass may follow; otherwise nothing was kept."""
    words: int
    """Words in the stream."""
    buffer_states: int
    """Buffer states of both halves, 32 bits each."""
    sliced_units: int
    """Hidden units that are kept as floats after every step and have no buffer."""
    chunk_rows: int
    """Rows of the largest chunk."""
    chunk_steps: int
    """Time steps in a chunk."""
    together: bool
    """Whether all layers of the module work on a chunk at the same time."""
    segments: int
    """Parts of the sequence whose first state is kept; words are those of the last one."""
    gate_counts: Tensor
    """How often each forget gate k/1024 occurred, shape (1025,), int64."""
    perturbed: bool = False
    """Whether every sequence had signs of its own, see `RecurrentPerturbation`."""


@dataclass(frozen=True)
class LayerReport:
    """Memory of one layer and direction in its last pass.

    A unit is one number of the state; RevGRU has one per hidden unit (h), RevLSTM two (c and h).
    """

    name: str
    unit_steps: int
    """Units times steps, summed over the batch."""
    stored_bits: int
    """Information buffer and word stream; with segments, of one of them, and the states kept."""
    slice_bits: int
    """Hidden units that are kept as floats after every step, see `HiddenSlice`."""
    information_bits: float
    """What the forget gates destroyed, sum of log2(1/z): no lossless buffer can store less."""
    float_state_bits: int
    """The same states as floats at every step: what the paper compares with."""
    kept_bytes: int
    """All that the layer keeps for its backward pass beside input, output and weights."""
    standard_bytes: int
    """The same of nn.GRU or nn.LSTM on this device (a lower bound on accelerators)."""
    chunk_bytes: int
    """What the backward pass allocates for the steps of one chunk, at its peak."""
    chunk_steps: int
    """Time steps that are recomputed together."""
    together: bool
    """Whether this layer is recomputed together with others, as in a ReversibleSequence."""
    gate_counts: Tensor
    """How often each forget gate k/1024 occurred, shape (1025,), int64, on the CPU."""

    @classmethod
    def of(cls, name: str, last: Pass) -> "LayerReport":
        """The report of a pass."""
        cell = last.cell
        unit_steps = last.rows * cell.hidden_size * cell.states
        counts = last.gate_counts.cpu()
        floats = _KEPT_FLOATS.get(last.device_type, _KEPT_FLOATS["other"])[cell.states]
        final_state = 4 * last.batch * cell.hidden_size * cell.states
        segment_states = 8 * final_state * (last.segments - 1)
        stored = stored_bits(last.words, last.buffer_states) + segment_states if last.stored else 0
        slices = 8 * max(4, last.element_size) * last.rows * last.sliced_units
        signs = last.batch * (cell.hidden_size + cell.gate_rows) if last.perturbed else 0
        chunk = last.chunk_rows * (2 * cell.gate_rows + cell.replay_floats * cell.hidden_size)
        return cls(
            name=name,
            unit_steps=unit_steps,
            stored_bits=stored,
            slice_bits=slices if last.stored else 0,
            information_bits=information_bits(counts) if last.stored else 0.0,
            float_state_bits=8 * last.element_size * unit_steps,
            kept_bytes=(stored + slices) // 8 + final_state + signs if last.stored else 0,
            standard_bytes=last.rows * cell.hidden_size * floats * last.element_size,
            chunk_bytes=chunk * max(4, last.element_size) if last.stored else 0,
            chunk_steps=last.chunk_steps,
            together=last.together,
            gate_counts=counts,
        )

    @property
    def bits_per_unit_step(self) -> float:
        """Stored bits per unit and step."""
        return self.stored_bits / max(1, self.unit_steps)

    @property
    def state_savings(self) -> float:
        """How many times fewer bits than float states are stored, slices included."""
        return _ratio(self.float_state_bits, self.stored_bits + self.slice_bits)


@dataclass(frozen=True)
class MemoryReport:
    """Memory of all reversible layers of a module in their last pass."""

    layers: list[LayerReport]
    """One for each layer and direction."""
    peak_bytes: int | None = None
    """The allocator's peak over a step of the whole model, if `memory_report` ran one."""

    def within(self, prefix: str) -> "MemoryReport":
        """The report of the layers within one of the module's parts.

        Args:
            prefix: name of the part, for example "encoder".

        Raises:
            ValueError: if there are none.
        """
        layers = [layer for layer in self.layers if f"{layer.name}.".startswith(f"{prefix}.")]
        if not layers:
            names = ", ".join(layer.name for layer in self.layers)
            raise ValueError(f"no reversible layer is within {prefix!r}; there are {names}.")
        return MemoryReport(layers)

    @property
    def stored_bits(self) -> int:
        """Information buffers and word streams of all layers."""
        return sum(layer.stored_bits for layer in self.layers)

    @property
    def slice_bits(self) -> int:
        """Hidden units that all layers keep as floats after every step."""
        return sum(layer.slice_bits for layer in self.layers)

    @property
    def information_bits(self) -> float:
        """What all forget gates destroyed."""
        return sum(layer.information_bits for layer in self.layers)

    @property
    def float_state_bits(self) -> int:
        """All states of all steps as floats."""
        return sum(layer.float_state_bits for layer in self.layers)

    @property
    def kept_bytes(self) -> int:
        """All that the layers keep for the backward pass beside input, output and weights."""
        return sum(layer.kept_bytes for layer in self.layers)

    @property
    def standard_bytes(self) -> int:
        """The same of ordinary layers."""
        return sum(layer.standard_bytes for layer in self.layers)

    @property
    def chunk_bytes(self) -> int:
        """Working memory of the backward pass: the largest of what exists at the same time."""
        together = sum(layer.chunk_bytes for layer in self.layers if layer.together)
        return max(together, *(layer.chunk_bytes for layer in self.layers))

    @property
    def chunk_steps(self) -> int:
        """Time steps that are recomputed together, at most."""
        return max(layer.chunk_steps for layer in self.layers)

    @property
    def bits_per_unit_step(self) -> float:
        """Stored bits per unit and step, over all layers."""
        return self.stored_bits / max(1, sum(layer.unit_steps for layer in self.layers))

    @property
    def savings(self) -> float:
        """How many times less is kept than by ordinary layers; infinite after an evaluation."""
        return _ratio(self.standard_bytes, self.kept_bytes)

    @property
    def state_savings(self) -> float:
        """How many times fewer bits than float states are stored, slices included."""
        return _ratio(self.float_state_bits, self.stored_bits + self.slice_bits)

    @property
    def information_savings(self) -> float:
        """The same for the forgotten information in place of what is stored of it.

        No lossless buffer can reach more.
        """
        return _ratio(self.float_state_bits, self.information_bits + self.slice_bits)

    def __str__(self) -> str:
        width = max(24, *(len(layer.name) + 1 for layer in self.layers))
        header = f"{'layer':<{width}}{'bits/unit/step':>15}{'states':>9}{'kept':>12}"
        header += f"{'ordinary':>12}{'saved':>9}"
        lines = [header]
        for layer in self.layers:
            saved = _times(_ratio(layer.standard_bytes, layer.kept_bytes))
            lines.append(
                f"{layer.name:<{width}}{layer.bits_per_unit_step:>15.3f}{_times(layer.state_savings):>9}"
                f"{_size(layer.kept_bytes):>12}{_size(layer.standard_bytes):>12}{saved:>9}"
            )
        if not self.kept_bytes:
            return "\n".join([*lines, "nothing was stored: the last pass needed no gradients"])
        overhead = self.stored_bits / self.information_bits if self.information_bits else 1.0
        lines.append(
            f"kept {_size(self.kept_bytes)} instead of {_size(self.standard_bytes)}; buffers hold "
            f"{_size(self.stored_bits / 8)}, {overhead:.2f} times the forgotten information\n"
            f"backward works in {_size(self.chunk_bytes)}, {self.chunk_steps} steps at a time"
        )
        if self.slice_bits:
            lines.append(f"units that are kept as floats: {_size(self.slice_bits / 8)}")
        if self.peak_bytes is not None:
            lines.append(f"the whole model's peak over a step: {_size(self.peak_bytes)}")
        return "\n".join(lines)


@runtime_checkable
class Recorded(Protocol):
    """A module that remembers what its last call stored."""

    last_passes: dict[str, Pass]


def memory_report(module: nn.Module, step: Callable[[], object] | None = None) -> MemoryReport:
    """What the last pass of every RevGRU and RevLSTM inside `module` stored.

    A layer that is called several times in a forward pass reports its last call.

    Args:
        module: any module with reversible layers; of an encoder and a decoder in one model,
            `report.within("encoder")` is the one half.
        step: a training step of the whole model, forward and backward. It is run once, and the
            bytes that torch's allocator needs for it at its peak are reported as `peak_bytes`:
            everything counts that did not exist before, gradients included. Start it without
            gradients: what it frees would be deducted.

    Raises:
        ValueError: if `module` holds no reversible layer.
        RuntimeError: if none of them has run yet.
    """
    recorded = [(name, part) for name, part in module.named_modules() if isinstance(part, Recorded)]
    if not recorded:
        raise ValueError(
            f"{type(module).__name__} holds no reversible layer. Build it with RevGRU or RevLSTM, "
            "or convert it with lightning_revflip.convert or the ReversibleRNN callback."
        )
    peak = None
    if step is not None:
        device = next(module.parameters()).device.type
        peak = allocated_bytes(step, device).peak
    layers = [
        LayerReport.of(".".join(filter(None, (name, layer))), last)
        for name, part in recorded
        for layer, last in part.last_passes.items()
    ]
    if not layers:
        raise RuntimeError(
            "no reversible layer has run yet, so there is nothing to report: call the module first."
        )
    return MemoryReport(layers, peak)


def _ratio(less: float, by: float) -> float:
    """`less / by`, infinite for nothing."""
    return less / by if by else float("inf")


def _times(ratio: float) -> str:
    """A ratio for people."""
    return "all" if ratio == float("inf") else f"{ratio:.1f}x"


def _size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
