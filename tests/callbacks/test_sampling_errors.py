"""SGLDSampler: what it refuses or warns of, and that nothing is lost then."""

import errno
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn

from lightning_revflip.callbacks import EvolutionStrategies, Flipout, SGLDSampler
from lightning_revflip.callbacks._sampler_settings import check_trainer
from lightning_revflip.flipout import DropConnect
from lightning_revflip.posterior import ChainWriter, Layout, SampleBank, chain
from lightning_revflip.sgld import SGHMC, SGLD, CyclicalSchedule
from tests.helpers.models import quiet_trainer
from tests.helpers.sampled_models import POINTS, Blobs, blobs, fit, loader, sampler, sgd
from tests.helpers.train_evolution import SETTINGS, WithLosses, evolution_module

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")

# --- settings --------------------------------------------------------------------------------


def test_num_data_is_required_and_the_message_says_what_it_is():
    with pytest.raises(ValueError, match=r"num_data is missing: .*len\(train_dataset\).*'auto'"):
        SGLDSampler("bank")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_data", 0, "num_data must be the number of training examples"),
        ("num_data", 2.5, "num_data must be the number of training examples"),
        ("temperature", -1.0, "temperature must be a number from 0, got -1.0"),
        ("burn_in", -1, "burn_in must be a whole number from 0, got -1"),
        ("every_n_steps", 0, "every_n_steps must be a whole number from 1, got 0"),
        ("every_n_steps", 2.0, "every_n_steps must be a whole number from 1, got 2.0"),
        ("max_samples", 0, "max_samples must be a whole number from 1, got 0"),
        ("chains", 0, "chains must be a whole number from 1, got 0"),
        ("eval_samples", -1, "eval_samples must be a whole number from 0, got -1"),
        ("sampler", "hmc", "sampler must be one of sgld, psgld, sghmc, got 'hmc'"),
        ("dtype", "int8", "dtype must be one of float32, float16, bfloat16, got 'int8'"),
        ("policy", "first", "policy must be one of spread, reservoir, latest, got 'first'"),
        ("chains", 2, "chains=2 needs to know which part.*network='network'"),
        ("sampler_options", {"lr": 1.0}, "sampler_options has lr, which SGLDSampler sets"),
    ],
)
def test_settings_out_of_range_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        SGLDSampler("bank", **{"num_data": 100} | {name: value})


def test_psgld_needs_steps_to_adapt():
    with pytest.raises(ValueError, match="adapts its steps during the burn-in, got burn_in=0"):
        SGLDSampler("bank", 100, burn_in=0, sampler="psgld")
    options = {"adaptation_steps": 5}
    SGLDSampler("bank", 100, burn_in=0, sampler="psgld", sampler_options=options)


# --- optimizers ------------------------------------------------------------------------------


class OwnSGD(torch.optim.SGD):
    """Might do anything."""


def own_sampler(kind=SGLD, **changes):
    settings = {"num_data": POINTS, "temperature": 1.0} | changes
    return lambda module: kind(module.parameters(), 0.1, **settings)


@pytest.mark.parametrize(
    ("configure", "changes", "message"),
    [
        (
            lambda m: torch.optim.Adam(m.parameters()),
            {},
            r"got Adam, whose .* Return torch.optim.SGD\(.*sampler='psgld'",
        ),
        (lambda m: OwnSGD(m.parameters(), 0.1), {}, "got OwnSGD"),
        (
            lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9),
            {},
            "got SGD with momentum=0.9.*sampler='sghmc' has a momentum",
        ),
        (
            lambda m: torch.optim.SGD(m.parameters(), 0.1, maximize=True),
            {},
            "SGD with maximize=True",
        ),
        (
            lambda m: [torch.optim.SGD(part.parameters(), 0.1) for part in (m.net[0], m.net[2])],
            {},
            "to have one optimizer, got 2",
        ),
        (lambda m: None, {}, "to have one optimizer, got 0"),
        (
            lambda m: torch.optim.SGD(m.parameters(), 0.1, weight_decay=0.5),
            {"prior_precision": 3.0},
            r"prior_precision=3.0 and weight_decay=0.5 are two priors.*num_data = 12, or set",
        ),
        (own_sampler(temperature=0.5), {}, "has temperature=1.0, and the SGLD that the module"),
        (own_sampler(num_data=10), {}, "has num_data=24, and the SGLD .* num_data=10"),
        (own_sampler(SGHMC), {"sampler": "psgld"}, "The module returns SGHMC .* PSGLD as well"),
        (own_sampler(SGHMC), {"sampler_options": {"friction": 1.0}}, "Leave out sampler and"),
    ],
    ids=[
        *("adam", "own_class", "momentum", "maximize", "two", "none", "two_priors"),
        *("other_temperature", "other_num_data", "other_sampler", "other_options"),
    ],
)
def test_what_would_not_sample_the_posterior_is_refused(tmp_path, configure, changes, message):
    model = blobs(configure)
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, sampler(tmp_path, **changes), model=model)
    assert "configure_optimizers" not in vars(model)
    assert not (tmp_path / "bank").exists()


