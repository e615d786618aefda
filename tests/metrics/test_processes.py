"""Several processes that each see a part of the data compute what one does of all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.ddp_metrics import PROCESSES, compute, compute_alone

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What each process computed."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "tests.helpers.ddp_metrics", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, str(rank)], cwd=ROOT, env=environment)
        for rank in range(PROCESSES)
    ]
    try:
        assert [process.wait(timeout=120) for process in running] == [0] * PROCESSES
    finally:
        for process in running:
            process.kill()
    return folder


@pytest.mark.parametrize("rank", range(PROCESSES))
def test_each_process_computes_what_one_does_of_all_examples(folder, rank):
    torch.testing.assert_close(torch.load(folder / f"{rank}.pt"), compute(slice(None)))


@pytest.mark.parametrize("rank", range(PROCESSES))
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_process_may_have_seen_no_examples(folder, rank):
    torch.testing.assert_close(torch.load(folder / f"alone{rank}.pt"), compute_alone(0))


@pytest.mark.parametrize("package", ["lightning_revflip.metrics", "lightning_revflip.posterior"])
def test_import_needs_no_lightning(package):
    code = (
        f"import sys, {package}; sys.exit(any(m.split('.')[0] == 'lightning' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
