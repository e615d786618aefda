"""SGLDSampler in several processes: one chain with DDP, a chain each with independent chains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback

from lightning_revflip.posterior import SampleBank
from lightning_revflip.strategies import chain_seed
from tests.helpers.models import quiet_trainer
from tests.helpers.sampled_models import LR, blobs, fit, loader, of_chain, sampler, weights
from tests.helpers.train_sampler import SEED, independent_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:All chains start from the same weights"),
]

ROOT = Path(__file__).parents[2]


def run(what, folder):
    """What each of two processes found."""
    subprocess.run(
        [sys.executable, "-m", "tests.helpers.train_sampler", what, str(folder)],
        check=True,
        capture_output=True,
        timeout=200,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# --- DDP: one chain --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return folder, run("ddp", folder)


def test_replicas_stay_equal_and_the_first_one_writes(ddp):
    folder, (first, second) = ddp
    assert torch.equal(first["weights"], second["weights"])
    assert first["steps"] == second["steps"] == 12
    bank = SampleBank(folder / "bank")
    assert bank.steps == {0: [6, 8, 10, 12]}
    assert torch.equal(bank.rows([3])[0], first["weights"])


def test_replicas_agree_on_what_they_log(ddp):
    _, (first, second) = ddp
    names = {name for name in first["metrics"] if name.startswith("sgld/")} - {
        "sgld/samples",
        "sgld/temperature",
    }
    assert {"sgld/entropy", "sgld/ess_weights"} <= names
    for name in names:
        assert first["metrics"][name] == second["metrics"][name], name


def test_entropy_is_that_of_the_data_of_all_processes(ddp):
    folder, (first, _) = ddp
    x, _ = loader(12).dataset[:]
    mean = SampleBank(folder / "bank").predict(blobs(), x).double().mean(0)
    entropy = -(mean * mean.log()).sum(-1).mean().item()
    # Each process has 6 of the 12 points, so the mean over processes is that over the points.
    assert first["metrics"]["sgld/entropy"] == pytest.approx(entropy, rel=1e-4)


# --- independent chains ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def independent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("independent")
    return folder, run("independent", folder)


@pytest.mark.parametrize("chain", [0, 1])
def test_each_chain_is_the_run_on_one_device_with_its_seed(independent, tmp_path, chain):
    folder, found = independent
    single, trainer = independent_run(tmp_path, 4, seed=chain_seed(SEED, chain))
    assert torch.equal(found[chain]["weights"], weights(single))
    bank = SampleBank(folder / "whole" / "bank")
    assert bank.chains == (0, 1)
    assert torch.equal(of_chain(bank, chain), SampleBank(tmp_path / "bank").rows())
    # Each chain validates with its own samples; what is not synchronised stays its own.
    assert found[chain]["nll"] == pytest.approx(float(trainer.callback_metrics["val_nll"]))


def test_chains_differ(independent):
    folder, _ = independent
    bank = SampleBank(folder / "whole" / "bank")
    assert not (of_chain(bank, 0) == of_chain(bank, 1)).any()


def test_resumed_chains_are_the_uninterrupted_ones(independent):
    folder, _ = independent
    whole, resumed = (SampleBank(folder / name / "bank") for name in ("whole", "resumed"))
    assert resumed.steps == whole.steps
    assert torch.equal(resumed.rows(), whole.rows())


def test_all_chains_are_merged_when_the_run_is_over(independent, tmp_path):
    folder, found = independent
    bank_folder = folder / "whole"
    trainer = quiet_trainer(tmp_path, callbacks=[sampler(bank_folder)])
    (tested,) = trainer.test(blobs(), loader(12), verbose=False)
    for chain in (0, 1):
        for name in ("test_nll", "test_accuracy", "sgld/entropy"):
            assert found[chain]["tested"][name] == pytest.approx(tested[name], rel=1e-5)


# --- several chains in one process -----------------------------------------------------------


def test_parallel_chains_are_a_bank_of_the_ordinary_module(tmp_path):
    callback = sampler(tmp_path, network="net", chains=3)
    model, trainer = fit(tmp_path, callback, validate=True)
    bank = SampleBank(tmp_path / "bank")
    assert bank.chains == (0, 1, 2)
    assert bank.steps == {chain: [6, 8, 10, 12] for chain in range(3)}
    assert bank.layout.names == tuple(name for name, _ in blobs().named_parameters())
    for chain in range(3):
        last = weights(model.net.network(chain))
        assert torch.equal(of_chain(bank, chain)[-1], last)

    x, y = loader(12).dataset[:]
    mean = bank.predict(blobs(), x).mean(0)
    expected = F.nll_loss(mean.log(), y).item()
    assert float(trainer.callback_metrics["val_nll"]) == pytest.approx(expected, rel=1e-5)


class Copies(Callback):
    """The networks of all chains when training begins."""

    def on_train_start(self, trainer, pl_module):
        chains = pl_module.net.num_chains
        self.networks = [pl_module.net.network(chain) for chain in range(chains)]


def test_each_parallel_chain_is_a_run_on_its_part_of_the_data(tmp_path):
    """Without noise the weights of chain k are those of training on part k of each batch."""
    copies = Copies()
    fit(tmp_path, sampler(tmp_path, network="net", chains=2, temperature=0.0), copies)
    bank = SampleBank(tmp_path / "bank")
    x, y = loader().dataset[:]
    for chain, network in enumerate(copies.networks):
        optimizer = torch.optim.SGD(network.parameters(), LR / 2)  # as far as SGLD goes
        for _ in range(2):
            for own_x, own_y in zip(x.split(2)[chain::2], y.split(2)[chain::2], strict=True):
                optimizer.zero_grad()
                F.cross_entropy(network(own_x), own_y).backward()
                optimizer.step()
        torch.testing.assert_close(of_chain(bank, chain)[-1], weights(network))


def test_buffers_that_are_no_part_of_the_chains_are_shared(tmp_path):
    model = blobs()
    model.register_buffer("mean", torch.tensor([1.0, 2.0]))
    fit(tmp_path, sampler(tmp_path, network="net", chains=2), model=model)
    assert torch.equal(SampleBank(tmp_path / "bank").buffers()["mean"][5], model.mean)
