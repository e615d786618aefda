"""Processes that write one bank at once, are read meanwhile, and are killed."""

import multiprocessing
import sys

import pytest
import torch

from benchmarks import sgld_crash
from lightning_revflip.posterior.bank import SampleBank
from lightning_revflip.posterior.policies import POLICIES
from tests.helpers.banks import append, make_writer, rows, serials

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")


def write_chain(path, chain, count, policy, max_samples, started=None):
    with make_writer(path, chain=chain, policy=policy, max_samples=max_samples) as writer:
        for _ in range(count):
            append(writer, 1)
            if started is not None:
                started.set()


def start(*arguments):
    process = multiprocessing.get_context("fork").Process(target=write_chain, args=arguments)
    process.start()
    return process


def test_several_processes_write_one_bank(tmp_path):
    processes = [start(tmp_path, chain, 30 + chain, "latest", 20) for chain in range(4)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    bank = SampleBank(tmp_path)
    bank.verify()
    assert bank.chains == (0, 1, 2, 3)
    for chain in bank.chains:
        assert serials(bank, chain) == list(range(10 + chain, 30 + chain))
    assert torch.equal(bank.rows(range(60, 80)), rows(range(13, 33), chain=3))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_bank_is_read_while_it_is_written(tmp_path, policy):
    started = multiprocessing.get_context("fork").Event()
    process = start(tmp_path, 0, 300, policy, 10, started)
    started.wait(30)
    bank, seen = SampleBank(tmp_path), []
    while process.is_alive():
        bank.refresh()
        assert torch.equal(bank.rows(), rows(serials(bank)))
        seen.append(max(serials(bank), default=-1))
    process.join()
    assert process.exitcode == 0
    assert seen == sorted(seen)
    bank.refresh()
    assert torch.equal(bank.rows(), rows(serials(bank)))


def test_killed_processes_leave_a_sound_bank(tmp_path):
    trials = sgld_crash.run(5, tmp_path, seed=1, longest=0.1)
    assert all(trial.lost <= sgld_crash.SHARD_SAMPLES for trial in trials)
