"""SGLDSampler: in evaluation the module answers for the samples collected so far."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_revflip.posterior import SampleBank
from lightning_revflip.sgld.diagnostics import diagnose, probe_weights
from tests.helpers.models import quiet_trainer
from tests.helpers.sampled_models import Blobs, blobs, data, fit, loader, sampler

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")

X, Y = data(12)[:]


def expected_values(probabilities):
    """Accuracy, NLL, entropy and mutual information from (samples, batch, classes)."""
    mean = probabilities.double().mean(0)
    total = -(mean * mean.log()).sum(-1)
    each = -(probabilities * probabilities.log()).sum(-1).mean(0)
    return {
        "accuracy": (mean.argmax(-1) == Y).double().mean().item(),
        "nll": F.nll_loss(mean.log(), Y).item(),
        "entropy": total.mean().item(),
        "mutual_information": (total - each).mean().item(),
    }


def assert_logged(metrics, stage, expected):
    for name in ("accuracy", "nll"):
        assert float(metrics[f"{stage}_{name}"]) == pytest.approx(expected[name], rel=1e-5)
    for name in ("entropy", "mutual_information"):
        assert float(metrics[f"sgld/{name}"]) == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize("layers", [(), (nn.BatchNorm1d(8),)], ids=["plain", "batch_norm"])
@pytest.mark.parametrize("network", [None, "net"])
def test_values_are_those_of_the_mean_prediction_of_the_bank(tmp_path, layers, network):
    model = blobs(lambda m: torch.optim.SGD(m.parameters(), lr=0.5), *layers)
    callback = sampler(tmp_path, network=network)
    model, trainer = fit(tmp_path, callback, model=model, epochs=3, validate=True)
    bank = SampleBank(tmp_path / "bank")
    probabilities = bank.predict(model, X)
    assert probabilities.std(0).max() > 0.01
    expected = expected_values(probabilities)
    assert_logged(trainer.callback_metrics, "val", expected)

    (tested,) = trainer.test(model, loader(12), verbose=False)
    assert_logged(tested, "test", expected)
    predicted = torch.cat(trainer.predict(model, loader(12)))
    torch.testing.assert_close(predicted, probabilities.mean(0))
    if layers:  # each sample has the statistics it was taken with
        assert bank.buffers()["net.1.running_mean"].std(0).max() > 0


def test_only_eval_samples_of_the_bank_are_used(tmp_path):
    model, trainer = fit(tmp_path, sampler(tmp_path, eval_samples=2), epochs=3, validate=True)
    probabilities = SampleBank(tmp_path / "bank").predict(model, X, n=2)
    assert_logged(trainer.callback_metrics, "val", expected_values(probabilities))


def test_without_eval_samples_the_current_weights_answer(tmp_path):
    model, trainer = fit(tmp_path, sampler(tmp_path, eval_samples=0), validate=True)
    probabilities = model.eval()(X).softmax(-1).unsqueeze(0).detach()
    nll = expected_values(probabilities)["nll"]
    assert float(trainer.callback_metrics["val_nll"]) == pytest.approx(nll, rel=1e-5)
    assert "sgld/entropy" not in trainer.callback_metrics


def test_before_the_first_sample_the_current_weights_answer(tmp_path):
    model, trainer = fit(tmp_path, sampler(tmp_path, burn_in=1000), validate=True)
    nll = F.cross_entropy(model.eval()(X), Y).item()
    assert float(trainer.callback_metrics["val_nll"]) == pytest.approx(nll, rel=1e-5)
    with pytest.raises(ValueError, match="holds no sample yet: the first is taken at step 1002"):
        trainer.test(model, loader(12), verbose=False)


def test_validation_does_not_change_the_training(tmp_path):
    with_validation, _ = fit(tmp_path / "a", sampler(tmp_path / "a"), validate=True)
    without, _ = fit(tmp_path / "b", sampler(tmp_path / "b"))
    for found, expected in zip(with_validation.parameters(), without.parameters(), strict=True):
        assert torch.equal(found, expected)
    rows = [SampleBank(tmp_path / name / "bank").rows() for name in "ab"]
    assert torch.equal(*rows)


def test_diagnostics_are_those_of_the_draws(tmp_path):
    callback = sampler(tmp_path, every_n_steps=1)
    model, trainer = fit(tmp_path, callback, epochs=4, validate=True)
    bank = SampleBank(tmp_path / "bank")
    expected = diagnose(probe_weights(bank.rows()).unsqueeze(0))
    metrics = trainer.callback_metrics
    assert float(metrics["sgld/ess_weights"]) == pytest.approx(expected.ess_min, rel=1e-5)
    assert float(metrics["sgld/rhat_weights"]) == pytest.approx(expected.rhat_max, rel=1e-5)
    # 4 points of the first batch with 3 logits each are fewer than the quantities looked at.
    logits = bank.predict(model, X[:4], transform=None).flatten(1).double()
    expected = diagnose(logits.unsqueeze(0))
    assert float(metrics["sgld/ess_function"]) == pytest.approx(expected.ess_min, rel=1e-4)
    assert float(metrics["sgld/rhat_function"]) == pytest.approx(expected.rhat_max, rel=1e-4)
    assert callback.mixing is not None


def test_fewer_than_four_samples_have_no_diagnostics(tmp_path):
    _, trainer = fit(tmp_path, sampler(tmp_path, every_n_steps=4), validate=True)
    assert len(SampleBank(tmp_path / "bank")) == 2
    assert "sgld/ess_weights" not in trainer.callback_metrics
    assert "sgld/entropy" in trainer.callback_metrics


# --- the module ------------------------------------------------------------------------------


class Fails(Callback):
    def __init__(self, hook):
        setattr(self, hook, self.fail)

    def fail(self, *_):
        raise RuntimeError("a failure")


@pytest.mark.parametrize("network", [None, "net"])
@pytest.mark.parametrize("hook", [None, "on_validation_batch_end", "on_validation_epoch_end"])
def test_the_forward_method_is_restored(tmp_path, network, hook):
    model = blobs()
    fails = [] if hook is None else [Fails(hook)]
    callback = sampler(tmp_path, network=network)
    if fails:
        with pytest.raises(RuntimeError, match="a failure"):
            fit(tmp_path, callback, *fails, model=model, validate=True, num_sanity_val_steps=0)
    else:
        fit(tmp_path, callback, model=model, validate=True)
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.net)
    assert "configure_optimizers" not in vars(model)


class Keywords(Blobs):
    """Calls itself with arguments by name."""

    def forward(self, x, *, scale=1.0):
        return scale * self.net(x)

    def validation_step(self, batch, batch_idx):
        self.log("val_nll", F.cross_entropy(self(x=batch[0], scale=2.0), batch[1]))


def test_arguments_may_be_given_by_name(tmp_path):
    torch.manual_seed(0)
    model, trainer = fit(tmp_path, sampler(tmp_path), model=Keywords(), validate=True)
    logits = 2 * SampleBank(tmp_path / "bank").predict(model, X, transform=None)
    nll = F.nll_loss(logits.softmax(-1).mean(0).log(), Y).item()
    assert float(trainer.callback_metrics["val_nll"]) == pytest.approx(nll, rel=1e-5)


class Elsewhere(Blobs):
    """Evaluates without calling itself."""

    def validation_step(self, batch, batch_idx):
        self.log("val_nll", F.cross_entropy(self.net(batch[0]), batch[1]))


def test_a_step_that_does_not_call_the_network_is_warned_of(tmp_path):
    torch.manual_seed(0)
    message = r"did not call the module itself, so it was .* Give SGLDSampler\(network=...\)"
    with pytest.warns(UserWarning, match=message):
        fit(tmp_path, sampler(tmp_path), model=Elsewhere(), validate=True)


class Pair(Blobs):
    def forward(self, x):
        return self.net(x), x

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0])[0], batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_nll", F.cross_entropy(self(batch[0])[0], batch[1]))


def test_outputs_that_cannot_be_combined_name_the_way_out(tmp_path):
    torch.manual_seed(0)
    message = r"Pair returns a tuple, and .* Choose with SGLDSampler\(network=...\) a part"
    with pytest.raises(TypeError, match=message):
        fit(tmp_path / "0", sampler(tmp_path / "0"), model=Pair(), validate=True)
    _, trainer = fit(tmp_path, sampler(tmp_path, network="net"), model=Pair(), validate=True)
    assert "sgld/entropy" in trainer.callback_metrics


class Regression(Blobs):
    def forward(self, x):
        return self.net(x)[:, :1]

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self(batch[0]), batch[1].float().unsqueeze(1))

    def validation_step(self, batch, batch_idx):
        self.log("mse", F.mse_loss(self(batch[0]), batch[1].float().unsqueeze(1)))


def test_regression_combines_as_it_is_told(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="with a single one. For regression"):
        fit(tmp_path / "0", sampler(tmp_path / "0"), model=Regression(), validate=True)
    callback = sampler(tmp_path, combine=lambda outputs: outputs.mean(0))
    model, trainer = fit(tmp_path, callback, model=Regression(), validate=True)
    mean = SampleBank(tmp_path / "bank").predict(model, X, transform=None).mean(0)
    expected = F.mse_loss(mean, Y.float().unsqueeze(1)).item()
    assert float(trainer.callback_metrics["mse"]) == pytest.approx(expected, rel=1e-5)
    assert "sgld/entropy" not in trainer.callback_metrics  # there are no probabilities
    assert "sgld/ess_function" in trainer.callback_metrics


class Graph(Blobs):
    """All nodes are one example: the first dimension cannot be cut."""

    def forward(self, adjacency, x):
        return adjacency @ self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(torch.eye(len(batch[0])), batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_nll", F.cross_entropy(self(torch.eye(len(batch[0])), batch[0]), batch[1]))


def test_inputs_that_cannot_be_cut_are_diagnosed_whole(tmp_path):
    torch.manual_seed(0)
    trainer = quiet_trainer(tmp_path, max_epochs=4, callbacks=[sampler(tmp_path)])
    whole = DataLoader(data(20), 20)
    trainer.fit(Graph(), loader(), whole)
    assert math.isfinite(trainer.callback_metrics["sgld/ess_function"])


# --- what users read -------------------------------------------------------------------------


def test_values_reach_the_logger(tmp_path):
    logger = CSVLogger(tmp_path, "runs")
    fit(tmp_path, sampler(tmp_path), validate=True, logger=logger, log_every_n_steps=1)
    with (tmp_path / "runs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    samples = [float(row["sgld/samples"]) for row in rows if row["sgld/samples"]]
    assert samples == [0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert {row["sgld/temperature"] for row in rows} - {""} == {"1.0"}
    names = {"entropy", "mutual_information"}
    names |= {"ess_weights", "ess_function", "rhat_weights", "rhat_function"}
    for name in names:
        assert any(row[f"sgld/{name}"] for row in rows), name


def test_the_progress_bar_shows_the_number_of_samples(tmp_path):
    _, trainer = fit(tmp_path, sampler(tmp_path), log_every_n_steps=1)
    assert trainer.progress_bar_metrics["sgld/samples"] == 4


@pytest.mark.parametrize("validate", [True, False])
def test_the_end_of_training_says_whether_the_chain_has_mixed(tmp_path, caplog, validate):
    caplog.set_level("INFO")
    fit(tmp_path, sampler(tmp_path), validate=validate)
    assert f"SampleBank('{tmp_path}/bank': 4 samples of 67 parameters, 1 chain" in caplog.text
    assert "One chain cannot tell whether it missed a part of the posterior." in caplog.text
    assert ("In function space" in caplog.text) == validate


def test_a_barebones_trainer_collects_and_evaluates(tmp_path):
    with pytest.warns(UserWarning, match="barebones"):  # of the module's own log
        model, _ = fit(
            tmp_path,
            sampler(tmp_path),
            validate=True,
            barebones=True,
            logger=None,
            enable_checkpointing=None,
            enable_progress_bar=None,
            enable_model_summary=None,
        )
    assert SampleBank(tmp_path / "bank").steps == {0: [6, 8, 10, 12]}
    assert "forward" not in vars(model)