def test_an_unknown_option_of_a_sampler_is_refused(tmp_path):
    callback = sampler(tmp_path, sampler="sghmc", sampler_options={"frction": 0.3})
    with pytest.raises(TypeError, match="SGHMC got an unexpected argument: frction"):
        fit(tmp_path, callback)


def test_two_schedules_are_refused(tmp_path):
    schedule = functools.partial(CyclicalSchedule, cycle_steps=5)

    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    with pytest.raises(MisconfigurationException, match="has a schedule, and configure_optimizers"):
        fit(tmp_path, sampler(tmp_path, schedule=schedule), model=blobs(configure))


def test_a_schedule_that_nobody_would_step_is_refused(tmp_path):
    model = blobs()
    model.automatic_optimization = False
    schedule = functools.partial(CyclicalSchedule, cycle_steps=5)
    with pytest.raises(MisconfigurationException, match="with manual optimization the module"):
        fit(tmp_path, sampler(tmp_path, schedule=schedule), model=model)


def test_parameters_of_16_bits_are_refused(tmp_path):
    with pytest.raises(ValueError, match="parameters must be float32 or float64, got .*bfloat16"):
        fit(tmp_path, sampler(tmp_path), precision="bf16-true")


def test_clipping_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="gradient_clip_val=0.5 changes gradients"):
        fit(tmp_path, sampler(tmp_path), gradient_clip_val=0.5)


# --- trainers and other callbacks ------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_flipout_is_refused(tmp_path, first):
    callbacks = [sampler(tmp_path), Flipout(perturbation=DropConnect())]
    with pytest.raises(MisconfigurationException, match="two posteriors of one module: use one"):
        fit(tmp_path, *(callbacks if first else reversed(callbacks)))


@pytest.mark.parametrize("callback", [True, False], ids=["callback", "module"])
def test_evolution_strategies_are_refused(tmp_path, callback):
    model = WithLosses() if callback else evolution_module()
    callbacks = [EvolutionStrategies(**SETTINGS)] if callback else []
    with pytest.raises(MisconfigurationException, match="by the gradient of the loss"):
        fit(tmp_path, sampler(tmp_path), *callbacks, model=model)


def test_strategies_that_cut_up_parameters_are_refused(tmp_path):
    trainer = quiet_trainer(tmp_path)
    trainer.strategy.__class__ = DeepSpeedStrategy  # it cannot be made without the package
    with pytest.raises(MisconfigurationException, match="needs all parameters in each process"):
        check_trainer(trainer, blobs())


def test_an_unknown_network_names_those_that_there_are(tmp_path):
    message = r"network='nett'\): Blobs has no such part. It has: net, net.0, net.1, net.2"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, sampler(tmp_path, network="nett"))


def test_weights_beside_the_chains_are_refused(tmp_path):
    model = blobs()
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="^scale would be shared by all chains"):
        fit(tmp_path, sampler(tmp_path, network="net", chains=2), model=model)


def test_chains_must_exist_before_weights_are_averaged(tmp_path):
    callbacks = WeightAveraging(), sampler(tmp_path, network="net", chains=2)
    with pytest.raises(MisconfigurationException, match="Put SGLDSampler before WeightAveraging"):
        fit(tmp_path, *callbacks)


