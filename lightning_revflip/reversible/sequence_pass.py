"""One pass of a `ReversibleSequence`: the stack's sweeps with the read-out on top of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_revflip.reversible.autograd import raise_not_finite, zero_gradients
from lightning_revflip.reversible.layer_tensors import LayerTensors
from lightning_revflip.reversible.results import Results, checked_result
from lightning_revflip.reversible.stack_sweep import (
    Leaf,
    StackPlan,
    StackSweep,
    differentiate,
    same,
)
from lightning_revflip.reversible.sweep import SweepState
from lightning_revflip.reversible.tables import InPlaceGradients

MaybeTensor = Tensor | None


class Tensors(NamedTuple):
    """The tensor arguments of a pass, or their gradients."""

    inputs: Sequence[MaybeTensor]
    per_step: Sequence[MaybeTensor]
    shared: Sequence[MaybeTensor]
    parameters: Sequence[MaybeTensor]
    """Of the modules, each once."""
    weights: Sequence[MaybeTensor]
    """The `LayerTensors` of each layer in turn."""
    initial: Sequence[MaybeTensor]
    """h (and c) of each layer in turn, (batch, hidden_size); empty for zero states."""

    def flat(self) -> list[MaybeTensor]:
        """All of them in one list."""
        return [tensor for group in self for tensor in group]

    def sizes(self) -> list[int]:
        """How many there are in each group."""
        return [len(group) for group in self]

    @classmethod
    def grouped(cls, flat: Sequence[Any], sizes: Sequence[int]) -> Tensors:
        """What `flat` and `sizes` describe."""
        rest = iter(flat)
        return cls(*([next(rest) for _ in range(size)] for size in sizes))


class Modules(nn.Module):
    """The user's modules under one roof, so that their parameters can be swapped together."""

    def __init__(self, fronts: Sequence[Callable[..., Tensor]], read_out: nn.Module) -> None:
        super().__init__()
        modules = [front for front in fronts if isinstance(front, nn.Module)]
        for part in (part for module in [*modules, read_out] for part in module.modules()):
            if getattr(part, "sparse", False) is True:
                raise ValueError(
                    f"{part} asks for sparse gradients, which a ReversibleSequence does not make. "
                    "Use sparse=False: no dense gradient is made per chunk either."
                )
        self.parts = nn.ModuleList([*modules, read_out])
        self.names = dict(self.named_parameters())
        # By place, for `torch.func.functional_call` may be over before the backward pass begins.
        numbers = {id(parameter): number for number, parameter in enumerate(self.names.values())}
        self._slots = [
            (module._parameters, name, numbers[id(parameter)])
            for module in self.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    @contextmanager
    def holding(self, values: Sequence[MaybeTensor]) -> Iterator[None]:
        """Put other tensors in place of the parameters; `names` has their order.

        `functional_call` would lose a parameter of a module that several modules hold.
        """
        before = [parameters[name] for parameters, name, _ in self._slots]
        try:
            for parameters, name, number in self._slots:
                parameters[name] = values[number]  # type: ignore[assignment]
            yield
        finally:
            for (parameters, name, _), parameter in zip(self._slots, before, strict=True):
                parameters[name] = parameter


@dataclass(frozen=True)
class SequencePlan:
    """What a pass is told besides tensors."""

    stack: StackPlan
    modules: Modules
    read_out: nn.Module
    read_out_steps: int
    shared_names: Sequence[str]
    constants: Mapping[str, Any]
    """Keyword arguments of the read-out that are no tensors."""
    states: int
    """State tensors of each layer: 1 (h) or 2 (h and c)."""
    loss: bool
    """Whether the read-out returns a loss."""
    store: bool
    """Whether gradients are wanted."""
    early: bool
    """Whether they are computed in the forward pass."""
    sizes: Sequence[int]
    """Of the groups of `Tensors`."""
    on_forward: Callable[[StackSweep, Sequence[SweepState]], None]
    """Called after the forward sweep, for statistics."""


class SequencePass:
    """One sweep forward or back with all that it accumulates.

    Args:
        plan: the settings.
        tensors: the tensor arguments.
        needs: which of them need a gradient.
        differentiated: whether there will be a sweep back. Otherwise parameters become leaves all
            the same, so that modules compute the same bits, but no gradient has a place.
    """

    def __init__(
        self, plan: SequencePlan, tensors: Tensors, needs: Tensors, differentiated: bool
    ) -> None:
        self.plan = plan
        self.tensors = tensors
        self.device = cast(Tensor, tensors.weights[0]).device
        self.parameters = _leaves(tensors.parameters, needs.parameters, differentiated)
        if not differentiated:
            needs = Tensors.grouped([False] * len(needs.flat()), needs.sizes())
        self._needs = _by_layer(needs.weights)
        self.shared = _leaves(tensors.shared, needs.shared)
        self.per_step = _zeros(tensors.per_step, needs.per_step)
        self.inputs = _zeros(tensors.inputs, needs.inputs)
        # Any module may use any of them, also one that it does not hold itself.
        self._leaves = [leaf for leaf in self.parameters if isinstance(leaf, Leaf)]
        self.tables = InPlaceGradients([(leaf.tensor, leaf.total) for leaf in self._leaves])
        self.stack = StackSweep(
            plan.stack,
            _by_layer(tensors.weights),
            in_groups(tensors.initial, plan.states) or [[] for _ in plan.stack.cells],
            tensors.inputs,  # type: ignore[arg-type]
            self._leaves,
            self.tables,
        )
        self._shared_leaves = [leaf for leaf in self.shared if isinstance(leaf, Leaf)]

    def run(self, sweep: Callable[[], Any]) -> Any:
        """Call a function that sweeps, with leaves for parameters and replayed randomness."""
        values = [leaf.tensor if isinstance(leaf, Leaf) else leaf for leaf in self.parameters]
        # The graphs of a chunk live and die in here: they are no business of a caller's hooks.
        private = saved_tensors_hooks(same, same)
        precision = torch.autocast(self.device.type, enabled=False)
        swapped = self.plan.modules.holding(values)
        with private, precision, self.plan.stack.replay.running(), swapped:
            return sweep()

    # --- read-out ----------------------------------------------------------------------------

    def pieces(self, number: int) -> list[range]:
        """The time steps of a chunk in parts that the read-out gets at a time."""
        steps, size = self.stack.steps(number), self.plan.read_out_steps
        return [range(i, min(i + size, steps.stop)) for i in range(steps.start, steps.stop, size)]

    def call_read_out(
        self, steps: range, rows: Tensor, per_step: Sequence[MaybeTensor]
    ) -> tuple[Tensor, ...]:
        """What the read-out returns for some time steps, always as a tuple."""
        plan, layout = self.plan.stack, self.plan.stack.layout
        shared = {
            name: leaf.tensor if isinstance(leaf, Leaf) else leaf
            for name, leaf in zip(self.plan.shared_names, self.shared, strict=True)
        }
        packed = layout.packed_rows(steps, self.device)
        with plan.replay.at(-1, steps.start, packed=packed), plan.autocast.restored(), self.tables:
            hidden = layout.unflat(rows, steps)
            result = self.plan.read_out(hidden, *per_step, **shared, **self.plan.constants)
        return checked_result(result, layout.shape(steps), self.plan.loss)

    @staticmethod
    def no_gradient(number: int, top: Tensor) -> None:
        """What makes no gradient of a chunk's outputs."""

    def slice_gradient(self, grad: MaybeTensor) -> Callable[[int, Tensor], MaybeTensor]:
        """What makes a chunk's gradient from that of its slices, in the user's layout."""
        layout = self.plan.stack.layout

        def read_out(number: int, top: Tensor) -> MaybeTensor:
            if grad is None or not grad.shape[-1]:
                return None
            grad_top = torch.zeros_like(top, dtype=torch.promote_types(top.dtype, torch.float32))
            part = layout.flat(layout.cut(grad, self.stack.steps(number)))
            grad_top[:, : part.shape[1]] = part
            return grad_top

        return read_out

    def differentiated(
        self, grads_of: Callable[[range, tuple[Tensor, ...]], Sequence[MaybeTensor]]
    ) -> Callable[[int, Tensor], Tensor]:
        """What makes a chunk's gradient by running the read-out again.

        Args:
            grads_of: maps time steps and what the read-out returned to its gradients.
        """

        def read_out(number: int, top: Tensor) -> Tensor:
            return self._differentiate_read_out(number, top, grads_of)

        return read_out

    def _differentiate_read_out(
        self,
        number: int,
        top: Tensor,
        grads_of: Callable[[range, tuple[Tensor, ...]], Sequence[MaybeTensor]],
    ) -> Tensor:
        """The gradient of a chunk's outputs of the top layer, (rows, hidden_size)."""
        layout = self.plan.stack.layout
        grad_top = torch.zeros_like(top, dtype=torch.promote_types(top.dtype, torch.float32))
        first = layout.rows(self.stack.steps(number)).start
        for steps in self.pieces(number):
            rows = layout.rows(steps)
            part = slice(rows.start - first, rows.stop - first)
            leaf = Leaf.of(top[part], grad_top[part])
            per_step = [
                None
                if given is None
                else layout.cut(given, steps)
                if grad is None
                else Leaf.of(layout.cut(given, steps), layout.cut(grad, steps))
                for given, grad in zip(self.tensors.per_step, self.per_step, strict=True)
            ]
            leaves = [leaf, *(arg for arg in per_step if isinstance(arg, Leaf))]
            leaves += self._shared_leaves + self._leaves
            values = [arg.tensor if isinstance(arg, Leaf) else arg for arg in per_step]
            with torch.enable_grad():
                result = self.call_read_out(steps, leaf.tensor, values)
            differentiate(result, grads_of(steps, result), leaves)
            del result
        return grad_top

    # --- sweeps ------------------------------------------------------------------------------

    def forward(self, visit: Callable[[int, Tensor], None] | None) -> Any:
        """Sweep forward; returns final states and segment starts."""
        states, starts = self.stack.forward(self.plan.store, visit)
        if not self.stack.is_finite(states):
            modules = self.plan.modules.names
            named = dict(zip(modules, self.tensors.parameters, strict=True))
            for number, layer in enumerate(_by_layer(self.tensors.weights)):
                named |= {
                    f"{kind} of recurrent layer {number}": t for kind, t in layer.named().items()
                }
            named |= {f"inputs[{i}]": part for i, part in enumerate(self.tensors.inputs)}
            raise_not_finite(named)
        self.plan.on_forward(self.stack, states)
        return states, starts

    def visit(self, results: Results) -> Callable[[int, Tensor], None]:
        """A visitor that runs the read-out without gradients."""
        layout = self.plan.stack.layout

        def read(number: int, top: Tensor) -> None:
            first = layout.rows(self.stack.steps(number)).start
            for steps in self.pieces(number):
                rows = layout.rows(steps)
                per_step = [
                    None if t is None else layout.cut(t, steps) for t in self.tensors.per_step
                ]
                with torch.no_grad():
                    part = top[rows.start - first : rows.stop - first]
                    results.add(steps, self.call_read_out(steps, part, per_step))

        return read

    def backward(
        self,
        states: Sequence[SweepState],
        starts: Sequence[list[Tensor]],
        read_out: Callable[[int, Tensor], MaybeTensor],
        grad_finals: Sequence[MaybeTensor],
        grad_front: MaybeTensor = None,
    ) -> list[MaybeTensor]:
        """Sweep back; returns the gradient of every tensor argument.

        Args:
            states: of each layer after the last step.
            starts: as `StackSweep.forward` returned them.
            read_out: makes the gradient of a chunk's outputs, see `StackSweep.backward`.
            grad_finals: of each layer's final h (and c), or None.
            grad_front: see `StackSweep.backward`.
        """
        grouped = in_groups(grad_finals, self.plan.states)
        layers = self.stack.layers
        grads = [
            zero_gradients(layer, finals, bool(needs.delta))
            for layer, finals, needs in zip(layers, grouped, self._needs, strict=True)
        ]
        self.stack.backward(states, starts, read_out, grads, self.inputs, grad_front)
        weights = [part for g in grads for part in g.tensors()]
        initial: list[MaybeTensor] = []
        if self.tensors.initial:
            initial = [
                torch.cat(pair, dim=1) for g in grads for pair in zip(*g.states, strict=True)
            ]
        found = Tensors(
            self.inputs,
            self.per_step,
            [self._total(leaf) for leaf in self.shared],
            [self._total(leaf) for leaf in self.parameters],
            weights,
            initial,
        )
        return [
            None if grad is None or tensor is None else grad.to(tensor.dtype)
            for grad, tensor in zip(found.flat(), self.tensors.flat(), strict=True)
        ]

    def _total(self, leaf: Leaf | Tensor | None) -> MaybeTensor:
        """A gradient, or None for what the modules made no use of."""
        if not isinstance(leaf, Leaf):
            return None
        return leaf.total if leaf.used or self.tables.used(leaf.tensor) else None


def _leaves(
    tensors: Sequence[MaybeTensor], needs: Sequence[Any], differentiated: bool = True
) -> list[Leaf | Tensor | None]:
    def leaf(tensor: Tensor) -> Leaf:
        if differentiated:
            return Leaf.of(tensor)
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        nowhere = torch.zeros((), dtype=dtype, device=tensor.device).expand_as(tensor)
        return Leaf.of(tensor, nowhere)

    return [
        leaf(tensor) if need and tensor is not None else tensor
        for tensor, need in zip(tensors, needs, strict=True)
    ]


def _zeros(tensors: Sequence[MaybeTensor], needs: Sequence[Any]) -> list[MaybeTensor]:
    """Zeros to accumulate gradients in, for the tensors that need one."""
    return [
        torch.zeros_like(tensor) if need and tensor is not None else None
        for tensor, need in zip(tensors, needs, strict=True)
    ]


def _by_layer(weights: Sequence[Any]) -> list[LayerTensors]:
    """Of `Tensors.weights`, or what stands for them."""
    return [LayerTensors(*group) for group in in_groups(weights, len(LayerTensors._fields))]


def in_groups(items: Sequence[Any], size: int) -> list[list[Any]]:
    """Consecutive groups of the same size."""
    return [list(items[i : i + size]) for i in range(0, len(items), size)]
