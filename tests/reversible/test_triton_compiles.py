"""The Triton kernels are compiled for a GPU, which needs none; nothing is interpreted here."""

import importlib
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

POINTERS = {
    **dict.fromkeys(("state", "gate", "buffer", "top", "flags"), "*i32"),
    **dict.fromkeys(("words", "packed"), "*i16"),
    **dict.fromkeys(("start", "packed_start", "gate_counts"), "*i64"),
}
"""Others are float32."""
NUMBERS = {
    **dict.fromkeys(("count", "half", "stride", "capacity", "lowest", "kept", "blocks"), "i32"),
    **dict.fromkeys(("scale", "offset", "slope"), "fp32"),
}
CONSTANTS: dict[str, Any] = {"BLOCK": 256, "STATES": 2, "STORE": True, "ONE": float(1 << 20)}
KERNELS = [
    *("triton.multiply", "triton.divide", "triton.pack"),
    *("triton_lstm.lstm_forward", "triton_lstm.lstm_reverse", "triton_lstm.lstm_vjp"),
    *("triton_gru.gru_reset", "triton_gru.gru_forward", "triton_gru.gru_reverse"),
    *("triton_gru.gru_vjp_candidate", "triton_gru.gru_vjp_gates"),
]


def module(name: str) -> Any:
    return importlib.import_module(f"lightning_revflip.reversible.kernels.{name}")


def ptx_and_cubin(name: str, **constants: Any) -> tuple[str, bytes]:
    """A kernel for an H100, by name, as `launch` has it compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = getattr(module(name.split(".", maxsplit=1)[0]), name.split(".")[1])
    types = {**dict.fromkeys(CONSTANTS, "constexpr"), **NUMBERS, **POINTERS}
    constants = {
        name: value
        for name, value in {**CONSTANTS, **constants}.items()
        if name in kernel.arg_names
    }
    signature = {argument: types.get(argument, "*fp32") for argument in kernel.arg_names}
    compiled = compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "enable_fp_fusion": False},
    )
    return compiled.asm["ptx"], compiled.asm["cubin"]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_and_round_as_they_are_written(name, monkeypatch, tmp_path) -> None:
    """No fused multiply-add or approximation, which could differ between two kernels."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx, cubin = ptx_and_cubin(name)
    assert ".target sm_90" in ptx
    assert len(cubin) > 1000
    assert not [inexact for inexact in ("fma.", "approx", "div.full", "f64") if inexact in ptx]


@pytest.mark.parametrize(
    "name", ["triton.multiply", "triton_lstm.lstm_forward", "triton_gru.gru_forward"]
)
def test_a_pass_that_is_never_reversed_pushes_nothing(name, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert "st.global.b16" in ptx_and_cubin(name)[0]
    assert "st.global.b16" not in ptx_and_cubin(name, STORE=False)[0]


def test_no_kernel_is_forgotten_here() -> None:
    found = {
        f"{name}.{kernel}"
        for name in ("triton", "triton_lstm", "triton_gru")
        for kernel, function in vars(module(name)).items()
        if "BLOCK" in getattr(function, "arg_names", ()) and kernel != "units_of_program"
    }
    assert found == set(KERNELS)


def test_triton_is_imported_only_where_it_is_used() -> None:
    code = (
        "import sys, torch; from lightning_revflip.reversible import RevLSTM; "
        "RevLSTM(4, 6)(torch.randn(5, 2, 4))[0].sum().backward(); "
        "print([name for name in sys.modules if name.startswith('triton')])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "[]"
