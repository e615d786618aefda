"""The configurations of adversarial posterior distillation, and the toy of its paper."""

import math
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_revflip.apd import DistilledPosterior, Generator, ParameterCodec
from lightning_revflip.callbacks import SGLDSampler
from lightning_revflip.cli import RevflipCLI
from lightning_revflip.modules import APDModule
from lightning_revflip.posterior import ChainWriter, Layout, SampleBank
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.distillation import SaveDistilled
from recipes.mnist.module import Classifier
from recipes.mnist.report import UncertaintyReport
from recipes.mnist.toy import (
    PosteriorFigure,
    ToyClassifier,
    TwoMoons,
    entropy_error,
    grid,
    posterior_figure,
    two_moons,
)
from recipes.mnist.uncertainty import summary
from tests.helpers.recipe_runs import config_args, last_callback

REAL = os.environ.get("REVFLIP_DATA")
pytestmark = pytest.mark.usefixtures("cwd")


@pytest.fixture
def real_data(cwd, monkeypatch):
    assert REAL is not None
    monkeypatch.setenv("REVFLIP_DATA", REAL)


needs_data = pytest.mark.skipif(not REAL, reason="REVFLIP_DATA is not set")


def sampling_args(*names: str) -> list[str]:
    """A short run of SGLD: more samples than the rank of the configurations."""
    args = config_args("mnist", "base", "mlp", "sgld", *names, "csv")
    args += ["--trainer.max_epochs=-1", "--trainer.max_steps=200", "--data.batch_size=100"]
    args += ["--trainer.check_val_every_n_epoch=1"]
    return [*args, *last_callback(burn_in=40, every_n_steps=4)]


def run_of(trainer: Trainer) -> Path:
    return Path(trainer.log_dir)


def evaluate(run: Path, *args: str) -> dict[str, float]:
    """What a test of the last checkpoint of a run logs."""
    checkpoint = run / "checkpoints" / "last.ckpt"
    command = ["test", f"--config={run / 'config.yaml'}", *args, f"--ckpt_path={checkpoint}"]
    found = RevflipCLI(command).trainer.callback_metrics
    return {name: float(value) for name, value in found.items()}


def check_distilled_agrees_with_its_bank(found: dict[str, float]) -> None:
    # 200 generated networks against the 40 samples that they were learnt from.
    assert found["distilled/samples"] == 200
    assert found["posterior/samples"] == 40
    assert found["distilled/accuracy"] == pytest.approx(found["posterior/accuracy"], abs=0.05)
    score = "auroc/predictive_entropy"
    assert found[f"distilled/{score}"] == pytest.approx(found[f"posterior/{score}"], abs=0.1)


# --- offline ---------------------------------------------------------------------------------


def distil_offline(run: Path, *args: str) -> Trainer:
    bank = run / "posterior"
    command = ["fit", *config_args("mnist", "apd_offline", "csv"), *args, "--trainer.max_steps=20"]
    command += [f"--data.bank={bank}", f"--model.codec.bank={bank}", "--data.batches_per_epoch=10"]
    return RevflipCLI(command).trainer


def test_finished_bank_of_the_small_digits_is_distilled_and_reported_on():
    run = run_of(RevflipCLI(["fit", *sampling_args("small")]).trainer)
    trainer = distil_offline(run, *last_callback(**{"network.image_shape": [1, 8, 8]}))
    assert 0.5 < trainer.callback_metrics["apd/accuracy"] <= 1

    saved = DistilledPosterior.load(run / "distilled")
    checkpoint = run_of(trainer) / "checkpoints" / "last.ckpt"
    kept = APDModule.load_from_checkpoint(checkpoint).posterior()
    for name, value in saved.sample(3, torch.Generator().manual_seed(0)).items():
        torch.testing.assert_close(value, kept.sample(3, torch.Generator().manual_seed(0))[name])

    report = [*config_args("mnist", "report"), *last_callback(source="distilled")]
    check_distilled_agrees_with_its_bank(evaluate(run, *report))


