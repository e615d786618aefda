"""APDModule in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_revflip.apd import encode_all
from lightning_revflip.flipout.noise import derive
from lightning_revflip.modules.codes import CodeBatches, split_by_time
from tests.helpers.distilled import codes_of, normal_rows, small_apd, write_bank

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The bank, and what each of two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    bank = write_bank(folder / "bank", normal_rows(100)[0])
    subprocess.run(
        [sys.executable, "-m", "tests.helpers.train_apd", str(folder)],
        check=True,
        capture_output=True,
        timeout=200,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return bank, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_replicas_stay_equal(run):
    _, (first, second) = run
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


def test_processes_agree_on_the_distances_of_validation(run):
    _, (first, second) = run
    for name in ("apd/sliced_wasserstein", "apd/mean_error", "apd/covariance_error"):
        assert first["metrics"][name] == second["metrics"][name]


def test_steps_are_those_of_one_process_with_the_joint_batch_and_the_joint_random_numbers(run):
    """Plain torch: two losses, each of one half of the batch, and the mean of their gradients."""
    bank, (first, _) = run
    codec, _ = codes_of(bank)
    module = small_apd(codec)
    networks = module.networks
    codes = encode_all(codec, bank)[split_by_time([100], 0.1)[0]]
    halves = [CodeBatches(codes, 80, 5, 0, rank, 2) for rank in range(2)]
    critic, generator = networks.optimizers(module.lr, module.betas)
    for step, batches in enumerate(zip(*halves, strict=True)):
        randoms = [torch.Generator().manual_seed(derive(0, step, rank)) for rank in range(2)]
        for parts in zip(*(batch.chunk(5) for batch in batches), strict=True):
            joined = Joined(critic)
            for part, random in zip(parts, randoms, strict=True):
                networks.improve_critic(part, joined, random)
        before = networks.average.state_dict()
        before = {name: value.clone() for name, value in before.items()}
        joined = Joined(generator)
        for random in randoms:
            networks.average.load_state_dict(before)
            networks.improve_generator(16, joined, random)
        networks.generator_steps -= 1  # both halves counted
    for name, value in networks.generator.state_dict().items():
        torch.testing.assert_close(first["state"][f"networks.generator.{name}"], value)
    for name, value in networks.critic.state_dict().items():
        torch.testing.assert_close(first["state"][f"networks.critic.{name}"], value)


class Joined:
    """An optimizer that makes one step, with the mean of two gradients, at the second call."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.optimizer.zero_grad()
        self.calls = 0

    def zero_grad(self):
        """The gradients of both add up."""

    def step(self):
        self.calls += 1
        if self.calls < 2:
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= 2
        self.optimizer.step()


def test_draws_of_processes_are_the_parts_of_one_batch():
    codes = torch.arange(40.0)[:, None]
    joint = list(CodeBatches(codes, 12, 3, seed=0))
    parts = [list(CodeBatches(codes, 4, 3, 0, rank, 3)) for rank in range(3)]
    for whole, *pieces in zip(joint, *parts, strict=True):
        assert torch.equal(torch.stack(pieces, 1).flatten(0, 1), whole)
