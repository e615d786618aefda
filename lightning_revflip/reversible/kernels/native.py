"""Compiles `native.c` with the system's C compiler on first use, and calls it by ctypes.

The library is kept in `$XDG_CACHE_HOME/lightning_revflip` (by default below `~/.cache`), under a
name that holds source, flags, compiler and processor. Where there is no compiler, `library`
returns None and the torch path of `cells.py` runs.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from torch import Tensor

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # the same bits from every compiler
    "-shared",
    "-fPIC",
)

_array, _size = ctypes.c_void_p, ctypes.c_int64
_float, _double = ctypes.c_float, ctypes.c_double
_SIGNATURES: dict[str, list[type]] = {
    "sigmoids": [_size, _array, _array],
    "multiply": [_size, _size, _array, _array, _array, _array],
    "divide": [_size, _size, _array, _array, _array, _array, _size],
    "to_float": [_size, _size, _array, _size, _size, _double, _array],
    "lstm_gates": [_size, _size, _array, _array, _size, _float, _float, _array],
    "lstm_add": [_size, _size, _array, _array, _double],
    "lstm_subtract": [_size, _size, _array, _array, _double, _array],
    "lstm_vjp": [_size, _size, *[_array] * 7, _float, _array, _size, _array, _array],
    "gru_reset": [_size, _size, _array, _array, _size, _array, _float, _float, _array, _array],
    "gru_candidate": [_size, _size, _array, _array, _size],
    "gru_add": [_size, _array, _array, _array, _double],
    "gru_vjp_candidate": [_size, _size, *[_array] * 5, _size],
    "gru_vjp_gates": [_size, _size, *[_array] * 7, _float, _array, _size, _array, _array],
}
_RETURNS_COUNT = ("multiply", "divide")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None if `REVFLIP_NATIVE=0` or they cannot be compiled here."""
    if os.environ.get("REVFLIP_NATIVE") == "0":
        return None
    try:
        compiled = ctypes.CDLL(str(_compile()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"Reversible layers run by torch calls alone, which is slower on a CPU: {error}. "
            "Install a C compiler, or set REVFLIP_NATIVE=0 to accept this.",
            stacklevel=2,
        )
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(compiled, name)
        function.argtypes = arguments
        function.restype = ctypes.c_int64 if name in _RETURNS_COUNT else None
    return compiled


def call(name: str, *arguments: Tensor | float) -> int:
    """Call a function of the library; tensors are passed by the address of their first element."""
    function = getattr(library(), name)
    return function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])  # type: ignore[no-any-return]


def sigmoid(x: Tensor) -> Tensor:
    """The sigmoid of the compiled cells, for dense float32 of any shape; others derive from it."""
    out = x.new_empty(x.shape)
    call("sigmoids", x.numel(), x, out)
    return out


def _compile() -> Path:
    """Path of the library, which is compiled if it is not there yet."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(compiler[0]) is None:
        raise OSError(f"no C compiler found ({compiler[0]}; the variable CC names another)")
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60)
    parts = (_SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version.stdout, _processor().encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_revflip"
    target = folder / f"native-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Processes that start together each compile their own copy; the last rename wins.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / target.name
            command = [*compiler, *_FLAGS, "-o", str(output), str(_SOURCE), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
            output.replace(target)
    return target


def _processor() -> str:
    """What `-march=native` depends on, as far as it can be told: a cache may be shared."""
    fields = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    told = sorted({line for line in lines if line.startswith(fields)} or set(lines))
    return platform.machine() + "".join(told)
