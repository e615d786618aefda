"""How every benchmark measures: side by side, in one process, with machine and versions noted."""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lightning_revflip.reversible.allocator import allocated_bytes

RESULTS = Path(__file__).parent / "results"


def seconds(
    runs: Mapping[str, Callable[[], object]], budget: float, least: int = 3, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Times of the runs, taken in turns so that a disturbance meets all of them.

    Args:
        runs: what to time, by name.
        budget: seconds to spend on all runs together.
        least: rounds at least.
        warm_up: whether to run each once before; not needed after a run of the same size.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values() if warm_up else ():
        run()
    start = time.perf_counter()
    rounds = 0
    while rounds < least or time.perf_counter() - start < budget:
        for name, run in runs.items():
            _synchronize()
            begin = time.perf_counter()
            run()
            _synchronize()
            times[name].append(time.perf_counter() - begin)
        rounds += 1
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Best and median of some times, in seconds; ratios are formed from the medians."""
    return {"best": min(times), "median": statistics.median(times), "rounds": len(times)}


def bytes_allocated(run: Callable[[], object], device: str | None = None) -> tuple[int, int]:
    """Bytes that `run` leaves allocated while its result is alive, and the peak on the way.

    Args:
        run: what to measure.
        device: the type of the device whose allocator counts; by default CUDA's if there is one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return allocated_bytes(run, device)


def environment(device: str | None = None) -> dict[str, Any]:
    """Machine, versions and command, for the head of a results file.

    Args:
        device: the type of the device measured on; by default CUDA if there is one.
    """
    cuda = torch.cuda.is_available() if device is None else device == "cuda"
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": " ".join(["python", "-m", _module(), *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def write(name: str, rows: list[dict[str, Any]], device: str | None = None, **more: Any) -> Path:
    """Write `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(
        json.dumps(
            {"environment": environment(device), **more, "rows": rows}, indent=1, allow_nan=False
        )
        + "\n"
    )
    return path


@dataclass
class Part:
    """What a part of a benchmark has measured."""

    rows: list[dict[str, Any]]
    table: Table
    settings: dict[str, Any] = field(default_factory=dict)
    """Written beside the rows."""


def run_parts(name: str, parts: Mapping[str, Callable[[bool], Part]], help: str | None) -> None:
    """The command line of a benchmark in parts: measure those that are named, on one thread.

    Each is shown and, unless a glance was asked for, written to `results/<name>_<part>.json`.

    Args:
        name: of the benchmark.
        parts: what measures each part; it is told whether a glance is enough.
        help: what `--help` says.
    """
    parser = argparse.ArgumentParser(description=help)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; or all")
    parser.add_argument("--quick", action="store_true", help="a glance, no results file")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in parts]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; choose from {', '.join(parts)}")
    torch.set_num_threads(1)
    console = Console()
    for part in options.parts or parts:
        measured = parts[part](options.quick)
        console.print(measured.table)
        if not options.quick:
            path = write(f"{name}_{part}", measured.rows, **measured.settings)
            console.print(f"written to {path}")


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
