"""What the drop-in layers `RevGRU` and `RevLSTM` share: arguments, parameters, layouts, checks."""

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import Self

from lightning_revflip.reversible.autograd import Settings, reversible_layer
from lightning_revflip.reversible.cells import Cell
from lightning_revflip.reversible.kernels import fastest
from lightning_revflip.reversible.layer_tensors import LayerTensors
from lightning_revflip.reversible.perturbation import RecurrentPerturbation
from lightning_revflip.reversible.products import Products, onednn_available
from lightning_revflip.reversible.report import Pass
from lightning_revflip.reversible.schedule import Schedule
from lightning_revflip.reversible.sweep import LayerSweep, SweepState

_ROWS_PER_CHUNK = 256
"""Enough rows for efficient matrix products with the input weights."""


class ReversibleRNNBase(nn.RNNBase):
    """A stack of reversible layers; `RevGRU` documents arguments and parameters.

    Subclasses give `make_cell` and `unsupported`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        max_forget_bits: float | None = 3.0,
        chunk_steps: int | None = None,
        forget_bias: float = 0.0,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        for name, size in (("input_size", input_size), ("num_layers", num_layers)):
            if size <= 0:
                raise ValueError(f"{name} must be positive, got {size}.")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be a probability in [0, 1], got {dropout}.")
        if dropout and num_layers == 1:
            warnings.warn(
                f"dropout={dropout} acts between layers, and there is only one (num_layers=1).",
                stacklevel=2,
            )
        if proj_size:
            raise ValueError(
                f"{type(self).__name__} has no projection, got proj_size={proj_size}. "
                "Use proj_size=0 and an nn.Linear."
            )
        if forget_bias and (max_forget_bits == 0 or not bias):
            raise ValueError(
                f"forget_bias={forget_bias} needs forget gates with a bias, got "
                f"max_forget_bits={max_forget_bits} and bias={bias}."
            )
        if chunk_steps is not None and chunk_steps <= 0:
            raise ValueError(f"chunk_steps must be positive or None, got {chunk_steps}.")
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = 0
        self.max_forget_bits = max_forget_bits
        self.chunk_steps = chunk_steps
        self.forget_bias = forget_bias
        self.cell = self.make_cell()
        self.mode = self.cell.name
        self.last_passes: dict[str, Pass] = {}
        """What each layer and direction stored in the last call, for `memory_report`."""

        directions = 2 if bidirectional else 1
        rows, half = self.cell.gate_rows, self.cell.half
        for layer, suffix in self._layers():
            features = input_size if layer == 0 else hidden_size * directions
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (rows, features),
                "weight_hh": (rows, half),
            }
            if bias:
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
            for name, shape in shapes.items():
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(f"{name}_{suffix}", parameter)
        self.reset_parameters()

    unsupported: ClassVar[tuple[type[nn.Module], ...]]
    """Relatives of the replaced layer that cannot be replaced; `convert` refuses them by name."""

    @classmethod
    def from_standard(cls, rnn: nn.RNNBase, **kwargs: Any) -> Self:
        """A freshly initialised layer with the arguments of an nn.GRU or nn.LSTM.

        Args:
            rnn: the layer to stand in for.
            kwargs: max_forget_bits, chunk_steps and forget_bias.

        Raises:
            ValueError: if `rnn` has a projection (proj_size), or an odd hidden_size.
        """
        return cls(
            rnn.input_size,
            rnn.hidden_size,
            rnn.num_layers,
            rnn.bias,
            rnn.batch_first,
            rnn.dropout,
            rnn.bidirectional,
            proj_size=rnn.proj_size,
            **kwargs,
        )

    @abstractmethod
    def make_cell(self) -> Cell[Any]:
        """The cell of all layers; `hidden_size` and `max_forget_bits` are set when it is made."""

    def _layers(self) -> list[tuple[int, str]]:
        """Layer number and parameter suffix of each layer and direction."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [(n, f"l{n}{suffix}") for n in range(self.num_layers) for suffix in directions]

    def reset_parameters(self) -> None:
        """Draw all parameters from U(-1/sqrt(hidden_size), 1/sqrt(hidden_size)), as nn.GRU does.

        Then add `forget_bias` to `bias_ih` of the forget gates.
        """
        bound = 1.0 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        if self.forget_bias:
            for _, suffix in self._layers():
                blocks = getattr(self, f"bias_ih_{suffix}").view(2, self.cell.gates, self.cell.half)
                with torch.no_grad():
                    blocks[:, self.cell.forget_blocks] += self.forget_bias

    # nn.RNNBase keeps a flat copy of its weights for cuDNN. There is none here, so that weights
    # may be replaced by parametrizations, weight drop or `torch.func.functional_call`.
    __setattr__ = nn.Module.__setattr__  # type: ignore[assignment]
    __setstate__ = nn.Module.__setstate__
    _apply = nn.Module._apply
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def flatten_parameters(self) -> None:
        """Does nothing; present because nn.GRU and nn.LSTM have it."""

    @property
    def all_weights(self) -> list[list[nn.Parameter]]:
        """Parameters of each layer and direction, in the order of nn.GRU."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        return [[getattr(self, f"{n}_{suffix}") for n in names] for _, suffix in self._layers()]

    def extra_repr(self) -> str:
        """The arguments that differ from their defaults, as nn.GRU shows them."""
        text = f"{self.input_size}, {self.hidden_size}"
        defaults = {
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0.0,
            "bidirectional": False,
            "chunk_steps": None,
            "forget_bias": 0.0,
        }
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}, max_forget_bits={self.max_forget_bits}"

    def _run(
        self, input: Tensor | PackedSequence, given: list[Tensor]
    ) -> tuple[Tensor | PackedSequence, list[Tensor]]:
        """Outputs and final h (and c) in the caller's layout; `given` as the user passed them."""
        if isinstance(input, PackedSequence):
            x, batch_sizes = input.data, input.batch_sizes.tolist()
            order = input.sorted_indices
            if order is not None:
                given = [state.index_select(1, order) for state in given]
        else:
            order = None
            if input.dim() not in (2, 3):
                raise ValueError(
                    f"{self.cell.name} expects a 3-dimensional input, a 2-dimensional one without "
                    f"batch, or a PackedSequence, got shape {tuple(input.shape)}."
                )
            batched = input.dim() == 3
            x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
            given = given if batched else [state.unsqueeze(1) for state in given]
            if self.batch_first:
                x = x.transpose(0, 1)
            batch_sizes = [x.shape[1]] * x.shape[0]
        self._check(x, batch_sizes, given)

        out, finals = self._run_layers(x, batch_sizes, given, order)

        if isinstance(input, PackedSequence):
            if input.unsorted_indices is not None:
                finals = [state.index_select(1, input.unsorted_indices) for state in finals]
            return input._replace(data=out), finals
        out = out.view(*x.shape[:2], out.shape[-1])
        if self.batch_first:
            out = out.transpose(0, 1)
        if not batched:
            return out.squeeze(0 if self.batch_first else 1), [s.squeeze(1) for s in finals]
        return out, finals

    def _run_layers(
        self, x: Tensor, batch_sizes: list[int], given: list[Tensor], order: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        products = _products(x)
        cell = fastest(self.cell, x.device, products.dtype)
        chunk_steps = self.chunk_steps or max(1, _ROWS_PER_CHUNK // max(1, batch_sizes[0]))
        self.last_passes = {}
        outputs: list[Tensor] = []
        finals: list[tuple[Tensor, ...]] = []
        for index, (layer, suffix) in enumerate(self._layers()):
            if layer and not suffix.endswith("_reverse"):
                x = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
                x = F.dropout(x, self.dropout, self.training)
                outputs = []
            weights = self.layer_tensors(suffix, batch_sizes[0], order)
            tensors = [x, *weights, *(state[index] for state in given)]
            settings = Settings(
                cell,
                Schedule(batch_sizes, chunk_steps, suffix.endswith("_reverse")),
                products,
                store=torch.is_grad_enabled()
                and any(t.requires_grad for t in tensors if t is not None),
                on_forward=partial(self.record, suffix),
            )
            out, *final = reversible_layer(settings, *tensors)
            outputs.append(out)
            finals.append(tuple(final))
        out = torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
        return out, [torch.stack(states) for states in zip(*finals, strict=True)]

    def _check(self, x: Tensor, batch_sizes: list[int], given: list[Tensor]) -> None:
        if x.shape[-1] != self.input_size:
            raise ValueError(
                f"{self.cell.name} expects inputs with {self.input_size} features in the last "
                f"dimension (input_size={self.input_size}), got {x.shape[-1]}."
            )
        self.check_device(x.device)
        if not batch_sizes:
            raise ValueError(f"{self.cell.name} needs at least one time step, got none.")
        weight = self.weight_ih_l0
        autocast = torch.is_autocast_enabled(x.device.type)
        if x.dtype != weight.dtype and not autocast:
            raise ValueError(
                f"{self.cell.name} has weights of {weight.dtype}, got an input of {x.dtype}. "
                "Convert one of them, or run under autocast."
            )
        self.check_states(given, batch_sizes[0], len(batch_sizes), x.dtype)

    def check_device(self, device: torch.device) -> None:
        """Raise a ValueError on a device without the arithmetic that exact integers need."""
        if device.type == "mps":
            raise ValueError(
                f"{self.cell.name} needs float64 arithmetic for exact integers, which MPS devices "
                'do not have. Use a CPU or CUDA device (Trainer(accelerator="cpu")).'
            )

    def check_states(
        self, given: Sequence[Tensor], batch: int, steps: int, dtype: torch.dtype
    ) -> None:
        """Raise unless initial states suit this layer.

        Args:
            given: h_0 (and c_0), or nothing for zero states.
            batch: sequences.
            steps: time steps of the longest.
            dtype: of the input.

        Raises:
            ValueError: for a wrong shape or dtype, or a state that could leave the fixed-point
                range.
        """
        shape = (len(self._layers()), batch, self.hidden_size)
        growth = self.cell.growth(steps)
        allowed = {dtype, torch.promote_types(dtype, torch.float32)}
        for name, state in zip(("h_0", "c_0"), given, strict=False):
            autocast = torch.is_autocast_enabled(state.device.type)
            if not autocast and state.dtype not in allowed:
                raise ValueError(
                    f"{name} must have the dtype of the input, {dtype}, got {state.dtype}."
                )
            if tuple(state.shape) != shape:
                raise ValueError(
                    f"{name} must have shape (layers * directions, batch, hidden_size) = {shape} "
                    f"(without batch dimension for a 2-D input), got {tuple(state.shape)}."
                )
            self.cell.fixed_point.check(state, name, growth)
        if not given:
            self.cell.fixed_point.check(torch.zeros(1), "the zero state", growth)

    def effective_weights(self, suffix: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """The weights of a layer and direction that a pass computes with.

        Args:
            suffix: of the parameters, for example "l0" or "l1_reverse".

        Returns:
            weight_ih, weight_hh and the sum of the biases, or None.
        """
        bias = None
        if self.bias:
            bias = getattr(self, f"bias_ih_{suffix}") + getattr(self, f"bias_hh_{suffix}")
        return getattr(self, f"weight_ih_{suffix}"), getattr(self, f"weight_hh_{suffix}"), bias

    def recurrent_perturbation(
        self, suffix: str, weight_hh: Tensor, batch: int
    ) -> RecurrentPerturbation | None:
        """What to add to the recurrent weights of a layer and direction in this call.

        Called once per layer, direction and call of the module (or of the `ReversibleSequence` that
        holds it), and not in the backward pass: what it returns holds for both. For subclasses;
        here it is None, for nothing.

        Args:
            suffix: of the parameters, for example "l0" or "l1_reverse".
            weight_hh: the recurrent weights of this call, (gate_rows, hidden_size / 2); a
                perturbation may depend on them, and pass gradients on to them.
            batch: sequences; row n of the signs belongs to sequence n of the input.
        """
        return None

    def layer_tensors(self, suffix: str, batch: int, order: Tensor | None = None) -> LayerTensors:
        """All tensors of a layer and direction for one call.

        Args:
            suffix: of the parameters.
            batch: sequences.
            order: which sequence stands in each row of a step, int64; None for the given order.

        Raises:
            ValueError: for a perturbation that does not fit.
        """
        weight_ih, weight_hh, bias = self.effective_weights(suffix)
        perturbation = self.recurrent_perturbation(suffix, weight_hh, batch)
        if perturbation is None:
            return LayerTensors(weight_ih, weight_hh, bias)
        perturbation.check(f"weight_hh_{suffix}", weight_hh, batch, self.hidden_size)
        signs = perturbation.signs(order)
        if signs is None:
            return LayerTensors(weight_ih, weight_hh + perturbation.delta, bias)
        return LayerTensors(weight_ih, weight_hh, bias, perturbation.delta, *signs)

    def record(
        self,
        suffix: str,
        layer: LayerSweep,
        state: SweepState,
        together: bool = False,
        segments: int = 1,
    ) -> None:
        """Remember for `memory_report` what a forward sweep over a layer and direction stored.

        Args:
            suffix: of its parameters.
            layer: that was swept.
            state: at the end of the sweep.
            together: whether all layers work on a chunk at the same time.
            segments: parts of the sequence whose first state is kept.
        """
        schedule = layer.schedule
        counts = layer.gate_counts.clone()  # a backward sweep with segments goes on counting
        self.last_passes[suffix] = Pass(
            cell=self.cell,
            device_type=layer.weight_hh.device.type,
            batch=schedule.batch,
            rows=schedule.rows,
            element_size=layer.products.dtype.itemsize,
            stored=state.words is not None,
            words=len(state.words or ()),
            buffer_states=sum(buffer.state.numel() for buffer in state.buffers),
            sliced_units=0 if layer.slices is None else layer.slices.units,
            chunk_rows=max(len(chunk) for chunk in schedule.chunks()),
            chunk_steps=schedule.chunk_steps,
            together=together,
            segments=segments,
            gate_counts=counts if state.gate_counts is None else counts + state.gate_counts,
            perturbed=layer.perturbation is not None,
        )


def _products(x: Tensor) -> Products:
    """Matrix products in autocast's dtype, as torch would choose it, or the input's."""
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return Products(dtype, x.numel() > 0 and onednn_available(x.device, dtype))
