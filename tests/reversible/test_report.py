"""`memory_report` tells what was really kept."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.profiler import ProfilerActivity, profile

from lightning_revflip.reversible import RevGRU, RevLSTM, memory_report
from lightning_revflip.reversible.buffer import information_bits, stored_bits
from tests.helpers.passes import CELLS, call, initial_states, make, normal
from tests.helpers.reference_cell import ReferenceRNN

ORDINARY = {RevGRU: nn.GRU, RevLSTM: nn.LSTM}
STATES = {RevGRU: 1, RevLSTM: 2}


def kept_storages(rnn, x, states=()):
    """Bytes of every storage that the call saves for backward, by address."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = call(rnn, x, states)
    known = [x, *rnn.parameters(), *states]
    for tensor in known:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return output, kept


@pytest.mark.parametrize("bits", [1, 3, None, 0])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_kept_bytes_are_those_of_the_saved_tensors(cell, given, bits):
    rnn = make(cell, 20, 30, bias=False, max_forget_bits=bits)
    states = initial_states(rnn, 8) if given else ()
    _, kept = kept_storages(rnn, normal(70, 8, 20), states)
    assert sum(kept.values()) == memory_report(rnn).kept_bytes


@pytest.mark.parametrize("cell", CELLS)
def test_a_bias_adds_no_more_than_itself_to_the_saved_tensors(cell):
    rnn = make(cell, 20, 30)
    _, kept = kept_storages(rnn, normal(70, 8, 20))
    beyond = sum(kept.values()) - memory_report(rnn).kept_bytes
    assert 0 <= beyond <= rnn.bias_ih_l0.nbytes


@pytest.mark.parametrize("cell", CELLS)
def test_the_graph_keeps_nothing_that_grows_like_states_do(cell):
    """No saved tensor beside the word stream depends on the number of steps."""
    rnn = make(cell, 20, 30)
    sizes = []
    for steps in (50, 100):
        _, kept = kept_storages(rnn, normal(steps, 8, 20))
        words = (memory_report(rnn).stored_bits - 32 * 8 * 30 * STATES[cell]) // 8
        sizes.append(sum(kept.values()) - words)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("bits", [1, 2, 3, 5, None])
@pytest.mark.parametrize("steps", [70, 1000])
@pytest.mark.parametrize("cell", CELLS)
def test_stored_bits_are_hardly_more_than_the_forgotten_information(cell, steps, bits):
    rnn = make(cell, 20, 32, max_forget_bits=bits)
    call(rnn, normal(steps, 5, 20))
    layer = memory_report(rnn).layers[0]
    units = 5 * 32 * STATES[cell]
    assert layer.stored_bits <= 1.03 * layer.information_bits + 64 * units
    assert layer.stored_bits >= layer.information_bits - units, "nothing lossless is smaller"


