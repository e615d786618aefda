"""`ReversibleSequence`: read-in, recurrence and read-out in one reversible pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_revflip.reversible.autograd import uncompiled
from lightning_revflip.reversible.kernels import fastest
from lightning_revflip.reversible.layout import Layout
from lightning_revflip.reversible.products import Products, onednn_available
from lightning_revflip.reversible.replay import Replay
from lightning_revflip.reversible.rnn_base import ReversibleRNNBase
from lightning_revflip.reversible.schedule import Schedule
from lightning_revflip.reversible.self_check import check_modules
from lightning_revflip.reversible.sequence_arguments import (
    check_rnns,
    data_of,
    final_states,
    initial_states,
    layout_of,
    wrapped,
)
from lightning_revflip.reversible.sequence_autograd import ReversibleSequenceFunction
from lightning_revflip.reversible.sequence_pass import Modules, SequencePlan, Tensors
from lightning_revflip.reversible.slices import HiddenSlice
from lightning_revflip.reversible.stack_sweep import Autocast, Front, StackPlan, StackSweep, same
from lightning_revflip.reversible.sweep import SweepState

Steps = Tensor | PackedSequence
"""Something that has time steps."""


class ReversibleSequence(nn.Module):
    """A recurrent network whose memory does not grow with its length, from input to loss.

    Runs `read_out(rnn(read_in(inputs)))` chunk by chunk of time steps. Neither embeddings nor
    outputs nor logits exist for more than a chunk: in the backward sweep the states of a chunk are
    recomputed exactly, the modules run on it again, and its gradients are formed at once.

    If `read_out` returns a scalar, that is a loss: the result is its sum over the chunks, so it
    must be a sum over time steps (`reduction="sum"`, divided by a constant if you like, not by the
    length of the chunk). All gradients are then computed in the forward pass, and the read-out runs
    once; `backward()` only multiplies by the gradient of the loss. If it returns outputs, with the
    leading dimensions of its input, they are joined, and the backward pass runs it again; those of
    a `HiddenSlice` are kept, in place of the bits that its units forget. It may return a tuple of
    scalars and outputs; with a loss, which comes first, the others have no gradient.

    In a LightningModule, make it an attribute, so that it follows `train()` and `eval()`.

    The modules must treat every time step alike, whatever chunk it is in; dropout is fine. The
    first call checks that, and that they can be replayed, on a few steps.

    Args:
        read_in: called with the inputs of a chunk, returns the input of the recurrent layer.
        rnn: a RevGRU or RevLSTM, or several that are stacked, not bidirectional.
        read_out: called with the outputs of a chunk, the same chunk of every per-step argument, and
            all keyword arguments.
        between: modules between several `rnn`, one less than there are of them; for example
            `LockedDropout`. None: nothing.
        chunk_steps: time steps in a chunk. None: as many as keep the recurrent layers' working
            memory below `memory_budget`, see `chosen_chunk_steps`.
        read_out_steps: time steps that the read-out gets at a time. None: the whole chunk.
        segment_steps: sub-linear mode for very long sequences: keep the states every so many steps
            instead of the information buffer, for one more forward pass. "auto": 4 sqrt(steps).
        memory_budget: bytes, for `chunk_steps=None`.
        gradients: "forward" computes the gradients of a loss in the forward pass. "backward" does
            so in the backward pass, with a second run of the read-out; final states have gradients
            then. None: "forward", except under float16 autocast, where gradients of a loss that the
            GradScaler has not scaled yet could underflow.

    Raises:
        ValueError: for a bidirectional or ordinary rnn, sizes that do not fit, and, when called,
            for lengths that do not agree, a loss without gradient, and modules that mix time steps
            or cannot be replayed.
        ReversalError: if the recomputed states are not the original ones.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_revflip.reversible import LinearCrossEntropy, RevLSTM
        >>> model = ReversibleSequence(
        ...     nn.Embedding(100, 8), RevLSTM(8, 16), LinearCrossEntropy(16, 100)
        ... )
        >>> tokens = torch.randint(100, (71, 4))
        >>> loss, state = model(tokens[:-1], None, tokens[1:])
        >>> loss.backward()
    """

    def __init__(
        self,
        read_in: nn.Module,
        rnn: ReversibleRNNBase | Sequence[ReversibleRNNBase],
        read_out: nn.Module,
        *,
        between: Sequence[nn.Module] | None = None,
        chunk_steps: int | None = None,
        read_out_steps: int | None = None,
        segment_steps: int | Literal["auto"] | None = None,
        memory_budget: int = 8_000_000,
        gradients: Literal["forward", "backward"] | None = None,
    ) -> None:
        super().__init__()
        single = isinstance(rnn, nn.Module) and not isinstance(rnn, nn.ModuleList)
        rnns: list[Any] = [rnn] if single else list(rnn)  # type: ignore[arg-type]
        check_rnns(rnns)
        if between is not None and len(between) != len(rnns) - 1:
            raise ValueError(
                f"between must hold one module less than there are rnns ({len(rnns)}), "
                f"got {len(between)}."
            )
        counts: dict[str, Any] = {
            "chunk_steps": chunk_steps,
            "read_out_steps": read_out_steps,
            "segment_steps": None if segment_steps == "auto" else segment_steps,
            "memory_budget": memory_budget,
        }
        for name, count in counts.items():
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {count!r}.")
        for name, module in (("read_in", read_in), ("read_out", read_out)):
            if not isinstance(module, nn.Module):
                raise ValueError(f"{name} must be an nn.Module, got {type(module).__name__}.")
        if type(read_out) is HiddenSlice:
            hidden = rnns[-1].hidden_size
            if read_out.units > hidden:
                raise ValueError(
                    f"read_out is a slice of {read_out.units} units, but the rnn has {hidden} "
                    f"(hidden_size). Use HiddenSlice({hidden}) for all of them."
                )
            if segment_steps is not None:
                raise ValueError(
                    f"segment_steps={segment_steps!r} does not go with a HiddenSlice, which is "
                    "kept for every step anyway. Use segment_steps=None."
                )
        if gradients not in (None, "forward", "backward"):
            raise ValueError(f"gradients must be 'forward', 'backward' or None, got {gradients!r}.")
        self.read_in = read_in
        self.single = single
        self.rnns = nn.ModuleList(rnns)
        self.between = nn.ModuleList(between or [])
        self.read_out = read_out
        self.chunk_steps = chunk_steps
        self.read_out_steps = read_out_steps
        self.segment_steps = segment_steps
        self.memory_budget = memory_budget
        self.gradients = gradients
        self._checked: dict[tuple[object, ...], bool] = {}
        """For every kind of call that was checked, whether the read-out returns a loss."""

    def chosen_chunk_steps(self, batch: int) -> int:
        """Time steps in a chunk for a batch of that size.

        `chunk_steps`, or the largest number, at least 1, for which the working memory of the
        backward sweep fits `memory_budget`: per time step, sequence and layer, two numbers per row
        of `weight_ih`, `replay_floats` (6 for RevGRU, 10 for RevLSTM) and two more per hidden unit,
        and two per input feature, of 4 bytes each. What read-in and read-out need comes on top.
        """
        if self.chunk_steps is not None:
            return self.chunk_steps
        floats = 0
        for rnn in self._rnns:
            cell = rnn.cell
            features = rnn.input_size + (rnn.num_layers - 1) * rnn.hidden_size
            per_layer = 2 * cell.gate_rows + (cell.replay_floats + 2) * rnn.hidden_size
            floats += rnn.num_layers * per_layer + 2 * features
        return max(1, self.memory_budget // (4 * floats * max(1, batch)))

    # --- forward -----------------------------------------------------------------------------

    def forward(
        self,
        inputs: Steps | tuple[Steps, ...],
        state: Any = None,
        *per_step: Steps | None,
        **shared: Any,
    ) -> tuple[Any, Any]:
        """Run the network over a batch of sequences.

        Args:
            inputs: (steps, batch, ...), (batch, steps, ...) if the rnn is `batch_first`, or a
                PackedSequence; a tuple of them is unpacked into the arguments of `read_in`. Of a
                PackedSequence the modules get rows, (rows, ...), without a time dimension.
            state: initial state as the rnn takes it; a list of them for several; None for zero.
            per_step: arguments of the read-out that have time steps as `inputs` has (targets,
                weights, masks), or None.
            shared: keyword arguments of the read-out that every chunk gets whole, for example what
                it attends to; tensors get their gradient.

        Returns:
            What `read_out` returns, summed or joined, in the layout of `inputs`; and the final
            state, in the shape of `state`. The state has a gradient unless gradients are computed
            in the forward pass; for truncated back-propagation pass it, detached, to the next
            call.
        """
        several = isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence)
        parts: Any = inputs if several else (inputs,)
        result, final, _ = self.run(parts, state, *per_step, **shared)
        return result, final

    def run(
        self, parts: tuple[Any, ...], state: Any, *per_step: Any, **shared: Any
    ) -> tuple[Any, Any, SequencePlan]:
        """`forward`, and the plan of the pass: for modules built on this one.

        Args:
            parts: the inputs, always as a tuple.
            state: as `forward` takes it.
            per_step: likewise.
            shared: likewise.
        """
        layout, template = layout_of(parts, self._rnns[0].batch_first)
        flat_inputs = [
            data_of(part, layout, template, f"inputs[{i}]") for i, part in enumerate(parts)
        ]
        flat_args = [
            None if arg is None else data_of(arg, layout, template, f"per-step argument {i}")
            for i, arg in enumerate(per_step)
        ]
        states = [state] if self.single and state is not None else state
        initial = initial_states(self._rnns, states, layout, template)
        order = None if template is None else template.sorted_indices
        plan, tensors = self._plan(layout, order, flat_inputs, flat_args, shared, initial)
        run = uncompiled(ReversibleSequenceFunction.apply)
        outputs: tuple[Tensor, ...] = run(plan, *tensors.flat())
        count = len(outputs) - len(plan.stack.cells) * plan.states
        results = [wrapped(part, template) for part in outputs[:count]]
        finals = final_states(self._rnns, outputs[count:], template)
        result = results[0] if len(results) == 1 else tuple(results)
        return result, finals[0] if self.single else finals, plan

    def _plan(
        self,
        layout: Layout,
        order: Tensor | None,
        inputs: list[Tensor],
        per_step: list[Tensor | None],
        shared: dict[str, Any],
        initial: list[Tensor],
    ) -> tuple[SequencePlan, Tensors]:
        """Everything that the autograd Function is told."""
        fronts = self._fronts()
        modules = Modules(fronts, self.read_out)
        rnns = self._rnns_of_layers()
        weights: list[Any] = [
            tensor
            for rnn, suffix in rnns
            for tensor in rnn.layer_tensors(suffix, layout.batch, order)
        ]
        parameters = list(modules.names.values())
        constants = {n: v for n, v in shared.items() if not isinstance(v, Tensor)}
        shared_tensors = {n: v for n, v in shared.items() if isinstance(v, Tensor)}
        tensors = Tensors(
            inputs, per_step, list(shared_tensors.values()), parameters, weights, initial
        )
        device, dtype = weights[0].device, weights[0].dtype
        self._rnns[0].check_device(device)
        autocast = Autocast.now(device)
        if autocast.enabled and dtype != torch.float64:
            dtype = autocast.dtype
        chunk_steps = min(self.chosen_chunk_steps(layout.batch), layout.steps)
        if isinstance(self.segment_steps, int):
            chunk_steps = min(chunk_steps, self.segment_steps)
        stack = StackPlan(
            layout=layout,
            schedule=Schedule(list(layout.batch_sizes), chunk_steps),
            segment_chunks=self._segment_chunks(layout.steps, chunk_steps),
            cells=[fastest(rnn.cell, device, dtype) for rnn, _ in rnns],
            products=Products(dtype, onednn_available(device, dtype), frugal=True),
            fronts=fronts,
            replay=Replay.draw(self, layout.batch, device),
            autocast=autocast,
            sliced_units=self._sliced_units,
        )
        widths = [rnn.hidden_size for rnn, _ in rnns]
        # What the read-out returns may depend on modes and arguments.
        kind_of_call = (
            tuple(part.training for part in (self.read_in, *self.between, self.read_out)),
            layout.packed,
            layout.steps > 1,
            torch.is_inference_mode_enabled(),
            tuple(arg is None for arg in per_step),
            tuple((name, value is None) for name, value in shared.items()),
        )
        if kind_of_call not in self._checked:
            self._checked[kind_of_call] = check_modules(
                stack, modules, self.read_out, widths, inputs, per_step, shared
            )
        loss = self._checked[kind_of_call]
        early = self.gradients == "forward" or (self.gradients is None and dtype != torch.float16)
        plan = SequencePlan(
            stack=stack,
            modules=modules,
            read_out=self.read_out,
            read_out_steps=self.read_out_steps or chunk_steps,
            shared_names=list(shared_tensors),
            constants=constants,
            states=rnns[0][0].cell.states,
            loss=loss,
            store=torch.is_grad_enabled()
            and any(tensor is not None and tensor.requires_grad for tensor in tensors.flat()),
            early=loss and early,
            sizes=tensors.sizes(),
            on_forward=self._record,
        )
        return plan, tensors

    @property
    def _sliced_units(self) -> int | None:
        return self.read_out.units if type(self.read_out) is HiddenSlice else None

    def _fronts(self) -> list[Front]:
        """What makes the input of each layer."""
        fronts: list[Front] = []
        for number, rnn in enumerate(self._rnns):
            if number == 0:
                fronts.append(self.read_in)
            else:
                fronts.append(self.between[number - 1] if self.between else same)
            fronts += [partial(_dropout, rnn)] * (rnn.num_layers - 1)
        return fronts

    def _record(self, stack: StackSweep, states: Sequence[SweepState]) -> None:
        for rnn in self._rnns:
            rnn.last_passes = {}
        for (rnn, suffix), layer, state in zip(
            self._rnns_of_layers(), stack.layers, states, strict=True
        ):
            rnn.record(suffix, layer, state, together=True, segments=stack.segments)

    def _segment_chunks(self, steps: int, chunk_steps: int) -> int:
        size = self.segment_steps
        if size is None:
            size = steps
        elif size == "auto":
            size = 4 * math.isqrt(steps)
        return max(1, -(-size // chunk_steps))

    @property
    def _rnns(self) -> list[ReversibleRNNBase]:
        return list(self.rnns)  # type: ignore[arg-type]

    def _rnns_of_layers(self) -> list[tuple[ReversibleRNNBase, str]]:
        """The rnn and the suffix of its parameters of each layer, from the bottom."""
        return [(rnn, f"l{layer}") for rnn in self._rnns for layer in range(rnn.num_layers)]

    def extra_repr(self) -> str:
        """The arguments that are not modules."""
        names = ("chunk_steps", "read_out_steps", "segment_steps", "gradients")
        given = [f"{n}={getattr(self, n)!r}" for n in names if getattr(self, n) is not None]
        return ", ".join(given)


def _dropout(rnn: ReversibleRNNBase, x: Tensor) -> Tensor:
    return F.dropout(x, rnn.dropout, rnn.training)
