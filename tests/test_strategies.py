"""IndependentChainsStrategy: each process is a run of its own, that can be resumed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from torch import nn

from lightning_revflip.strategies import (
    IndependentChainsStrategy,
    chain_path,
    chain_seed,
    check_resettable,
    reset_parameters,
)
from tests.helpers.models import quiet_trainer
from tests.helpers.random_models import POINTS, NoisyRegressor, flat_weights, loader
from tests.helpers.train_chains import CHAINS, SEED, classify, found_by, regress

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
]

ROOT = Path(__file__).parents[1]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.helpers.train_chains", *map(str, arguments)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chains")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        command(folder), check=True, capture_output=True, timeout=240, cwd=ROOT, env=environment
    )
    return folder


@pytest.fixture(scope="module")
def chains(folder):
    """What each of the processes found."""
    return [torch.load(folder / f"chain{chain}.pt") for chain in range(CHAINS)]


def singles(train, folder) -> list[dict]:
    """The runs on one device that chains must equal."""
    seeds = [chain_seed(SEED, chain) for chain in range(CHAINS)]
    runs = [train(folder / str(seed), seed=seed) for seed in seeds]
    return [found_by(*run) for run in runs]


@pytest.mark.parametrize(("name", "train"), [("whole", regress), ("digits", classify)])
def test_each_chain_is_the_run_on_one_device_with_its_seed(chains, tmp_path, name, train):
    for chain, single in zip(chains, singles(train, tmp_path), strict=True):
        assert torch.equal(chain[name]["weights"], single["weights"])
        assert chain[name]["read"] == single["read"]
    assert not torch.equal(chains[0][name]["weights"], chains[1][name]["weights"])


def test_every_chain_reads_all_data_in_every_epoch_in_its_own_order(chains):
    for chain in chains:
        epochs = torch.tensor(chain["whole"]["read"]).view(4, POINTS)
        assert (epochs.sort(dim=1).values == torch.arange(POINTS)).all()
    orders = torch.tensor([chain["whole"]["read"] for chain in chains]).view(-1, POINTS)
    assert len(orders.unique(dim=0)) == 4 * CHAINS


def test_a_resumed_run_goes_on_with_all_chains_bit_for_bit(chains):
    for chain in chains:
        assert torch.equal(chain["resumed"]["weights"], chain["whole"]["weights"])


def test_synchronised_values_are_means_over_chains_and_others_are_their_own(chains, tmp_path):
    def values(runs, name, metric):
        return [run[name]["metrics"][metric] if name else run["metrics"][metric] for run in runs]

    own = values(singles(regress, tmp_path / "regress"), None, "own_loss")
    assert values(chains, "whole", "own_loss") == own
    assert values(chains, "whole", "val_loss") == pytest.approx([sum(own) / 2] * 2)
    own = values(singles(classify, tmp_path / "classify"), None, "val/accuracy")
    assert own[0] != own[1]
    assert values(chains, "digits", "val/accuracy") == pytest.approx([sum(own) / 2] * 2)


def test_testing_keeps_the_weights_of_each_chain(chains):
    for chain in chains:
        assert torch.equal(chain["tested"]["weights"], chain["whole"]["weights"])


def test_each_chain_loads_its_own_best_weights(chains, folder):
    path = next((folder / "whole").glob("epoch=*"))
    losses = []
    for number, chain in enumerate(chains):
        state = torch.load(chain_path(path, number))["state_dict"]
        model = NoisyRegressor()
        model.load_state_dict(state)
        assert torch.equal(chain["best"]["weights"], flat_weights(model))
        losses.append(model.eval().loss(loader().dataset[:][0]).item())
    assert chains[0]["best"]["test_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_all_chains_have_the_same_files(folder):
    names = {path.name for path in (folder / "whole").glob("*.ckpt")}
    assert names == {path.name for path in (folder / "whole" / "chain-0001").glob("*")}
    assert len(names) == 2  # the best, named by the value of chain 0, and that of the end


def test_the_first_file_is_an_ordinary_checkpoint(folder, chains):
    loaded = NoisyRegressor.load_from_checkpoint(folder / "whole" / "end.ckpt")
    assert torch.equal(flat_weights(loaded), chains[0]["whole"]["weights"])


def test_a_checkpoint_with_a_fault_is_refused_in_all_processes(chains, folder):
    missing = str(folder / "half" / "chain-0001" / "end.ckpt")
    for chain in chains:
        assert f"but these are missing: {missing}. Use as many devices" in chain["missing"]
        assert "are at different steps: [24, 6]" in chain["at_other_step"]


def test_chains_with_equal_initial_weights_are_warned_of(chains):
    equal, different = ([c[f"different_init={flag}"] for c in chains] for flag in (False, True))
    assert torch.equal(equal[0]["weights"], equal[1]["weights"])
    assert not (different[0]["weights"] == different[1]["weights"]).any()
    assert equal[0]["warned"]
    assert not different[0]["warned"]
    assert torch.equal(equal[0]["weights"], different[0]["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(CHAINS))
def test_all_processes_end_when_one_fails(tmp_path, rank):
    with (tmp_path / "output").open("w") as output:
        ended = subprocess.run(
            command(tmp_path, rank),
            check=False,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=120,  # of a process that waits for the other for ever
            cwd=ROOT,
        )
    assert ended.returncode != 0
    assert "this chain has failed" in (tmp_path / "output").read_text()


# --- on one process --------------------------------------------------------------------------


def one_chain(tmp_path, **settings):
    return quiet_trainer(tmp_path, strategy="independent_chains", devices=1, **settings)


@pytest.fixture
def _leaves_no_trace():
    """Ends the process group and restores the variables that tell processes their rank."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_leaves_no_trace")
