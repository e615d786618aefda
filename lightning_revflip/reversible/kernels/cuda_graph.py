"""Replays the chunks of a sweep as CUDA graphs: one launch instead of a few hundred small ones.

Off unless the environment variable `REVFLIP_CUDA_GRAPHS` is 1: its gain has not been measured.
"""

import contextlib
import os
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_revflip.reversible.cells import Cell
from lightning_revflip.reversible.layer_tensors import Gradients
from lightning_revflip.reversible.schedule import Chunk
from lightning_revflip.reversible.sweep import LayerSweep, SweepState


def graphs_enabled(device: torch.device, cell: Cell[Any]) -> bool:
    """Whether sweeps of a cell on this device should replay their chunks.

    Words that torch calls store grow with what is forgotten, which a graph cannot follow.
    """
    capturable = not cell.forgets or cell.storage.integers == torch.int32
    return device.type == "cuda" and capturable and os.environ.get("REVFLIP_CUDA_GRAPHS") == "1"


class _Captured(NamedTuple):
    graph: "torch.cuda.CUDAGraph"
    inputs: tuple[Tensor | None, ...]
    output: Tensor


class ChunkReplay:
    """Runs the chunks of one sweep over one layer, the third and later ones of a shape as a graph.

    The first chunk of a shape runs as always, which also compiles kernels and lets libraries
    allocate what they need. The second is captured and replayed. A graph uses the addresses that
    it was captured with: inputs are copied to where it reads them, and everything else must stay
    in place, so call `state.reserve` with all steps before a forward sweep. Nothing waits for the
    device. An instance serves one forward sweep or one backward sweep.

    Args:
        layer: whose chunks to run.
        state: what they move.
        enabled: otherwise every chunk runs as always.
    """

    def __init__(self, layer: LayerSweep, state: SweepState, enabled: bool) -> None:
        self.layer = layer
        self.state = state
        self.enabled = enabled
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, _Captured] = {}

    def forward_chunk(self, chunk: Chunk, x: Tensor, out: Tensor) -> None:
        """`LayerSweep.forward_chunk`."""

        def advance(x: Tensor | None) -> Tensor:
            assert x is not None
            result = torch.empty_like(out, memory_format=torch.contiguous_format)
            self.layer.forward_chunk(chunk, x, self.state, result)
            return result

        if not self.enabled:
            self.layer.forward_chunk(chunk, x, self.state, out)
            return
        out.copy_(self._run(_shape(chunk), advance, x))

    def backward_chunk(
        self, chunk: Chunk, x: Tensor, grad_out: Tensor | None, grads: Gradients
    ) -> Tensor:
        """`LayerSweep.undo_chunk`, then `differentiate_chunk`: the gradient of x.

        With graphs the result is overwritten by the next call.
        """

        def differentiate(x: Tensor | None, grad_out: Tensor | None) -> Tensor:
            assert x is not None
            steps = self.layer.undo_chunk(chunk, x, self.state)
            return self.layer.differentiate_chunk(chunk, x, steps, grad_out, grads)

        def in_place(x: Tensor | None, grad_out: Tensor | None) -> Tensor:
            # The next replay reads the gradients of the states where this one read them.
            before = [list(half) for half in grads.states]
            grad_x = differentiate(x, grad_out)
            for old_half, new_half in zip(before, grads.states, strict=True):
                for old, new in zip(old_half, new_half, strict=True):
                    old.copy_(new)
            grads.states[:] = before
            return grad_x

        if not self.enabled:
            return differentiate(x, grad_out)
        return self._run(_shape(chunk), in_place, x, grad_out)

    def _run(
        self, shape: Hashable, function: Callable[..., Tensor], *inputs: Tensor | None
    ) -> Tensor:
        if shape not in self._seen:
            self._seen.add(shape)
            return function(*map(_copy, inputs))
        device = self.state.halves[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            captured = self._captured.get(shape)
            if captured is None:
                captured = self._captured[shape] = _capture(function, inputs)
            for static, given in zip(captured.inputs, inputs, strict=True):
                if static is not None and given is not None:
                    static.copy_(given)
            captured.graph.replay()
            return captured.output


def _shape(chunk: Chunk) -> Hashable:
    """What chunks must have in common to share a graph: rows of each step, in order."""
    return tuple((step.start, step.stop) for step in chunk.steps)


def _copy(x: Tensor | None) -> Tensor | None:
    """A dense copy: products must meet the same strides and alignment, captured or not."""
    return None if x is None else x.clone(memory_format=torch.contiguous_format)


def _capture(function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...]) -> _Captured:
    """Records the launches of `function` without running them."""
    static = tuple(map(_copy, inputs))
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        # Other threads, such as a data loader's, may go on using the device meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            output = function(*static)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # about the capture, not about its cause
                graph.capture_end()
            raise
        graph.capture_end()
    current.wait_stream(side)
    return _Captured(graph, static, output)
