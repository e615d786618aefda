"""Perturbed layers on the Triton cells, in the interpreter where there is no GPU, and replay."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_revflip.reversible import rnn_base
from lightning_revflip.reversible.autograd import zero_gradients
from lightning_revflip.reversible.cells import RevGRUCell, RevLSTMCell
from lightning_revflip.reversible.kernels import cuda_graph
from lightning_revflip.reversible.layer_tensors import LayerTensors
from lightning_revflip.reversible.products import Products
from lightning_revflip.reversible.schedule import Schedule
from lightning_revflip.reversible.sweep import LayerSweep, SweepState
from tests.helpers.exact_arithmetic import ExactArithmetic
from tests.helpers.passes import (
    CELLS,
    assert_close,
    call,
    gradients,
    normal,
    recovered_states,
    weighted_sum,
)
from tests.helpers.perturbed_layers import perturbed, signs
from tests.helpers.triton_kernels import kernel_sigmoid, kernels_on_a_gpu_or_interpreted

pytest.importorskip("triton")


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_the_specification(monkeypatch, cell) -> None:
    found = []
    with kernels_on_a_gpu_or_interpreted() as kernels:
        block = 16 if kernels.device.type == "cpu" else 64

        def on_triton(cell: Any, device: torch.device, dtype: torch.dtype) -> Any:
            return kernels.cell(cell.name, cell.hidden_size, cell.max_forget_bits, block)

        by_torch = torch.device("cpu"), lambda cell, device, dtype: cell
        for device, chosen in (by_torch, (kernels.device, on_triton)):
            monkeypatch.setattr(rnn_base, "fastest", chosen)
            rnn = perturbed(cell, 3, 10, bidirectional=True, chunk_steps=2, forget_bias=-3.0)
            rnn.to(device)
            x = normal(6, 4, 3).to(device).requires_grad_()
            packed = pack_padded_sequence(x, torch.tensor([6, 1, 3, 6]), enforce_sorted=False)
            with ExactArithmetic(kernel_sigmoid), recovered_states() as passes:
                output, finals = call(rnn, packed)
                loss = weighted_sum([tensor.cpu() for tensor in (output.data, *finals)])
                grads = gradients(loss, {**dict(rnn.named_parameters()), "x": x})
            assert all(recovered.empty for recovered in passes)
            found.append((output.data.cpu(), {name: grad.cpu() for name, grad in grads.items()}))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
    assert_close(found[1][1], found[0][1], 1e-5)


# --- replay --------------------------------------------------------------------------------------


class PretendedGraph:
    """Runs on the CPU what a graph would: the captured function, on the addresses it had."""

    def __init__(self, function: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        self.function, self.inputs, self.output = function, inputs, output

    def replay(self) -> None:
        self.output.copy_(self.function(*self.inputs))


def pretended_capture(width: int) -> Any:
    """For results of shape (2, width)."""

    def capture(function: Any, inputs: tuple[Tensor | None, ...]) -> Any:
        static = tuple(None if x is None else torch.full_like(x, torch.nan) for x in inputs)
        output = torch.full((2, width), torch.nan)
        return cuda_graph._Captured(PretendedGraph(function, static, output), static, output)

    return capture


def both_passes(cell: Any, enabled: bool, monkeypatch: Any) -> list[Tensor]:
    """Outputs and gradients of 7 single-step chunks."""
    rows, half = cell.gate_rows, cell.half
    shapes = ((rows, 4), (rows, half), (rows,), (rows, half))
    tensors = [0.5 * normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    layer = LayerSweep.of(
        cell,
        Schedule([2] * 7, 1),
        Products(torch.float32, onednn=False),
        LayerTensors(*tensors, signs(2, 2 * half).char(), signs(2, rows, seed=1).char()),
    )
    x, grad_out = normal(14, 4, seed=3), normal(14, 6, seed=4)
    state = SweepState.initial(cell, 2, [], x.device, store=True)
    out, grad_x = x.new_empty(14, 6), torch.empty_like(x)
    chunks = layer.schedule.chunks()
    monkeypatch.setattr(cuda_graph, "_capture", pretended_capture(6))
    replay = cuda_graph.ChunkReplay(layer, state, enabled)
    for chunk in chunks:
        replay.forward_chunk(chunk, chunk.rows(x), out[chunk.start : chunk.stop])

    grads = zero_gradients(layer, [normal(2, 6, seed=5 + i) for i in range(cell.states)], True)
    monkeypatch.setattr(cuda_graph, "_capture", pretended_capture(4))
    replay = cuda_graph.ChunkReplay(layer, state, enabled)
    for chunk in reversed(chunks):
        part = slice(chunk.start, chunk.stop)
        grad_x[part] = replay.backward_chunk(chunk, chunk.rows(x), grad_out[part], grads)
    state.check_is(SweepState.initial(cell, 2, [], x.device, store=True))
    return [out, grad_x, *(grad for grad in grads.tensors() if grad is not None)]


@pytest.mark.parametrize("kind", [RevGRUCell, RevLSTMCell])
def test_replayed_chunks_use_the_perturbation_and_add_up_its_gradient(kind, monkeypatch) -> None:
    expected = both_passes(kind(6, 3.0), False, monkeypatch)
    found = both_passes(kind(6, 3.0), True, monkeypatch)
    assert len(found) == 6
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
