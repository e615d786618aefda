"""Several processes that each evaluate a share of the members compute what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.ddp_evolution import main

ROOT = Path(__file__).parents[2]


def run(folder: Path, processes: int) -> None:
    command = [sys.executable, "-m", "tests.helpers.ddp_evolution", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank), str(processes)], cwd=ROOT, env=environment)
        for rank in range(processes)
    ]
    try:
        assert [process.wait(timeout=120) for process in running] == [0] * processes
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    main(folder, rank=0, processes=1)
    run(folder, processes=2)
    return folder


def test_two_processes_train_as_one(folder):
    one, two = (torch.load(folder / f"{processes}.pt") for processes in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-6)


def test_processes_with_different_seeds_are_refused(folder):
    for rank in range(2):
        assert "processes have different members" in (folder / f"error{rank}").read_text()