@pytest.mark.slow
@pytest.mark.data
@needs_data
@pytest.mark.usefixtures("real_data")
def test_finished_bank_of_mnist_is_distilled_and_reported_on():
    run = run_of(RevflipCLI(["fit", *sampling_args()]).trainer)
    assert 0.5 < distil_offline(run).callback_metrics["apd/accuracy"] <= 1
    report = [*config_args("mnist", "report"), *last_callback(source="distilled")]
    check_distilled_agrees_with_its_bank(evaluate(run, *report))


def test_what_is_no_distillation_cannot_be_saved():
    trainer = Trainer(callbacks=[SaveDistilled()], logger=False, enable_checkpointing=False)
    with pytest.raises(TypeError, match="an APDModule on SampleBankCodes, got BoringModel"):
        trainer.fit(BoringModel())


# --- online ----------------------------------------------------------------------------------

SHORT = {"buffer_size": 40, "every_n_samples": 40, "steps": 20}


def test_digits_are_distilled_online_and_all_applications_find_what_was_distilled():
    args = ["fit", *sampling_args("small")]
    args += [*config_args("mnist", "apd_online"), *last_callback(**SHORT)]
    args += [*config_args("mnist", "apd_anomaly"), *last_callback(size=100, num_samples=20)]
    attack = {"epsilons": "[0,0.3]", "steps": 1, "size": 50, "num_samples": 5}
    args += [*config_args("mnist", "apd_adversarial"), *last_callback(**attack)]
    run = run_of(RevflipCLI(args).trainer)
    found = evaluate(run)
    check_distilled_agrees_with_its_bank(found)
    for application in ("anomaly", "attack"):
        sources = {name.split("/")[1] for name in found if name.startswith(f"{application}/")}
        assert sources == {"sample", "bank", "distilled"}
    assert len(DistilledPosterior.load(run / "distilled")) == 40


@pytest.mark.data
@needs_data
@pytest.mark.usefixtures("real_data")
def test_mnist_is_distilled_online_and_reported_on():
    args = ["fit", *sampling_args(), *config_args("mnist", "apd_online"), *last_callback(**SHORT)]
    check_distilled_agrees_with_its_bank(evaluate(run_of(RevflipCLI(args).trainer)))


# --- report ----------------------------------------------------------------------------------


def test_report_of_a_distilled_posterior_is_that_of_its_networks(tmp_path):
    torch.manual_seed(0)
    model = Classifier((1, 8, 8), 10, hidden=[20])
    layout = Layout.of_parameters(model)
    with ChainWriter(tmp_path / "bank", layout, max_samples=None) as bank:
        for step in range(5):
            bank.append(step, 0.3 * torch.randn(layout.numel))
    codec = ParameterCodec.fit(SampleBank(tmp_path / "bank"), rank=3)
    posterior = DistilledPosterior(codec, Generator(3, 3, [8]), num_samples=5)
    posterior.export(tmp_path / "distilled.safetensors")

    report = UncertaintyReport("distilled", 6, dirpath=str(tmp_path / "distilled.safetensors"))
    data = HandwrittenDigits(source="digits", eval_batch_size=128, outliers="uniform")
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[report], logger=CSVLogger(tmp_path), **options)
    (found,) = trainer.test(model, data, verbose=False)

    test, outliers = data.test_set(), data.outlier_images()
    probs = {
        name: posterior.predict(model, images, 6, generator=torch.Generator().manual_seed(0))
        for name, images in {"test": test.images, "outliers": outliers}.items()
    }
    for name, value in summary(probs, test.labels).items():
        assert found[f"distilled/{name}"] == pytest.approx(float(value), rel=1e-3, abs=1e-5), name
    assert not any(name.startswith("posterior/") for name in found)
    figures = {path.name for path in run_of(trainer).glob("*.png")}
    assert figures == {"distilled_reliability.png", "distilled_entropy.png"}


