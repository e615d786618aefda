"""Whole layers on the Triton cells, and the replay of chunks; see `test_triton.py`."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_revflip.reversible import HiddenSlice, ReversibleSequence, rnn_base, sequence
from lightning_revflip.reversible.autograd import zero_gradients
from lightning_revflip.reversible.cells import RevGRUCell, RevLSTMCell
from lightning_revflip.reversible.errors import ReversalError
from lightning_revflip.reversible.kernels import cuda_graph, fastest
from lightning_revflip.reversible.products import Products
from lightning_revflip.reversible.schedule import Schedule
from lightning_revflip.reversible.sweep import LayerSweep, SweepState
from tests.helpers.exact_arithmetic import ExactArithmetic
from tests.helpers.passes import (
    CELLS,
    assert_close,
    call,
    gradients,
    initial_states,
    make,
    normal,
    recovered_states,
    weighted_sum,
)
from tests.helpers.triton_kernels import Kernels, kernel_sigmoid, kernels_on_a_gpu_or_interpreted

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    with kernels_on_a_gpu_or_interpreted() as found:
        yield found


@pytest.fixture
def on_triton(kernels, monkeypatch) -> Any:
    """Lets layers run on the Triton cells, wherever they are."""

    def use(block: int = 64) -> None:
        def chosen(cell: Any, device: torch.device, dtype: torch.dtype) -> Any:
            return kernels.cell(cell.name, cell.hidden_size, cell.max_forget_bits, block)

        monkeypatch.setattr(rnn_base, "fastest", chosen)

    return use


# --- layers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_the_specification(kernels, on_triton, monkeypatch, cell, bits):
    found, recovered = [], []
    for block in (None, 16 if kernels.device.type == "cpu" else 64):
        if block is None:
            monkeypatch.setattr(rnn_base, "fastest", lambda cell, device, dtype: cell)
        else:
            on_triton(block)
        device = torch.device("cpu") if block is None else kernels.device
        rnn = make(
            *(cell, 3, 10),
            bidirectional=True,
            chunk_steps=2,
            max_forget_bits=bits,
            forget_bias=-3.0,
        ).to(device)
        x = normal(6, 4, 3).to(device).requires_grad_()
        states = [state.detach().to(device).requires_grad_() for state in initial_states(rnn, 4)]
        named = {**dict(rnn.named_parameters()), "x": x, "h": states[0], "c": states[-1]}
        packed = pack_padded_sequence(x, torch.tensor([6, 1, 3, 6]), enforce_sorted=False)
        with ExactArithmetic(kernel_sigmoid), recovered_states() as passes:
            output, finals = call(rnn, packed, states)
            loss = weighted_sum([tensor.cpu() for tensor in (output.data, *finals)])
            grads = gradients(loss, named)
        assert all(last.words > 0 for last in rnn.last_passes.values())
        found.append((output.data.cpu(), {name: grad.cpu() for name, grad in grads.items()}))
        recovered.append(passes)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-6)
    assert_close(found[1][1], found[0][1], 1e-5)
    for mine, theirs in zip(*recovered[::-1], strict=True):
        assert mine.empty
        for state, expected in zip(mine.states, theirs.states, strict=True):
            assert torch.equal(state.cpu(), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_can_run_twice_and_outputs_need_no_gradients(kernels, on_triton, cell) -> None:
    on_triton()
    rnn = make(cell, 3, 6, max_forget_bits=None, forget_bias=-5.0).to(kernels.device)
    x = normal(4, 2, 3).to(kernels.device)
    output = rnn(x)[0]
    assert rnn.last_passes["l0"].words > 0
    loss = weighted_sum([output.cpu()])
    first, second = (gradients(loss, dict(rnn.named_parameters()), retain_graph=True) for _ in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(rnn(x)[0], output)


@pytest.mark.parametrize("cell", CELLS)
def test_a_weight_changed_before_backward_is_noticed(kernels, on_triton, cell) -> None:
    on_triton()
    rnn, x = make(cell, 3, 6).to(kernels.device), normal(12, 2, 3).to(kernels.device)
    loss = rnn(x)[0].sum()
    rnn.weight_hh_l0.data.add_(0.1)
    with pytest.raises(ReversalError):
        loss.backward()


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # of NaN, by numpy
@pytest.mark.parametrize("cell", CELLS)
def test_an_infinite_input_is_refused(kernels, on_triton, cell) -> None:
    on_triton()
    rnn, x = make(cell, 3, 6).to(kernels.device), normal(3, 2, 3).to(kernels.device)
    x[1, 1, 1] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity in the input"):
        rnn(x)


def test_kernels_are_launched_as_they_were_compiled_in_the_tests(kernels) -> None:
    launched = {}

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *tensors, **options: launched.update(grid=grid, **options)

    kernels.triton.launch(Kernel(), (2,), 256, torch.zeros(1, device=kernels.device), count=300)
    assert launched == {
        **{"grid": (2,), "count": 300, "BLOCK": 256},
        **{"num_warps": 4, "enable_fp_fusion": False},
    }


def test_a_sweep_without_enough_room_is_repeated_with_enough(kernels) -> None:
    """Until a sweep says so its words are incomplete, and it must not be reversed."""
    cell = kernels.cell("RevGRU", 6, None, 64)
    layer, x = sweep_of(cell, kernels.device), normal(6, 4, seed=1).to(kernels.device)
    layer.weight_ih[:] *= -30.0  # gates far below 1/4
    schedule, states = layer.schedule, []
    for certain in (False, True):
        state = SweepState.initial(cell, 2, [], kernels.device, store=True)
        state.reserve(3, certain)
        for chunk in schedule.chunks():
            out = x.new_empty(len(chunk), 6)
            layer.forward_chunk(chunk, chunk.rows(x), state, out)
        states.append(state)
    assert [state.overflowed() for state in states] == [True, False]
    with pytest.raises(RuntimeError, match="certain=True"):
        states[0].compact()
    back = SweepState.from_compact(cell, *states[1].compact())
    for chunk in reversed(schedule.chunks()):
        layer.undo_chunk(chunk, chunk.rows(x), back)
    back.check_is(SweepState.initial(cell, 2, [], kernels.device, store=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_on_a_gpu_use_the_triton_cells(kernels, dtype) -> None:
    for kind in (RevGRUCell, RevLSTMCell):
        chosen = fastest(kind(6, 3.0), kernels.device, dtype)
        assert isinstance(chosen, kernels.triton_cells.TritonCell)


# --- replay --------------------------------------------------------------------------------------


def sweep_of(cell: Any, device: torch.device, steps: int = 3, batch: int = 2) -> LayerSweep:
    """A layer with 4 inputs and chunks of a single step."""
    rows, half = cell.gate_rows, cell.half
    weights = [0.5 * normal(rows, 4).to(device), 0.5 * normal(rows, half, seed=2).to(device)]
    bias = torch.zeros(rows, device=device)
    products = Products(torch.float32, onednn=False)
    return LayerSweep(cell, Schedule([batch] * steps, 1), products, *weights, bias)


class PretendedGraph:
    """Runs on the CPU what a graph would: the captured function, on the addresses it had."""

    def __init__(self, function: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        self.function, self.inputs, self.output = function, inputs, output

    def replay(self) -> None:
        self.output.copy_(self.function(*self.inputs))


def pretended_capture(shape: Any) -> Any:
    def capture(function: Any, inputs: tuple[Tensor | None, ...]) -> Any:
        static = tuple(None if x is None else torch.full_like(x, torch.nan) for x in inputs)
        output = torch.full(shape, torch.nan)
        return cuda_graph._Captured(PretendedGraph(function, static, output), static, output)

    return capture


def both_passes(cell: Any, device: torch.device, enabled: bool, monkeypatch: Any) -> list[Tensor]:
    """Outputs and gradients of 7 single-step chunks."""
    layer = sweep_of(cell, device, steps=7)
    x, grad_out = normal(14, 4, seed=3).to(device), normal(14, 6, seed=4).to(device)
    state = SweepState.initial(cell, 2, [], device, store=True)
    state.reserve(7)
    out, grad_x = x.new_empty(14, 6), torch.empty_like(x)
    chunks = layer.schedule.chunks()
    if device.type == "cpu":
        monkeypatch.setattr(cuda_graph, "_capture", pretended_capture((2, 6)))
    replay = cuda_graph.ChunkReplay(layer, state, enabled)
    for chunk in chunks:
        replay.forward_chunk(chunk, chunk.rows(x), out[chunk.start : chunk.stop])

    state = SweepState.from_compact(cell, *state.compact())
    grads = zero_gradients(layer, [normal(2, 6, seed=5 + i).to(device) for i in range(cell.states)])
    if device.type == "cpu":
        monkeypatch.setattr(cuda_graph, "_capture", pretended_capture((2, 4)))
    replay = cuda_graph.ChunkReplay(layer, state, enabled)
    for chunk in reversed(chunks):
        rows = slice(chunk.start, chunk.stop)
        grad_x[rows] = replay.backward_chunk(chunk, chunk.rows(x), grad_out[rows], grads)
    state.check_is(SweepState.initial(cell, 2, [], device, store=True))
    assert grads.bias is not None
    flat = [grad for half in grads.states for grad in half]
    return [out, grad_x, grads.weight_ih, grads.weight_hh, grads.bias, *flat]


@pytest.mark.parametrize("kind", [RevGRUCell, RevLSTMCell])
def test_replayed_chunks_see_their_own_inputs_and_gradients(kind, monkeypatch) -> None:
    cpu = torch.device("cpu")
    expected = both_passes(kind(6, 3.0), cpu, False, monkeypatch)
    found = both_passes(kind(6, 3.0), cpu, True, monkeypatch)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("kind", ["RevGRU", "RevLSTM"])
def test_graphs_compute_what_single_launches_do(kernels, kind, monkeypatch) -> None:
    cell = kernels.cell(kind, 6, 3.0, 64)
    expected = both_passes(cell, kernels.device, False, monkeypatch)
    found = both_passes(cell, kernels.device, True, monkeypatch)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_graphs_are_off_unless_asked_for(kernels, monkeypatch) -> None:
    monkeypatch.delenv("REVFLIP_CUDA_GRAPHS", raising=False)
    cuda, cell = torch.device("cuda"), kernels.cell("RevGRU", 6, 3.0, 64)
    assert not cuda_graph.graphs_enabled(cuda, cell)
    monkeypatch.setenv("REVFLIP_CUDA_GRAPHS", "1")
    assert cuda_graph.graphs_enabled(cuda, cell)
    assert cuda_graph.graphs_enabled(cuda, RevGRUCell(6, 0))
    assert not cuda_graph.graphs_enabled(cuda, RevGRUCell(6, 3.0))
    assert not cuda_graph.graphs_enabled(torch.device("cpu"), cell)


# --- kept units ----------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [3, 7])
@pytest.mark.parametrize("cell", CELLS)
def test_kept_units_are_those_of_the_specification(kernels, monkeypatch, cell, units) -> None:
    found = []
    for on_kernels in (False, True):

        def chosen(cell: Any, device: Any, dtype: Any, use: bool = on_kernels) -> Any:
            block = 16 if kernels.device.type == "cpu" else 64
            sizes = (cell.hidden_size, cell.max_forget_bits)
            return kernels.cell(cell.name, *sizes, block) if use else cell

        monkeypatch.setattr(sequence, "fastest", chosen)
        device = kernels.device if on_kernels else torch.device("cpu")
        rnn = make(cell, 3, 10, 2, max_forget_bits=3.0, forget_bias=-3.0)
        model = ReversibleSequence(torch.nn.Identity(), rnn, HiddenSlice(units), chunk_steps=2)
        model.to(device)
        x = normal(6, 4, 3).to(device).requires_grad_()
        packed = pack_padded_sequence(x, torch.tensor([6, 1, 3, 6]), enforce_sorted=False)
        with ExactArithmetic(kernel_sigmoid), recovered_states() as passes:
            kept, state = model(packed)
            finals = state if isinstance(state, tuple) else (state,)
            loss = weighted_sum([tensor.cpu() for tensor in (kept.data, *finals)])
            grads = gradients(loss, {**dict(model.named_parameters()), "x": x})
        assert all(recovered.empty for recovered in passes)
        counts = [last.gate_counts.cpu() for last in rnn.last_passes.values()]
        grads = {name: grad.cpu() for name, grad in grads.items()}
        found.append((kept.data.cpu(), grads, torch.stack(counts).sum(dim=1)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=3e-6)
    assert_close(found[1][1], found[0][1], 2e-5)
    assert torch.equal(found[1][2], found[0][2])
