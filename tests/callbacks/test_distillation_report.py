"""DistillationReport: predictions and figures of generated networks."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_revflip.callbacks import DistillationReport
from lightning_revflip.callbacks._distillation_figures import marginals_figure, projections_figure
from lightning_revflip.posterior import Layout
from tests.helpers.distilled import codes_of, network, normal_rows, small_apd, write_bank
from tests.helpers.loggers import RecordingTensorBoard, RecordingWandb
from tests.helpers.models import quiet_trainer
from tests.helpers.sampled_models import blobs, loader


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return write_bank(tmp_path_factory.mktemp("report") / "bank", normal_rows(100)[0])


def pairs(size=30):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


class Pairs(LightningDataModule):
    def setup(self, stage):
        self.stage = stage

    def val_dataloader(self):
        assert self.stage == "validate"
        return pairs()


@pytest.mark.parametrize("data", [pairs(), Pairs()], ids=["loader", "data_module"])
def test_it_logs_accuracy_nll_and_entropy_of_the_mean_prediction(tmp_path, bank, data):
    codec, codes = codes_of(bank)
    module = small_apd(codec)
    report = DistillationReport(network(), data, num_networks=15)
    trainer = quiet_trainer(tmp_path, callbacks=[report])
    trainer.fit(module, codes)
    samples = module.posterior().sample(15, torch.Generator().manual_seed(0))
    x, y = pairs().dataset[:]
    logits = torch.einsum("sci,ni->snc", samples["weight"], x) + samples["bias"][:, None]
    mean = logits.softmax(-1).double().mean(0)
    expected = {
        "accuracy": (mean.argmax(1) == y).double().mean(),
        "nll": F.nll_loss(mean.log(), y),
        "entropy": -(mean * mean.log()).sum(1).mean(),
    }
    for name, value in expected.items():
        found = float(trainer.callback_metrics[f"apd/{name}"])
        assert found == pytest.approx(float(value), rel=1e-5), name


def test_loggers_that_take_figures_get_them(tmp_path, bank):
    pytest.importorskip("matplotlib")
    codec, codes = codes_of(bank)
    module, report = small_apd(codec), DistillationReport()
    quiet_trainer(tmp_path, callbacks=[report]).fit(module, codes)
    loggers = RecordingWandb(), RecordingTensorBoard(), CSVLogger(tmp_path)
    trainer = SimpleNamespace(
        loggers=loggers, sanity_checking=False, is_global_zero=True, global_step=5
    )
    report.on_validation_end(trainer, module)
    for logger in loggers[:2]:
        names = [(name, step) for name, step, _ in logger.figures]
        assert names == [("apd/projections", 5), ("apd/marginals", 5)]


def test_figures_show_what_they_are_given():
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    real, generated = torch.randn(9, 5), torch.randn(20, 5)
    first, *_, last = projections_figure(real, generated).axes
    assert torch.equal(
        torch.tensor(first.collections[1].get_offsets().data), generated[:, :2].double()
    )
    assert (last.get_xlabel(), last.get_ylabel()) == ("coordinate 4", "coordinate 4")
    layout = Layout(("a", "b"), ((2,), (3,)))
    real[:, 4] *= 10
    axes = marginals_figure(real, generated, layout).axes
    assert [each.get_title().split(",")[0] for each in axes] == ["a", "b"]
    assert axes[1].get_title() == "b, number 2"


def test_a_network_of_another_architecture_is_refused(tmp_path, bank):
    codec, codes = codes_of(bank)
    report = DistillationReport(nn.Linear(4, 2), pairs())
    with pytest.raises(ValueError, match="Linear is of another architecture than the samples"):
        quiet_trainer(tmp_path, callbacks=[report]).fit(small_apd(codec), codes)


def test_another_module_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="on an APDModule, got Blobs"):
        quiet_trainer(tmp_path, callbacks=[DistillationReport()]).fit(blobs(), loader())


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="a network without data"):
        DistillationReport(network())
    with pytest.raises(ValueError, match="data without a network"):
        DistillationReport(data=pairs())
    with pytest.raises(ValueError, match="num_networks must be at least 1, got 0"):
        DistillationReport(network(), pairs(), 0)


@pytest.mark.parametrize("right", [True, False])
def test_a_configuration_file_names_the_data_module(right):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DistillationReport, "report")
    path = f"{Pairs.__module__}.Pairs" + ("" if right else "s")
    network = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 3, "out_features": 2}}
    settings = {"report": {"network": network, "data": {"class_path": path}}}
    if right:
        report = parser.instantiate(parser.parse_object(settings)).report
        assert isinstance(report.data, LightningDataModule)
    else:
        with pytest.raises(ArgumentError, match="Pairss"):
            parser.parse_object(settings)
