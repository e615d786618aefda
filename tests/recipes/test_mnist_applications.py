"""`AnomalyDetection` and `AdversarialAttack`: what a test says of networks and of samples."""

import functools
import os
import zipfile

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from lightning_revflip.apd import DistilledPosterior, Generator, ParameterCodec
from lightning_revflip.applications import (
    NetworkPredictor,
    PosteriorPredictor,
    detect_anomalies,
    fgsm,
    under_attack,
)
from lightning_revflip.cli import RevflipCLI
from lightning_revflip.posterior import ChainWriter, Layout, SampleBank
from recipes.mnist.adversarial import AdversarialAttack
from recipes.mnist.anomaly import AnomalyDetection
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.module import Classifier
from recipes.mnist.outliers import available_kinds, find_outliers
from tests.helpers.models import quiet_trainer
from tests.helpers.recipe_runs import config_args, fit, last_callback

REAL = os.environ.get("REVFLIP_DATA")
pytestmark = pytest.mark.usefixtures("no_data_of_the_user")


def digits() -> HandwrittenDigits:
    return HandwrittenDigits(source="digits", batch_size=32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Classifier:
    """A classifier with dropout after a few epochs on the small digits."""
    seed_everything(1, verbose=False)
    model = Classifier(hidden=[30], dropout=0.5, lr=1e-2)
    trainer = quiet_trainer(tmp_path_factory.mktemp("train"), max_epochs=5, limit_val_batches=0)
    trainer.fit(model, digits())
    return model


@pytest.fixture
def bank(tmp_path, trained) -> SampleBank:
    """Samples around the weights of the classifier."""
    layout = Layout.of_parameters(trained)
    weights = torch.nn.utils.parameters_to_vector(trained.parameters()).detach()
    generator = torch.Generator().manual_seed(0)
    with ChainWriter(tmp_path / "bank", layout, max_samples=None, dtype=torch.float32) as writer:
        for step in range(5):
            noise = torch.randn(len(weights), generator=generator)
            writer.append(step, weights + 0.05 * noise)
    return SampleBank(tmp_path / "bank")


def logged_by(tmp_path, model, callback, data=None, **kwargs) -> dict[str, float]:
    """What a test with a callback logs."""
    data = digits() if data is None else data
    (found,) = quiet_trainer(tmp_path, callbacks=[callback], **kwargs).test(
        model, data, verbose=False
    )
    return found


# --- anomalies -------------------------------------------------------------------------------


def test_anomalies_of_a_bank_are_those_of_its_samples(tmp_path, trained, bank):
    callback = AnomalyDetection(["sample", "bank"], size=100, scale=2.0, bank=str(bank.path))
    found = logged_by(tmp_path, trained, callback)

    data = digits()
    data.setup("test")
    test = data.test_set().images
    outside = {k: find_outliers(k, test, 1.0, 100, 0)[1] for k in available_kinds(test.shape[1:])}
    assert list(outside) == ["inverted", "gaussian", "uniform"]
    for source, count in {"sample": 1, "bank": 5}.items():
        predictor = PosteriorPredictor(bank, trained, count)
        report = detect_anomalies(predictor, test, outside, size=100, scale=2.0)
        expected = {k: v for k, v in report.metrics().items() if "auroc" in k}
        logged = {k: v for k, v in found.items() if k.startswith(f"anomaly/{source}/")}
        assert len(logged) == len(expected)
        for name, value in expected.items():
            assert logged[f"anomaly/{source}/{name}"] == pytest.approx(value, abs=1e-5)


def test_images_of_a_folder_are_anomalies_too(tmp_path, trained):
    folder = tmp_path / "stripes"
    folder.mkdir()
    for index in range(3):
        Image.new("L", (20, 20), 80 * index).save(folder / f"{index}.png")
    callback = AnomalyDetection(["network"], kinds=["uniform"], folders=[str(folder)])
    found = logged_by(tmp_path, trained, callback)
    assert {name.split("/")[2] for name in found if "anomaly" in name} == {"uniform", "stripes"}


def test_all_sources_that_there_are_are_put_to_the_test(tmp_path, trained, bank):
    found = logged_by(tmp_path, trained, AnomalyDetection(kinds=["uniform"], num_samples=3))
    assert {name.split("/")[1] for name in found if "anomaly" in name} == {"network", "dropout"}
    callback = AnomalyDetection(kinds=["uniform"], bank=str(bank.path))
    found = logged_by(tmp_path, trained, callback)
    assert {name.split("/")[1] for name in found if "anomaly" in name} == {"sample", "bank"}


def test_distilled_posterior_is_found_beside_the_samples_it_was_made_of(tmp_path, trained, bank):
    codec = ParameterCodec.fit(bank, rank=2)
    distilled = DistilledPosterior(codec, Generator(2, 2, skip=True), num_samples=len(bank))
    distilled.save(tmp_path / "distilled")
    callback = AnomalyDetection(kinds=["uniform"], bank=str(bank.path), num_samples=4)
    found = logged_by(tmp_path, trained, callback)
    sources = {name.split("/")[1] for name in found if "anomaly" in name}
    assert sources == {"sample", "bank", "distilled"}
    assert logged_by(tmp_path, trained, callback) == found


def test_tables_and_figure_go_to_the_folder_of_the_run(tmp_path, trained):
    logger = CSVLogger(tmp_path, "run", "0")
    anomalies, attack = AnomalyDetection(["network"]), AdversarialAttack(["network"], steps=2)
    trainer = quiet_trainer(tmp_path, callbacks=[anomalies, attack], logger=logger)
    trainer.test(trained, digits(), verbose=False)
    folder = tmp_path / "run" / "0"
    table = (folder / "anomaly.md").read_text()
    assert "## network: 1 network, inputs x1" in table
    assert "| uniform   | max_probability    |" in table
    assert "## network: pgd, 300 images" in (folder / "adversarial.md").read_text()
    assert (folder / "adversarial.png").stat().st_size > 0


# --- attacks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_attack_is_that_of_the_package_in_shares_of_the_range(tmp_path, trained, scale):
    data = HandwrittenDigits(source="digits", scale=scale)
    callback = AdversarialAttack(["network"], attack="fgsm", epsilons=[0, 0.1], size=300)
    found = logged_by(tmp_path, trained, callback, data)
    attack = functools.partial(fgsm, data_range=(0, scale))
    test = data.test_set()
    report = under_attack(
        NetworkPredictor(trained), test.images, test.labels, [0, 0.1 * scale], attack
    )
    clean, attacked = report.rows
    assert found["attack/network/accuracy/0"] == pytest.approx(clean.accuracy)
    assert found["attack/network/accuracy/0"] == pytest.approx(found["test/accuracy"])
    assert found["attack/network/accuracy/0.1"] == pytest.approx(attacked.accuracy)
    assert attacked.accuracy < clean.accuracy
    for score, value in attacked.auroc.items():
        assert found[f"attack/network/auroc/{score}/0.1"] == pytest.approx(value, abs=1e-5)


def test_attack_can_be_made_for_another_source(tmp_path, trained, bank):
    settings = {"epsilons": [0.1], "attack": "fgsm", "size": 200, "bank": str(bank.path)}
    own = logged_by(tmp_path, trained, AdversarialAttack(**settings))
    callback = AdversarialAttack(**settings, transfer_from="sample")
    transferred = logged_by(tmp_path, trained, callback)
    name = "attack/{}/accuracy/0.1"
    assert transferred[name.format("sample")] == own[name.format("sample")]
    assert transferred[name.format("bank")] > own[name.format("bank")]


def test_model_is_left_as_it_was(tmp_path, trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    modes = [part.training for part in trained.modules()]
    callback = AdversarialAttack(["network", "dropout"], epsilons=[0.1], steps=2, num_samples=2)
    logged_by(tmp_path, trained, callback)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert [part.training for part in trained.modules()] == modes
    assert all(parameter.grad is None for parameter in trained.parameters())


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnomalyDetection(["ensemble"]), "sources must be some of network, dropout"),
        (lambda: AnomalyDetection([]), "sources must be some of"),
        (lambda: AnomalyDetection(num_samples=0), "num_samples must be at least 1, got 0"),
        (lambda: AnomalyDetection(size=0), "size must be at least 1, got 0"),
        (lambda: AdversarialAttack(attack="cw"), "attack must be 'fgsm' or 'pgd', got 'cw'"),
        (lambda: AdversarialAttack(epsilons=[0.1, 1.5]), "from 0 to 1, got \\[0.1, 1.5\\]"),
        (lambda: AdversarialAttack(steps=0), "steps must be at least 1, got 0"),
        (lambda: AdversarialAttack(["bank"], transfer_from="sample"), "one of the sources"),
    ],
    ids=["source", "none", "num_samples", "size", "attack", "epsilon", "steps", "transfer"],
)
def test_arguments_that_make_no_sense_are_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [AnomalyDetection, AdversarialAttack])
def test_missing_samples_are_an_error_before_the_test_runs(tmp_path, trained, make):
    with pytest.raises(ValueError, match="not known where the bank is"):
        logged_by(tmp_path, trained, make(["bank"]))
    with pytest.raises(ValueError, match="not known where the distilled is"):
        logged_by(tmp_path, trained, make(["distilled"]))
    with pytest.raises(TypeError, match="about a Classifier on HandwrittenDigits, got BoringModel"):
        quiet_trainer(tmp_path, callbacks=[make()]).test(BoringModel(), digits(), verbose=False)


