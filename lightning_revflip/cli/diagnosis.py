"""What `revflip doctor` looks at: packages, this machine, W&B, data. Nothing is fetched."""

from __future__ import annotations

import importlib
import netrc
import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import urlparse

if TYPE_CHECKING:
    import torch

Status = Literal["ok", "note", "problem"]
DISTRIBUTION = "lightning-revflip"


class Finding(NamedTuple):
    """A line of the report."""

    status: Status
    """`note`: works, but less well than it could, or is not there and not needed."""
    subject: str
    found: str
    """What there is, and what to do about it."""


# --- packages --------------------------------------------------------------------------------


def check_packages() -> Iterator[Finding]:
    """Versions of what the package requires, and what is missing for the recipes."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        about = metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        yield Finding(
            "note", DISTRIBUTION, "not installed, so what it requires is not known: pip install ."
        )
        return
    yield Finding("ok", DISTRIBUTION, about["Version"])
    python, needed = platform.python_version(), about["Requires-Python"]
    fits = SpecifierSet(needed).contains(python, prereleases=True)
    text = python if fits else f"{python}, but {needed} is required"
    yield Finding("ok" if fits else "problem", "python", text)

    of_recipes = []
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            yield check_requirement(requirement.name, str(requirement.specifier))
        elif marker.evaluate({"extra": "recipes"}):
            finding = check_requirement(requirement.name, str(requirement.specifier))
            of_recipes += [requirement.name] if finding.status != "ok" else []
    if of_recipes:
        yield Finding(
            "note",
            "extra recipes",
            f"without {', '.join(of_recipes)}: pip install '{DISTRIBUTION}[recipes]'",
        )
    else:
        yield Finding("ok", "extra recipes", "complete")


def check_requirement(name: str, needed: str) -> Finding:
    """Whether a package is there in a version that fits.

    Args:
        name: of the distribution.
        needed: versions that fit, such as `>=2.4`.
    """
    from packaging.specifiers import SpecifierSet

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if name == "wandb":
            return Finding(
                "note", name, "not installed: recipes log to W&B unless csv.yaml is given"
            )
        return Finding("problem", name, f"not installed: pip install '{name}{needed}'")
    if not SpecifierSet(needed).contains(version, prereleases=True):
        advice = f"{version}, but {needed} is required: pip install '{name}{needed}'"
        return Finding("problem", name, advice)
    return Finding("ok", name, version)


# --- this machine ----------------------------------------------------------------------------


def check_machine() -> Iterator[Finding]:
    """Devices, threads, and which compiled code can be used."""
    import torch

    yield from _devices()
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = torch.get_num_threads()
    text = f"torch uses {threads} on {usable} CPUs"
    if threads > usable:
        yield Finding("note", "threads", f"{text}: they wait for each other, set OMP_NUM_THREADS")
    else:
        yield Finding("ok", "threads", text)
    yield _compiler()
    yield from check_native()
    yield check_triton()


def default_device() -> torch.device:
    """The first GPU that reversible layers have kernels for, or else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _devices() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        name = torch.cuda.get_device_name(index)
        yield Finding("ok", f"cuda:{index}", f"{name}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        yield Finding("ok", "device", f"cpu, {platform.machine()}; no CUDA device")


def _compiler() -> Finding:
    command = shlex.split(os.environ.get("CC") or "") or ["cc"]
    if shutil.which(command[0]) is None:
        advice = f"no {command[0]}: install one, or name one in CC, for faster steps on a CPU"
        return Finding("note", "C compiler", advice)
    try:
        run = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("note", "C compiler", f"{command[0]} does not work: {error}")
    return Finding("ok", "C compiler", run.stdout.partition("\n")[0])


def check_native() -> Iterator[Finding]:
    """Whether the C code of each core compiles and loads."""
    from lightning_revflip.flipout import noise
    from lightning_revflip.reversible.kernels import native as cells
    from lightning_revflip.sgld import native as steps

    for core, module in (("reversible", cells), ("flipout", noise), ("sgld", steps)):
        subject, library = f"native {core}", module.LIBRARY
        library.unload()  # so that a failure is told again
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            available = library.available
        if available:
            yield Finding("ok", subject, "compiled, in use on a CPU")
        elif caught:
            yield Finding("note", subject, str(caught[-1].message))
        else:
            yield Finding("note", subject, "off by REVFLIP_NATIVE=0: torch calls alone, slower")


def check_triton() -> Finding:
    """Whether reversible layers use Triton on the GPU, if there is one."""
    from lightning_revflip.reversible.kernels import triton_runs_on

    device = default_device()
    if device.type != "cuda":
        return Finding("ok", "triton", "not used without a CUDA device")
    if find_spec("triton") is None:
        return Finding("note", "triton", "not installed, so reversible layers are slow on CUDA")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runs = triton_runs_on(device)
    version = metadata.version("triton")
    if runs:
        return Finding("ok", "triton", f"{version}, in use")
    reason = str(caught[-1].message) if caught else "off by REVFLIP_TRITON=0, or not for this GPU"
    return Finding("note", "triton", f"{version}: {reason}")


# --- Weights & Biases ------------------------------------------------------------------------


def check_wandb() -> Iterator[Finding]:
    """Whether W&B is there, which mode runs take, and whether someone is logged in."""
    if find_spec("wandb") is None:
        yield Finding("note", "wandb", "not installed, see above")
        return
    mode = os.environ.get("WANDB_MODE")
    told = f"{mode}, by WANDB_MODE" if mode else "as a logger says; the recipes say offline"
    yield Finding("ok", "mode", told)
    if os.environ.get("WANDB_API_KEY"):
        yield Finding("ok", "login", "by WANDB_API_KEY")
    elif _has_login():
        yield Finding("ok", "login", "in the netrc file")
    else:
        advice = "none found: offline runs need none; to upload them, wandb login, then wandb sync"
        yield Finding("note", "login", advice)


def _has_login() -> bool:
    """Whether the netrc file has an entry for the W&B server; what it says is not read further."""
    host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    files = [Path(os.environ.get("NETRC") or "~/.netrc"), Path("~/_netrc")]
    for file in files:
        try:
            if host in netrc.netrc(str(file.expanduser())).hosts:
                return True
        except (OSError, netrc.NetrcParseError, RuntimeError):  # no file, no home
            continue
    return False


# --- data ------------------------------------------------------------------------------------

NOT_FOUND = "not found: the recipe takes other data; its README says how to get this"


def check_data() -> Iterator[Finding]:
    """What the recipes would find, by their own functions."""
    from lightning_revflip.cli.recipes import make_importable

    root = os.environ.get("REVFLIP_DATA")
    if not root:
        yield Finding("note", "REVFLIP_DATA", "not set: only the caches are searched")
    elif not Path(root).expanduser().is_dir():
        yield Finding("problem", "REVFLIP_DATA", f"{root} is no folder: correct it, or unset it")
    else:
        yield Finding("ok", "REVFLIP_DATA", root)
    make_importable()
    looked_up: dict[str, Callable[[], str | None]] = {
        "Penn Treebank": lambda: _recipe("ptb.corpus").find_corpus("ptb", None, True).description,
        "Multi30k": lambda: _recipe("nmt.corpus").find_corpus("multi30k").description,
        "MNIST": lambda: _recipe("mnist.images").find_images("mnist").description,
        "notMNIST": lambda: _path(_recipe("mnist.outliers").notmnist_file()),
        "Omniglot": lambda: _path(_recipe("mnist.outliers").omniglot_path()),
    }
    for name, look_up in looked_up.items():
        try:
            found = look_up()
        except (ImportError, OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError) and "No file of" in str(error)
            yield (
                Finding("note", name, NOT_FOUND)
                if missing
                else Finding("problem", name, str(error))
            )
        else:
            yield Finding("ok", name, found) if found else Finding("note", name, NOT_FOUND)


def _recipe(module: str) -> ModuleType:
    return importlib.import_module(f"recipes.{module}")


def _path(found: Path | None) -> str | None:
    return None if found is None else str(found)
