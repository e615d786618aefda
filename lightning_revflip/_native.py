"""C sources that are compiled with the system's compiler on first use, and called by ctypes.

A library is kept in `$XDG_CACHE_HOME/lightning_revflip` (by default below `~/.cache`), under a name
that holds source, shared headers, flags, compiler and processor. Only a library that no other user
can have put there is loaded. Where there is no compiler, or with `REVFLIP_NATIVE=0`, callers fall
back on torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
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
_WRITABLE_BY_OTHERS = 0 if os.name == "nt" else stat.S_IWGRP | stat.S_IWOTH
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
                "Set REVFLIP_NATIVE=0 to accept this.",
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
            raise OSError(
                f"no C compiler found ({compiler[0]}). Install a C compiler, or name one in the "
                "variable CC"
            )
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, check=True, timeout=60
        ).stdout
        flags = " ".join(self._flags).encode()
        sources = [self._source, *sorted(_HEADERS.glob("*.h"))]
        parts = (*(each.read_bytes() for each in sources), flags, version, _processor().encode())
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
        folder = _private_folder()
        target = folder / f"{self._source.stem}-{key}.so"
        if not _is_usable(target):
            # Processes that start together each compile their own copy; the last rename wins.
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                output = Path(scratch) / target.name
                command = [*compiler, *self._flags, f"-I{_HEADERS}"]
                command += ["-o", str(output), str(self._source), "-lm"]
                subprocess.run(command, capture_output=True, check=True, timeout=120)
                output.chmod(0o700)
                output.replace(target)
        return target


def _private_folder() -> Path:
    """The folder of the libraries, in which no other user can put or replace one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "lightning_revflip"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if not _is_trusted(status.st_uid):
        raise OSError(
            f"{folder} belongs to another user, who could replace the code in it. Name a folder of "
            "your own in the variable XDG_CACHE_HOME"
        )
    if status.st_mode & _WRITABLE_BY_OTHERS:
        folder.chmod(stat.S_IMODE(status.st_mode) & ~_WRITABLE_BY_OTHERS)
    return folder


def _is_usable(library: Path) -> bool:
    """Whether there is such a file, and no other user can have written it."""
    try:
        status = library.lstat()  # a link may lead anywhere, and is replaced
    except FileNotFoundError:
        return False
    private = not status.st_mode & _WRITABLE_BY_OTHERS
    return stat.S_ISREG(status.st_mode) and private and _is_trusted(status.st_uid)


def _is_trusted(owner: int) -> bool:
    """Whether a file's owner is this process's user, or root, who can do anything anyway."""
    return owner == 0 or owner == os.geteuid()


def _processor() -> str:
    """What `-march=native` depends on, as far as it can be told: a cache may be shared."""
    fields = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    told = sorted({line for line in lines if line.startswith(fields)} or set(lines))
    return platform.machine() + "".join(told)