def test_missing_images_are_an_error_before_the_test_runs(tmp_path, trained):
    with pytest.raises(FileNotFoundError, match="Omniglot was not found"):
        logged_by(tmp_path, trained, AnomalyDetection(kinds=["omniglot"]))


# --- Omniglot --------------------------------------------------------------------------------


def test_omniglot_is_found_resized_and_inverted(tmp_path):
    folder = tmp_path / "omniglot"
    folder.mkdir()
    Image.new("1", (105, 105), 1).save(tmp_path / "white.png")
    with zipfile.ZipFile(folder / "images_background.zip", "w") as archive:
        archive.write(tmp_path / "white.png", "images_background/Latin/character01/1.png")
    test = torch.rand(4, 1, 8, 8)
    assert "omniglot" in available_kinds(test.shape[1:], tmp_path)
    found = find_outliers("omniglot", test, 5.0, 2000, 0, tmp_path)
    assert "1 characters of Omniglot" in found.description
    assert torch.equal(found.images, torch.zeros(1, 1, 8, 8))


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_real_mnist_is_compared_with_characters():
    data = HandwrittenDigits(source="mnist", root=REAL, outliers="omniglot", num_outliers=500)
    found = data.outlier_images()
    assert found.shape == (500, 1, 28, 28)
    # Measured on the file itself: white strokes on black, thinner than those of MNIST (0.13).
    assert found.mean().item() == pytest.approx(0.076, abs=0.005)


