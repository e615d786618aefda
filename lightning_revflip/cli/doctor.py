"""`revflip doctor`: a report on the installation, this machine and the data, and a self-test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_revflip.cli.diagnosis import (
    Finding,
    check_data,
    check_machine,
    check_packages,
    check_wandb,
    default_device,
)

_STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def print_diagnosis() -> bool:
    """Print what was found, section by section.

    Returns:
        Whether there is no problem.
    """
    console = Console(highlight=False)
    sections: dict[str, Callable[[], Iterable[Finding]]] = {
        "Packages": check_packages,
        "This machine": check_machine,
        "Weights & Biases": check_wandb,
        "Data": check_data,
        "Self-test": self_test,
    }
    problems = 0
    for title, check in sections.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=7)
        table.add_column(min_width=17)
        table.add_column(overflow="fold")
        for finding in _complete(check):
            status = Text(finding.status, _STYLES[finding.status])
            table.add_row(status, finding.subject, Text(finding.found))
            problems += finding.status == "problem"
        console.print(f"[bold]{title}[/bold]", table, "", sep="\n")
    count = "1 problem" if problems == 1 else f"{problems} problems"
    console.print(f"{count}, see above." if problems else "No problem was found.")
    return not problems


def self_test() -> Iterator[Finding]:
    """Compute with each method on the device in use; a few seconds."""
    import torch

    from lightning_revflip.cli.selftest import CHECKS

    device = default_device()
    for name, check in CHECKS.items():
        start = time.perf_counter()
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                found = check(device)
        except Exception as error:  # whatever breaks is what the test is there to find
            yield Finding("problem", name, f"on {device}: {_told(error)}")
        else:
            seconds = time.perf_counter() - start
            yield Finding("ok", name, f"on {device}: {found} ({seconds:.1f} s)")


def _complete(check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """All findings of a check; if it breaks, for want of a package for example, that is one."""
    try:
        yield from check()
    except Exception as error:
        yield Finding("problem", "this check", f"broke off: {_told(error)}")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