def test_weights_that_thaw_in_the_middle_are_refused(tmp_path):
    class Thaw(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.net[0].requires_grad_(batch_idx >= 4)

    model = blobs()
    model.net[0].requires_grad_(False)
    with pytest.raises(ValueError, match="at step 6 other parameters require gradients"):
        fit(tmp_path, sampler(tmp_path), Thaw(), model=model)


# --- weights that are not finite -------------------------------------------------------------


class Diverging(Blobs):
    """Its weights are NaN from the given step on."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss * float("nan") if self.global_step == self.step - 1 else loss


def test_nan_weights_are_refused_with_the_step_and_earlier_samples_kept(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"step 10\b"):
        fit(tmp_path, sampler(tmp_path), model=Diverging(9))
    bank = SampleBank(tmp_path / "bank")
    assert bank.steps == {0: [6, 8]}
    assert torch.isfinite(bank.rows()).all()


# --- the folder ------------------------------------------------------------------------------


def test_the_samples_of_another_run_are_left_alone(tmp_path):
    fit(tmp_path, sampler(tmp_path))
    before = SampleBank(tmp_path / "bank")
    rows, metadata = before.rows(), before.metadata
    with pytest.raises(ValueError, match="holds the samples of another run. Give another dirpath"):
        fit(tmp_path, sampler(tmp_path, temperature=0.5))
    after = SampleBank(tmp_path / "bank")
    assert torch.equal(after.rows(), rows)
    assert after.metadata == metadata


def test_a_callback_does_not_go_on_with_another_training(tmp_path):
    callback = sampler(tmp_path)
    fit(tmp_path, callback)
    with pytest.raises(ValueError, match="holds the samples of another run"):
        fit(tmp_path, callback)


def test_a_bank_of_another_architecture_is_refused(tmp_path):
    layout = Layout.of_parameters(nn.Linear(3, 2))
    ChainWriter(tmp_path / "bank", layout, chain=1, max_samples=None).close()
    with pytest.raises(ValueError, match="the new chain in .*bank lacks 'weight'"):
        fit(tmp_path, sampler(tmp_path))


def test_a_module_of_another_architecture_does_not_answer_for_the_samples(tmp_path):
    fit(tmp_path, sampler(tmp_path))
    trainer = quiet_trainer(tmp_path, callbacks=[sampler(tmp_path)])
    with pytest.raises(ValueError, match="Are the samples of another module"):
        trainer.test(blobs(sgd, nn.Linear(8, 5)), loader(12), verbose=False)


def test_a_missing_bank_names_the_way_out(tmp_path):
    trainer = quiet_trainer(tmp_path, callbacks=[sampler(tmp_path)])
    message = r"there is no sample bank at .*bank. Give SGLDSampler\(dirpath=.*eval_samples=0"
    with pytest.raises(FileNotFoundError, match=message):
        trainer.test(blobs(), loader(12), verbose=False)


def test_a_bank_that_is_being_written_is_refused(tmp_path):
    layout = Layout.of_parameters(blobs())
    with (
        ChainWriter(tmp_path / "bank", layout, max_samples=None, dtype=torch.float32),
        pytest.raises(RuntimeError, match="is being written by another process"),
    ):
        fit(tmp_path, sampler(tmp_path))


# --- a full disk -----------------------------------------------------------------------------


class Disk:
    """Lets the bank be written only while there is room."""

    def __init__(self, monkeypatch):
        self.full = False
        for name in ("write_shard", "write_file"):
            monkeypatch.setattr(chain, name, self._guard(getattr(chain, name)))

    def _guard(self, write):
        def guarded(*args):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(*args)

        return guarded


class Fill(Callback):
    """The disk becomes full at the end of step 10."""

    def __init__(self, disk):
        self.disk = disk

    def on_train_batch_end(self, trainer, *_):
        self.disk.full = trainer.global_step >= 10


@pytest.fixture
def expected(tmp_path):
    """The bank of a run with enough room."""
    fit(tmp_path / "expected", sampler(tmp_path / "expected", every_n_steps=1), epochs=4)
    return SampleBank(tmp_path / "expected" / "bank")


LOST_NOTHING = r"cannot write \d+ samples .* They wait in memory and nothing is lost"


def fit_until_full(tmp_path, disk, callback, *callbacks, **settings):
    with (
        pytest.warns(UserWarning, match=r"This object keeps them until its close\(\) succeeds"),
        pytest.raises(OSError, match=LOST_NOTHING),
    ):
        fit(tmp_path, callback, Fill(disk), *callbacks, epochs=4, **settings)


@pytest.mark.parametrize("validate", [False, True])
def test_what_a_full_disk_keeps_in_memory_can_be_written_later(
    tmp_path, monkeypatch, expected, validate
):
    disk, callback = Disk(monkeypatch), sampler(tmp_path, every_n_steps=1)
    fit_until_full(tmp_path, disk, callback, validate=validate)
    with pytest.raises(OSError, match=LOST_NOTHING):
        callback.close()
    disk.full = False
    callback.close()
    bank = SampleBank(tmp_path / "bank")
    count = len(bank)
    assert count >= 6
    assert bank.steps[0] == expected.steps[0][:count]
    assert torch.equal(bank.rows(), expected.rows(range(count)))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_a_full_disk_stopped_can_be_resumed(tmp_path, monkeypatch, expected):
    disk, callback = Disk(monkeypatch), sampler(tmp_path, every_n_steps=1)
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", save_top_k=-1)
    fit_until_full(tmp_path, disk, callback, keep, enable_checkpointing=True)
    disk.full = False
    fit(tmp_path, callback, epochs=4, ckpt=tmp_path / "kept" / "epoch=0.ckpt")
    bank = SampleBank(tmp_path / "bank")
    assert bank.steps == expected.steps
    assert torch.equal(bank.rows(), expected.rows())


def test_a_training_that_ends_before_the_first_sample_is_warned_of(tmp_path):
    with pytest.warns(
        UserWarning, match=r"no samples: .* ends at step \d+, .* at step 1010\. Lower"
    ):
        fit(tmp_path, sampler(tmp_path, burn_in=1000, every_n_steps=10))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(loader().dataset)


def test_nothing_is_said_of_a_training_whose_length_is_not_known(tmp_path):
    stream = torch.utils.data.DataLoader(Stream(), loader().batch_size)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no samples")
        fit(tmp_path, sampler(tmp_path), train=stream)
