"""kill -9 of processes that write a sample bank, at random moments: what is lost?

Each trial starts a process that appends samples with known values as fast as it can, kills it after
a random time, and compares what the bank holds with what the policy should have kept of the samples
that reached the disk. The next trial continues the chain that the last one left.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import write
from lightning_revflip.posterior.bank import SampleBank
from lightning_revflip.posterior.layout import Layout
from lightning_revflip.posterior.policies import make_policy
from lightning_revflip.posterior.writer import ChainWriter

LAYOUT = Layout(("weight", "bias"), ((40, 50), (40,)))
SHARD_SAMPLES = 10
POLICIES: list[tuple[str, int | None]] = [
    ("reservoir", 30),
    ("spread", 40),
    ("latest", 30),
    ("spread", None),
]
KILLS_PER_CHAIN = 3


@dataclass
class Trial:
    """One kill, and what was found after it."""

    policy: str
    max_samples: int | None
    seconds: float
    offered: int
    """Samples that the process had offered to the chain when it was killed."""
    on_disk: int
    """Samples of which the manifest knows."""
    lost: int
    """Samples that were kept, but were not on the disk yet."""
    while_writing: bool
    """Whether a file was unfinished, or not named by the manifest yet or any more."""


def sample(serial: int) -> Tensor:
    """The values of a sample, which float16 holds exactly."""
    return (torch.arange(LAYOUT.numel) + serial).remainder(2048).float()


def kill_once(folder: Path, policy: str, max_samples: int | None, seconds: float) -> Trial:
    """Kill a writing process after some time and check the bank.

    Raises:
        AssertionError: if the bank is not what it should be.
    """
    context = multiprocessing.get_context("fork")  # torch is loaded once, not for every process
    offered, ready = context.Value("q", 0), context.Event()
    process = context.Process(
        target=_append_for_ever, args=(folder, policy, max_samples, offered, ready)
    )
    process.start()
    assert ready.wait(60), "the process did not start"
    time.sleep(seconds)
    process.kill()
    process.join()
    while_writing = _leftovers(folder)

    bank = SampleBank(folder)
    bank.verify()
    writer = _writer(folder, policy, max_samples)
    on_disk = writer.seen
    writer.close()
    expected = _kept(policy, max_samples, on_disk)
    assert bank.steps[0] == expected, "the bank holds other samples than the policy keeps"
    rows = bank.rows()
    assert all(
        torch.equal(row, sample(serial)) for row, serial in zip(rows, expected, strict=True)
    ), "the bank holds other values than were given"
    after = _kept(policy, max_samples, max(on_disk, offered.value))
    lost = sum(serial >= on_disk for serial in after)
    assert lost <= SHARD_SAMPLES, f"{lost} samples were lost"
    assert not _leftovers(folder), "the next writer left files that no manifest names"
    return Trial(policy, max_samples, seconds, offered.value, on_disk, lost, while_writing)


def _writer(folder: Path, policy: str, max_samples: int | None) -> ChainWriter:
    return ChainWriter(
        folder, LAYOUT, max_samples=max_samples, policy=policy, shard_samples=SHARD_SAMPLES
    )


def _append_for_ever(
    folder: Path, policy: str, max_samples: int | None, offered: Synchronized, ready: Any
) -> None:
    writer = _writer(folder, policy, max_samples)
    ready.set()
    while True:
        serial = writer.seen
        writer.append(serial, sample(serial))
        offered.value = writer.seen
        if serial % 37 == 0:
            writer.flush()


def _kept(policy: str, max_samples: int | None, offered: int) -> list[int]:
    """Serial numbers of the samples that an uninterrupted chain holds."""
    decider = make_policy(policy, max_samples, seed=0)
    kept: list[int] = []
    for serial in range(offered):
        decision = decider.decide(serial)
        decider.accept(serial)
        for leaving in decision.leaving:
            kept.remove(leaving)
        if decision.kept:
            kept.append(serial)
    return kept


def _leftovers(folder: Path) -> bool:
    chain = folder / "chain-0000"
    named = {entry["file"] for entry in json.loads((chain / "manifest.json").read_text())["shards"]}
    files = {path.name for path in chain.iterdir()} - {"manifest.json", "lock"}
    return files != named


def run(kills: int, folder: Path, seed: int = 0, longest: float = 0.3) -> list[Trial]:
    """Trials with all policies; every chain is continued a few times after a kill."""
    rng = random.Random(seed)
    trials = []
    for number in range(kills):
        chain = number // KILLS_PER_CHAIN
        policy, max_samples = POLICIES[chain % len(POLICIES)]
        seconds = rng.uniform(0, longest)
        trials.append(kill_once(folder / str(chain), policy, max_samples, seconds))
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trials = run(arguments.kills, Path(folder), arguments.seed)
    path = write(
        "sgld_crash",
        [asdict(trial) for trial in trials],
        kills=len(trials),
        killed_while_writing=sum(trial.while_writing for trial in trials),
        most_lost=max(trial.lost for trial in trials),
        shard_samples=SHARD_SAMPLES,
    )
    print(path.read_text().split('"rows"')[0])


if __name__ == "__main__":
    main()