def test_more_chains_than_devices_are_warned_of(folder, tmp_path):
    trainer = one_chain(tmp_path, max_epochs=4)
    with pytest.warns(UserWarning, match="has more chains than there are devices now, 1"):
        trainer.fit(NoisyRegressor(), loader(), ckpt_path=folder / "whole" / "end.ckpt")


@pytest.mark.usefixtures("_leaves_no_trace")
def test_a_linked_checkpoint_is_followed(folder, tmp_path):
    (tmp_path / "link.ckpt").symlink_to(folder / "whole" / "end.ckpt")
    trainer = one_chain(tmp_path, max_epochs=4)
    with pytest.warns(UserWarning, match="whole/end.ckpt has more chains"):
        trainer.fit(NoisyRegressor(), loader(), ckpt_path=tmp_path / "link.ckpt")


@pytest.mark.usefixtures("_leaves_no_trace")
def test_sync_batchnorm_is_refused(tmp_path):
    trainer = one_chain(tmp_path, sync_batchnorm=True)
    with pytest.raises(ValueError, match="share the statistics of batches"):
        trainer.fit(NoisyRegressor(), loader())


def test_options_of_gradients_are_refused():
    with pytest.raises(TypeError, match="got find_unused_parameters, ddp_comm_hook, but it"):
        IndependentChainsStrategy(find_unused_parameters=True, ddp_comm_hook=print)


def test_seeds_of_chains_differ_and_are_accepted_by_lightning():
    seeds = [chain_seed(SEED, chain) for chain in range(100)]
    assert seeds[0] == SEED
    assert len(set(seeds)) == 100
    assert all(seed_everything(seed, verbose=False) == seed for seed in seeds[:3])


# --- initial weights -------------------------------------------------------------------------


class Network(LightningModule):
    """Layers that torch.nn initialises, one of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.again = self.body[0]


def test_weights_are_drawn_anew_as_when_they_were_made():
    torch.manual_seed(0)
    expected = Network()
    model = Network()
    frozen = model.frozen.weight.clone()
    torch.manual_seed(0)
    nn.Linear(3, 3)  # the frozen one, which is not drawn
    reset_parameters(model)
    assert torch.equal(model.frozen.weight, frozen)
    for name, value in expected.named_parameters():
        if not name.startswith("frozen"):
            assert torch.equal(model.get_parameter(name), value), name


def test_weights_that_cannot_be_drawn_anew_are_named():
    model = Network()
    check_resettable(model)
    model.scale = nn.Parameter(torch.ones(()))
    model.body[0].bias.requires_grad_(False)
    message = r"or are frozen in part: the LightningModule \(Network\), body.0 \(Linear\)\. Make"
    with pytest.raises(ValueError, match=message):
        check_resettable(model)


def test_the_own_method_of_a_module_comes_first():
    class Own(Network):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def reset_parameters(self) -> None:
            self.scale.data.fill_(2)

    model = Own()
    before = model.body[0].weight.clone()
    check_resettable(model)
    reset_parameters(model)
    assert model.scale == 2
    assert torch.equal(model.body[0].weight, before)