@pytest.mark.parametrize("bits", [1, 2.5, None])
@pytest.mark.parametrize("cell", CELLS)
def test_information_is_that_of_the_gates_of_the_plain_cell(cell, bits):
    rnn = make(cell, 5, 8, max_forget_bits=bits, dtype=torch.float64)
    x = normal(30, 4, 5, dtype=torch.float64)
    call(rnn, x)
    reference = ReferenceRNN.of(rnn)
    reference(dict(rnn.named_parameters()), x)
    gates = torch.cat([gate.flatten() for gate in reference.forgotten])
    layer = memory_report(rnn).layers[0]
    assert torch.equal(layer.gate_counts, torch.bincount(gates, minlength=1025))
    truth = (10 - gates.double().log2()).sum().item()
    assert layer.information_bits == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("bits", [3, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_every_layer_counts_the_steps_of_real_sequences_only(cell, bits):
    rnn = make(cell, 5, 8, 2, bidirectional=True, max_forget_bits=bits)
    lengths = torch.tensor([9, 2, 4])
    call(rnn, pack_padded_sequence(normal(9, 3, 5), lengths, enforce_sorted=False))
    report = memory_report(rnn)
    unit_steps = 15 * 8 * STATES[cell]
    for layer in report.layers:
        assert layer.unit_steps == unit_steps
        assert layer.float_state_bits == 32 * unit_steps
        assert layer.gate_counts.sum() == (unit_steps if bits else 0)
    assert report.float_state_bits == 4 * 32 * unit_steps


@pytest.mark.parametrize("cell", CELLS)
def test_stored_bits_are_the_words_and_states_in_the_graph(cell):
    rnn = make(cell, 5, 8, bias=False)
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        call(rnn, normal(50, 3, 5))
    (words,) = (tensor.numel() for tensor in found if tensor.dtype == torch.int16)
    units = 3 * 8 * STATES[cell]
    report = memory_report(rnn)
    assert words > 0
    assert report.stored_bits == stored_bits(words, units) == 16 * words + 32 * units
    assert report.kept_bytes == 2 * words + 4 * units + 4 * units


def kept_by_ordinary_layer(cell):
    """Bytes alive after a forward pass of nn.GRU or nn.LSTM, beside its outputs."""
    ordinary, x = ORDINARY[cell](200, 300), normal(70, 20, 200)
    ordinary(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output, final = ordinary(x)
    alive = sum(event.self_cpu_memory_usage for event in profiler.key_averages())
    finals = final if isinstance(final, tuple) else (final,)
    return alive - output.nbytes - sum(state.nbytes for state in finals)


@pytest.mark.parametrize("cell", CELLS)
def test_standard_bytes_are_what_the_ordinary_layer_keeps(cell):
    rnn = make(cell, 200, 300)
    call(rnn, normal(70, 20, 200))
    assert memory_report(rnn).standard_bytes == pytest.approx(
        kept_by_ordinary_layer(cell), rel=0.05
    )


@pytest.mark.parametrize("cell", CELLS)
def test_thirty_times_less_is_kept_than_by_the_ordinary_layer(cell):
    rnn = make(cell, 200, 300)
    _, kept = kept_storages(rnn, normal(70, 20, 200))
    report = memory_report(rnn)
    assert 30 * sum(kept.values()) <= kept_by_ordinary_layer(cell)
    assert report.savings == report.standard_bytes / report.kept_bytes >= 30


@pytest.mark.parametrize("cell", CELLS)
def test_double_precision_and_longer_sequences_count_in_proportion(cell):
    reports = []
    for steps, dtype in ((20, torch.float32), (40, torch.float64)):
        rnn = make(cell, 5, 8, dtype=dtype)
        call(rnn, normal(steps, 3, 5, dtype=dtype))
        reports.append(memory_report(rnn))
    assert reports[1].standard_bytes == 4 * reports[0].standard_bytes
    assert reports[1].float_state_bits == 4 * reports[0].float_state_bits


def test_totals_are_sums_over_layers():
    rnn = make(RevLSTM, 5, 8, 2, bidirectional=True)
    call(rnn, normal(30, 3, 5))
    report = memory_report(rnn)
    assert len(report.layers) == 4
    for name in ("stored_bits", "information_bits", "float_state_bits", "kept_bytes"):
        assert getattr(report, name) == sum(getattr(layer, name) for layer in report.layers)
    assert report.standard_bytes == sum(layer.standard_bytes for layer in report.layers)
    assert report.chunk_bytes == max(layer.chunk_bytes for layer in report.layers)
    steps = 4 * 30 * 3 * 8 * 2
    assert report.bits_per_unit_step == pytest.approx(report.stored_bits / steps)
    assert report.state_savings == pytest.approx(report.float_state_bits / report.stored_bits)
    # At least the information has to be stored.
    assert report.information_savings >= report.state_savings > 1
    counts = sum(layer.gate_counts for layer in report.layers)
    assert information_bits(counts) == pytest.approx(report.information_bits)


def test_a_report_describes_the_last_call():
    rnn = make(RevGRU, 5, 8)
    call(rnn, normal(30, 3, 5))
    first = memory_report(rnn)
    call(rnn, normal(60, 3, 5))
    assert memory_report(rnn).float_state_bits == 2 * first.float_state_bits
    with torch.no_grad():
        call(rnn, normal(30, 3, 5))
    after_evaluation = memory_report(rnn)
    assert after_evaluation.kept_bytes == 0
    assert after_evaluation.savings == after_evaluation.state_savings == float("inf")
    assert first.kept_bytes > 0, "a report is not changed by later calls"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = make(RevGRU, 5, 8, bidirectional=True)
        self.blocks = nn.ModuleList([nn.Linear(16, 6), make(RevLSTM, 6, 4)])

    def forward(self, x):
        return self.blocks[1](self.blocks[0](self.encoder(x)[0]))[0]


def test_report_of_a_model_names_its_layers_and_is_readable():
    model = Model()
    model(normal(30, 3, 5))
    report = memory_report(model)
    names = ["encoder.l0", "encoder.l0_reverse", "blocks.1.l0"]
    assert [layer.name for layer in report.layers] == names
    header, *rows, summary, work = str(report).splitlines()
    assert header.split() == ["layer", "bits/unit/step", "states", "kept", "ordinary", "saved"]
    for row, layer in zip(rows, report.layers, strict=True):
        name, bits, states, *_, saved = row.split()
        assert states == f"{layer.float_state_bits / layer.stored_bits:.1f}x"
        assert name == layer.name
        assert float(bits) == pytest.approx(layer.bits_per_unit_step, abs=1e-3)
        assert saved == f"{layer.standard_bytes / layer.kept_bytes:.1f}x"
    assert "instead of" in summary
    assert "steps at a time" in work
    assert f"{report.stored_bits / report.information_bits:.2f} times" in summary
    assert len({len(row) for row in (header, *rows)}) == 1, "columns are aligned"


def test_a_part_of_a_report_holds_the_layers_of_that_part():
    model = Model()
    model(normal(30, 3, 5))
    report = memory_report(model)
    assert report.within("encoder").layers == report.layers[:2]
    assert report.within("blocks.1").layers == report.layers[2:]
    with pytest.raises(ValueError, match=r"within 'block'; there are encoder.l0, encoder.l0_rev"):
        report.within("block")


def test_a_report_of_a_step_says_what_the_whole_model_allocates():
    model, x = Model(), normal(30, 3, 5)

    def step():
        model(x).sum().backward()
        torch.empty(25_000_000)  # much more than all else, and freed at once

    report = memory_report(model, step)
    assert report.peak_bytes == pytest.approx(100_000_000, rel=0.01)
    assert "peak over a step: 100" in str(report)
    assert memory_report(model).peak_bytes is None


def test_report_after_an_evaluation_says_that_all_was_saved():
    rnn = make(RevGRU, 5, 8)
    with torch.no_grad():
        call(rnn, normal(30, 3, 5))
    row = str(memory_report(rnn)).splitlines()[1]
    assert row.split()[:2] == ["l0", "0.000"]
    assert row.endswith("all")


def test_report_of_a_module_without_reversible_layers_says_how_to_get_one():
    with pytest.raises(ValueError, match=r"Linear holds no reversible layer.*ReversibleRNN"):
        memory_report(nn.Linear(2, 2))


def test_report_before_the_first_call_asks_for_one():
    with pytest.raises(
        RuntimeError, match=r"no reversible layer has run yet.*call the module first"
    ):
        memory_report(make(RevGRU, 5, 8))


@pytest.mark.parametrize("cell", CELLS)
def test_chunk_bytes_are_what_the_backward_pass_works_in(cell):
    """Within a half of the allocator's peak, which also holds gradients and states."""
    rnn = make(cell, 64, 256, chunk_steps=20)
    x, grad = normal(200, 16, 64), normal(200, 16, 256)
    output = call(rnn, x)[0]
    reported = memory_report(rnn).chunk_bytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output.backward(grad)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    weights = sum(parameter.numel() * 4 for parameter in rnn.parameters())
    assert 0.5 * (peak - 3 * weights) < reported < 1.5 * peak