# --- configurations --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "sources"),
    [
        (["mlp"], {"network"}),
        (["mlp", "mc_dropout"], {"network", "dropout"}),
        (["mlp", "sgld"], {"sample", "bank"}),
    ],
    ids=["network", "dropout", "samples"],
)
def test_configurations_run_on_the_small_digits(cwd, names, sources):
    args = config_args("mnist", "base", *names, "small", "csv")
    if "sgld" in names:
        args += [*last_callback(burn_in=10, every_n_steps=2), "--trainer.check_val_every_n_epoch=1"]
    args += config_args("mnist", "apd_anomaly", "apd_adversarial")
    args += last_callback(steps=1, num_samples=2, epsilons="[0,0.3]")
    fit(*args, "--trainer.max_epochs=2")
    (folder,) = (cwd / "runs" / "mnist").iterdir()
    args = ["test", f"--config={folder / 'config.yaml'}"]
    checkpoint = folder / "checkpoints" / "last.ckpt"
    found = RevflipCLI([*args, f"--ckpt_path={checkpoint}"]).trainer.callback_metrics
    for application in ("anomaly", "attack"):
        assert {key.split("/")[1] for key in found if key.startswith(application)} == sources
    for source in sources:
        assert 0 <= found[f"anomaly/{source}/uniform/auroc/predictive_entropy"] <= 1
        assert found[f"attack/{source}/accuracy/0.3"] <= found[f"attack/{source}/accuracy/0"]
