"""Each callback in two processes that train one model, or a chain each."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_revflip.callbacks import SGLDSampler
from lightning_revflip.strategies import chain_seed
from tests.helpers.compatibility import SEED, Run, evaluate, weights
from tests.helpers.compatibility_cells import CHAINS, DDP, Refused, cells
from tests.helpers.compatibility_models import Sequences
from tests.helpers.compatibility_processes import CLIP, PROCESSES, make

ROOT = Path(__file__).parents[2]
SAME = ("ReversibleRNN", "SGLDSampler", "MemoryMonitor")
"""Rows in which two processes are one with their joint batch; others draw numbers of their own."""


pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found, by cell."""
    folder = tmp_path_factory.mktemp("processes")
    subprocess.run(
        [sys.executable, "-m", "tests.helpers.compatibility_processes", str(folder)],
        check=True,
        timeout=500,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def of_each(found, cell) -> list[dict] | None:
    """What the processes found in a cell; None where all refused before the first batch."""
    each = [process[cell] for process in found]
    assert not any("failed" in one for one in each), each
    if not isinstance(cell.exception, Refused):
        assert not any("error" in one for one in each), each
        return each
    for one in each:
        assert re.search(cell.exception.message, one["error"])
        assert one["batches"] == 0
    return None


@pytest.mark.parametrize("cell", cells(DDP))
def test_processes_train_one_model(found, cell, tmp_path):
    each = of_each(found, cell)
    if each is None:
        return
    first, second = each
    assert torch.equal(first["weights"], second["weights"])
    if cell.value == "accumulate and clip":
        for one in each:
            norm = one["gradients"][0].norm()
            torch.testing.assert_close(
                norm, torch.tensor(CLIP["gradient_clip_val"]), rtol=1e-3, atol=0
            )
    if cell.value == "resume":
        for one in each:
            assert all(map(torch.equal, one["whole"], one["resumed"]))
    if cell.value == "evaluate":
        assert first["metrics"] == second["metrics"]
        alone = evaluate(make(cell, tmp_path, 1), "validate", first["checkpoint"])
        name = cell.subject.monitor
        assert first["metrics"][name] == pytest.approx(alone[name], rel=1e-4)
    elif cell.name in SAME and cell.value != "resume":
        alone = make(cell, tmp_path, 1).fit()
        close = {"rtol": 2e-2, "atol": 2e-3} if cell.value == "bf16-mixed" else {}
        torch.testing.assert_close(first["weights"], weights(alone.model), **close)


@pytest.mark.parametrize("cell", cells(CHAINS))
def test_each_process_trains_as_one_device_does(found, cell, tmp_path):
    each = of_each(found, cell)
    if each is None:
        return
    for chain, one in enumerate(each):
        if cell.value == "resume":
            assert all(map(torch.equal, one["whole"], one["resumed"]))
        elif chain == 0 or type(cell.subject.model(tmp_path)) is Sequences:
            folder = tmp_path / str(chain)
            alone: Run = make(cell, folder, 1, seed=chain_seed(SEED, chain))
            for callback in alone.callbacks:
                if isinstance(callback, SGLDSampler):
                    callback.seed = chain_seed(callback.seed, chain)
            alone.fit()
            assert torch.equal(one["weights"], weights(alone.model))
