"""The compiled cells against the torch path, which is their specification."""

import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_revflip.reversible import RevGRU, RevLSTM
from lightning_revflip.reversible.buffer import InformationBuffer, WordStream
from lightning_revflip.reversible.kernels import fastest, native, native_cells, torch_only
from tests.helpers.passes import CELLS, assert_close, call, gradients, make, normal, weighted_sum
from tests.helpers.properties import examples

compiled = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler here: layers run on torch alone"
)


@compiled
def test_the_library_is_compiled_where_there_is_a_compiler() -> None:
    assert native.LIBRARY.available


@compiled
def test_sigmoids_are_accurate_to_a_unit_in_the_last_place() -> None:
    x = torch.cat([torch.linspace(-100, 100, 200_001), torch.tensor([-torch.inf, torch.inf, 0.0])])
    error = (native.sigmoid(x).double() - x.double().sigmoid()).abs()
    assert error.max() < 1.2e-7
    assert native.sigmoid(torch.tensor([torch.nan])).isnan()


@compiled
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 7),
    units=st.integers(1, 40),
    lanes=st.integers(1, 50),
    lowest=st.sampled_from([1, 128, 512, 1000]),
)
@examples(max_examples=60)
def test_words_buffers_and_states_are_those_of_the_specification(
    seed, rows, units, lanes, lowest
) -> None:
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randint(-(2**31) + 1, 2**31, (rows, units), generator=generator).double()
    native_state = plain.clone()
    initial = plain.clone()
    buffers = [
        kind(InformationBuffer.initial_state(lanes), WordStream())
        for kind in (InformationBuffer, native_cells.NativeBuffer)
    ]
    gates = [
        torch.randint(lowest, 1024, (rows, units), generator=generator).float() for _ in range(60)
    ]
    for gate in gates:
        buffers[0].multiply_(plain, gate.double())
        buffers[1].multiply_(native_state, gate / 1024)
        assert torch.equal(plain, native_state)
        assert torch.equal(buffers[0].state, buffers[1].state)
    words = [buffer.words.pack() for buffer in buffers if buffer.words is not None]
    assert torch.equal(*words)
    for gate in reversed(gates):
        buffers[1].divide_(native_state, gate / 1024)
    assert torch.equal(native_state, initial)
    assert buffers[1].is_initial()
    assert not buffers[1].words


@compiled
@pytest.mark.parametrize("cell", CELLS)
def test_float32_and_bf16_layers_on_a_cpu_use_the_compiled_cells(cell) -> None:
    rnn = make(cell, 4, 6)
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert type(fastest(rnn.cell, cpu, dtype)) is not type(rnn.cell)
    assert fastest(rnn.cell, cpu, torch.float64) is rnn.cell
    assert fastest(make(cell, 4, 6, max_forget_bits=0).cell, cpu, torch.float32).forgets is False
    with torch_only():
        assert fastest(rnn.cell, cpu, torch.float32) is rnn.cell


@compiled
@pytest.mark.parametrize("cell", CELLS)
def test_both_implementations_agree(cell) -> None:
    rnn = make(cell, 7, 10, 2, bidirectional=True)
    x = normal(30, 5, 7).requires_grad_()
    named = {**dict(rnn.named_parameters()), "x": x}
    found = []
    for implementation in ("native", "torch"):
        if implementation == "native":
            output, finals = call(rnn, x)
        else:
            with torch_only():
                output, finals = call(rnn, x)
        found.append((output, gradients(weighted_sum([output, *finals]), named)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-4)
    assert_close(found[0][1], found[1][1], 1e-3)


@pytest.mark.parametrize("cell", [RevGRU, RevLSTM])
def test_default_dtype_and_device_do_not_disturb_the_compiled_cells(cell) -> None:
    torch.manual_seed(0)
    rnn, x = cell(4, 6, dtype=torch.float32), torch.randn(9, 3, 4)
    expected = rnn(x)[0]
    torch.set_default_dtype(torch.float64)
    try:
        output = rnn(x)[0]
        output.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("setting", [{"REVFLIP_NATIVE": "0"}, {"CC": "no-such-compiler"}])
def test_layers_run_on_torch_alone_where_nothing_is_compiled(setting, monkeypatch) -> None:
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    code = (
        "import torch; from lightning_revflip.reversible import RevLSTM; "
        "from lightning_revflip.reversible.kernels.native import LIBRARY; "
        "RevLSTM(4, 6)(torch.randn(5, 2, 4))[0].sum().backward(); print(LIBRARY.available)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "False"
    assert ("Install a C compiler" in run.stderr) == ("CC" in setting)


@compiled
def test_the_library_is_kept_in_the_cache_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.LIBRARY.unload()
    try:
        assert native.LIBRARY.available
    finally:
        monkeypatch.undo()
        native.LIBRARY.unload()
    (kept,) = (tmp_path / "lightning_revflip").iterdir()
    assert kept.suffix == ".so"


@pytest.mark.parametrize("home", [{"HOME": "/dev/null"}, {"XDG_CACHE_HOME": "/dev/null/nowhere"}])
def test_layers_run_where_no_cache_can_be_written(home, monkeypatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    native.LIBRARY.unload()
    try:
        with pytest.warns(UserWarning, match="run by torch calls alone"):
            RevGRU(4, 6)(torch.randn(5, 2, 4))[0].sum().backward()
    finally:
        native.LIBRARY.unload()