# --- toy -------------------------------------------------------------------------------------


def test_toy_is_sampled_distilled_drawn_and_tested_from_its_checkpoint():
    args = ["fit", *config_args("mnist", "apd_toy", "csv"), "--trainer.max_steps=2400"]
    args += ["--trainer.callbacks.steps=5", "--trainer.callbacks.gaussian_rank=4"]
    trainer = RevflipCLI(args).trainer
    run = run_of(trainer)
    bank = SampleBank(run / "posterior")
    assert len(bank) == 20
    distilled = DistilledPosterior.load(run / "distilled")
    assert distilled.layout.numel == 2 * 10 + 10 + 10 * 10 + 10 + 10 * 2 + 2
    assert (run / "posterior.png").stat().st_size > 10_000
    assert "toy/entropy_error_apd" in (run / "metrics.csv").read_text()

    (checkpoint,) = (run / "checkpoints").iterdir()
    args = ["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={checkpoint}"]
    found = RevflipCLI(args).trainer.callback_metrics["test/accuracy"]
    network = nn.Sequential(OrderedDict(network=ToyClassifier().new_network()))
    others = TwoMoons().others
    # A test is answered by all 20 samples.
    predicted = bank.predict(network, others.images).mean(0).argmax(-1)
    expected = (predicted == others.labels).float().mean()
    assert float(found) == pytest.approx(float(expected), abs=0.005)


def test_points_lie_on_half_circles_that_reach_into_each_other():
    points, labels = two_moons(200, 0.0, torch.Generator().manual_seed(0))
    centres = torch.tensor([[-0.5, -0.25], [0.5, 0.25]])[labels]
    torch.testing.assert_close((points - centres).norm(dim=1), torch.ones(200))
    upper = points[:, 1] >= centres[:, 1]
    assert upper.equal(labels == 0)
    # No line between them: the lowest point of the upper one is below the highest of the lower.
    assert points[labels == 0, 1].min() < points[labels == 1, 1].max()


def test_each_step_sees_all_points():
    data = TwoMoons(num_points=20, batches_per_epoch=2)
    batches = list(data.train_dataloader())
    assert len(batches) == len(data.train_dataloader()) == 2
    assert all(batch.images.shape == (20, 2) for batch in batches)
    assert batches[0].labels.bincount().tolist() == [10, 10]


def test_entropy_error_is_the_mean_distance_of_entropies():
    sure, unsure = torch.tensor([[[1.0, 0.0]] * 4]), torch.full((3, 4, 2), 0.5)
    assert entropy_error(sure, unsure) == pytest.approx(math.log(2))
    assert entropy_error(unsure, unsure[:1]) == 0


def test_figure_has_boundaries_and_entropy_of_each_posterior():
    probs = torch.rand(4, len(grid()), 1, generator=torch.Generator().manual_seed(0))
    probs = torch.cat([probs, 1 - probs], dim=-1)
    figure = posterior_figure({"a": probs, "b": probs, "c": probs}, TwoMoons().points, 3)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["a", "b", "c"]
    assert len(figure.axes) == 2 * 3 + 1  # and the scale of the entropy


def test_toy_needs_samples_and_its_own_task(tmp_path):
    options = {"logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    trainer = Trainer(callbacks=[PosteriorFigure()], **options)
    with pytest.raises(ValueError, match="there is none among the callbacks"):
        trainer.fit(ToyClassifier(), TwoMoons())
    callbacks = [SGLDSampler(num_data=20), PosteriorFigure()]
    with pytest.raises(TypeError, match="a ToyClassifier on TwoMoons, got BoringModel"):
        Trainer(callbacks=callbacks, **options).fit(BoringModel())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_points": 7}, "num_points must be an even number from 2 on, got 7"),
        ({"noise": -1.0}, "noise must not be negative"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be at least 1"),
    ],
    ids=["odd", "noise", "batches"],
)
def test_points_that_make_no_sense_are_rejected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TwoMoons(**kwargs)
