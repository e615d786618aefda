"""C sources that are compiled with the system's compiler on first use, and called by ctypes.

A library is kept in `$XDG_CACHE_HOME/lightning_revflip` (by default below `~/.cache`), under a name
that holds source, shared headers, flags, compiler and processor. Where there is no compiler, or
with `REVFLIP_NATIVE=0`, callers fall back on torch.
"""

from __future__ import annotations

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

ARRAY, SIZE = ctypes.c_void_p, ctypes.c_int64
FLOAT, DOUBLE = ctypes.c_float, ctypes.c_double

_HEADERS = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


class NativeLibrary:
    """The functions of a C file.

    Args:
        source: the file.
        signatures: types of the arguments of each function.
        results: type of the result of each function that has one.
        flags: for the compiler, beyond the usual ones.
        without: what is slower without the library, for the warning.
    """

    def __init__(
        self,
        source: Path,
        signatures: Mapping[str, Sequence[Any]],
        results: Mapping[str, Any],
        flags: Sequence[str],
        without: str,
    ) -> None:
        self._source = source
        self._signatures = signatures
        self._results = results
        self._flags = (*_FLAGS, *flags)
        self._without = without

    @property
    def available(self) -> bool:
        """Whether the functions can be called; compiles them if need be."""
        return self._loaded is not None

    def unload(self) -> None:
        """Forget whether there is a library; the next use looks again."""
        self.__dict__.pop("_loaded", None)

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function; tensors are passed by the address of their first element."""
        function = getattr(self._loaded, name)
        return function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])

    @functools.cached_property
    def _loaded(self) -> ctypes.CDLL | None:
        if os.environ.get("REVFLIP_NATIVE") == "0":
            return None
        try:
            library = ctypes.CDLL(str(self._compile()))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            warnings.warn(
                f"{self._without} run by torch calls alone, which is slower on a CPU: {error}. "
                "Install a C compiler, or set REVFLIP_NATIVE=0 to accept this.",
                stacklevel=2,
            )
            return None
        for name, arguments in self._signatures.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = self._results.get(name)
        return library

    def _compile(self) -> Path:
        """Path of the library, which is compiled if it is not there yet."""
        compiler = shlex.split(os.environ.get("CC") or "cc")
        if shutil.which(compiler[0]) is None:
            raise OSError(f"no C compiler found ({compiler[0]}; the variable CC names another)")
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, check=True, timeout=60
        ).stdout
        flags = " ".join(self._flags).encode()
        sources = [self._source, *sorted(_HEADERS.glob("*.h"))]
        parts = (*(each.read_bytes() for each in sources), flags, version, _processor().encode())
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = cache / "lightning_revflip"
        target = folder / f"{self._source.stem}-{key}.so"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # Processes that start together each compile their own copy; the last rename wins.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                output = Path(scratch) / target.name
                command = [*compiler, *self._flags, f"-I{_HEADERS}"]
                command += ["-o", str(output), str(self._source), "-lm"]
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
