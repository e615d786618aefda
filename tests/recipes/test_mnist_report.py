"""`UncertaintyReport`: what a test logs of one network, of dropout and of a bank of samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from scipy.stats import entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_revflip.callbacks import SGLDSampler
from lightning_revflip.posterior import ChainWriter, Layout, SampleBank
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.module import Classifier
from recipes.mnist.report import UncertaintyReport
from recipes.mnist.uncertainty import summary
from tests.helpers.loggers import RecordingWandb
from tests.helpers.models import quiet_trainer

REAL = os.environ.get("REVFLIP_DATA")
SCORES = ["predictive_entropy", "max_probability", "mutual_information", "variation_ratio"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Classifier:
    """A classifier with dropout after a few epochs on the small digits."""
    seed_everything(1, verbose=False)
    model = Classifier(hidden=[30], dropout=0.5, lr=1e-2)
    trainer = quiet_trainer(tmp_path_factory.mktemp("train"), max_epochs=5, limit_val_batches=0)
    trainer.fit(model, HandwrittenDigits(source="digits", batch_size=32))
    return model


def report_of(tmp_path, model, report, data=None, **kwargs) -> dict[str, float]:
    """What a test with a report logs."""
    data = HandwrittenDigits(source="digits", eval_batch_size=128) if data is None else data
    (found,) = quiet_trainer(tmp_path, callbacks=[report], **kwargs).test(
        model, data, verbose=False
    )
    return found


def perturbed_rows(model, number: int, seed: int) -> torch.Tensor:
    """Weights near those of a model, each a random step from the one before."""
    weights = parameters_to_vector(model.parameters()).detach()
    generator = torch.Generator().manual_seed(seed)
    return weights + 0.02 * torch.randn(number, len(weights), generator=generator).cumsum(0)


def write_bank(folder: Path, model, chains: dict[int, torch.Tensor]) -> Path:
    for chain, rows in chains.items():
        layout = Layout.of_parameters(model)
        with ChainWriter(
            folder, layout, chain=chain, max_samples=None, dtype=torch.float32
        ) as bank:
            for step, row in enumerate(rows):
                bank.append(step, row)
    return folder


def ensemble(model, rows: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Probabilities of networks one after the other, by the definition."""
    kept = parameters_to_vector(model.parameters()).detach().clone()
    model.eval()
    found = []
    for row in rows:
        vector_to_parameters(row, model.parameters())
        with torch.no_grad():
            found.append(model(images).softmax(-1))
    vector_to_parameters(kept, model.parameters())
    return torch.stack(found)


# --- what is reported ------------------------------------------------------------------------


def test_report_of_one_network_agrees_with_the_test_of_that_network(tmp_path, trained):
    found = report_of(tmp_path, trained, UncertaintyReport())
    for name in ("accuracy", "nll", "ece"):
        assert found[f"posterior/{name}"] == pytest.approx(found[f"test/{name}"], rel=1e-4)
    assert found["posterior/samples"] == 1
    assert not any("mutual" in name for name in found)
    data = HandwrittenDigits(source="digits")
    for name, images in {"test": data.test_set().images, "outliers": data.outlier_images()}.items():
        with torch.no_grad():
            expected = entropy(trained.eval()(images).softmax(-1).numpy(), axis=-1).mean()
        assert found[f"posterior/predictive_entropy_{name}"] == pytest.approx(expected, rel=1e-4)


def test_report_of_dropout_is_that_of_several_networks(tmp_path, trained):
    found = report_of(tmp_path, trained, UncertaintyReport("dropout", num_samples=30))
    assert found["posterior/samples"] == 30
    assert found["posterior/accuracy"] > 0.9
    assert found["posterior/mutual_information_test"] > 0.01
    assert {f"posterior/fpr95/{score}" for score in SCORES} <= set(found)


@pytest.mark.parametrize("num_samples", [4, 200])
def test_report_of_a_bank_is_that_of_its_samples(tmp_path, trained, num_samples):
    chains = {chain: perturbed_rows(trained, 6, chain) for chain in (0, 1)}
    folder = write_bank(tmp_path / "bank", trained, chains)
    data = HandwrittenDigits(source="digits", eval_batch_size=128, outliers="uniform")
    report = UncertaintyReport("bank", num_samples=num_samples, dirpath=str(folder))
    found = report_of(tmp_path, trained, report, data)

    bank = SampleBank(folder)
    rows = torch.cat([*chains.values()])
    if num_samples < len(bank):
        rows = torch.stack(
            [
                bank.layout.flatten({k: v[i] for k, v in bank.sample(num_samples).items()})
                for i in range(num_samples)
            ]
        )
    test, outliers = data.test_set(), data.outlier_images()
    probs = {
        "test": ensemble(trained, rows, test.images),
        "outliers": ensemble(trained, rows, outliers),
    }
    for name, value in summary(probs, test.labels).items():
        assert found[f"posterior/{name}"] == pytest.approx(float(value), rel=1e-3, abs=1e-5), name


def test_without_outliers_the_rest_is_reported(tmp_path, trained):
    data = HandwrittenDigits(source="digits", outliers="none")
    found = report_of(tmp_path, trained, UncertaintyReport(), data)
    assert "posterior/accuracy" in found
    assert not any("auroc" in name or "outliers" in name for name in found)


def test_model_is_left_as_it_was(tmp_path, trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    modes = [part.training for part in trained.modules()]
    report_of(tmp_path, trained, UncertaintyReport("dropout", num_samples=2))
    assert [part.training for part in trained.modules()] == modes
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name])


SCRIPT = """
import json, sys
from pathlib import Path
from lightning.pytorch import Trainer, seed_everything
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.module import Classifier
from recipes.mnist.report import UncertaintyReport

folder = Path(sys.argv[1])
seed_everything(1)
trainer = Trainer(
    accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
    default_root_dir=folder, callbacks=[UncertaintyReport()],
)
(found,) = trainer.test(Classifier(), HandwrittenDigits(source="digits"), verbose=False)
(folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(found))
"""


def test_of_two_processes_the_first_reports_on_all_images(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    subprocess.run(command, env=environment, cwd=root, check=True, timeout=200)

    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in (0, 1))
    assert not any("posterior" in name for name in second)
    # The test itself is divided between the processes, and synchronised.
    for name in ("accuracy", "nll", "ece"):
        assert first[f"posterior/{name}"] == pytest.approx(first[f"test/{name}"], rel=1e-4)


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_letters_are_told_from_real_digits(tmp_path):
    seed_everything(1, verbose=False)
    model, data = Classifier(optimizer="sgd", lr=0.1), HandwrittenDigits("mnist", root=REAL)
    trainer = quiet_trainer(tmp_path, callbacks=[UncertaintyReport()], limit_val_batches=0)
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    # One epoch of one network, measured: 0.84; guessing is 0.5.
    assert found["posterior/auroc/predictive_entropy"] > 0.75


# --- figures and files -----------------------------------------------------------------------


@pytest.mark.parametrize("chains", [1, 2])
@pytest.mark.parametrize("order", [1, -1], ids=["sampler-first", "report-first"])
def test_wandb_gets_figures_the_diagnostics_and_the_bank(tmp_path, chains, order):
    seed_everything(1, verbose=False)
    sampler = SGLDSampler(
        num_data="auto", burn_in=10, every_n_steps=2, network="network", chains=chains
    )
    logger = RecordingWandb(tmp_path)
    callbacks = [sampler, UncertaintyReport("bank")][::order]
    model = Classifier(hidden=[20], optimizer="sgd", lr=0.5)
    data = HandwrittenDigits(source="digits", batch_size=100)
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, logger=logger, max_epochs=3)
    trainer.fit(model, data)
    assert logger.figures == []
    (found,) = trainer.test(model, data, verbose=False)

    draws = (36 - 10) // 2
    assert found["posterior/samples"] == draws * chains
    # The callback's own ensemble is of as many samples.
    assert found["posterior/accuracy"] == pytest.approx(found["test/accuracy"], abs=0.02)
    assert found["posterior/nll"] == pytest.approx(found["test/nll"], rel=0.05)
    names = [name for name, *_ in logger.figures]
    assert names == ["posterior/reliability", "posterior/entropy"]
    assert all(type(figure) is Figure for *_, (figure,) in logger.figures)
    ((name, _, columns, rows),) = logger.tables
    assert name == "posterior/diagnostics"
    cells = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    assert set(cells) == {"weights", "function"}
    for space, numbers in cells.items():
        assert (numbers["num_chains"], numbers["num_draws"]) == (chains, draws)
        assert numbers["ess_min"] == pytest.approx(found[f"sgld/ess_{space}"])
        assert numbers["rhat_max"] == pytest.approx(found[f"sgld/rhat_{space}"])
    (artifact,) = logger.artifacts
    assert (artifact.name, artifact.type) == ("bank-x1", "sample-bank")
    folder = tmp_path / "project" / "x1" / "posterior"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(artifact.manifest.entries) == files


def test_bank_need_not_be_uploaded(tmp_path, trained):
    folder = write_bank(tmp_path / "bank", trained, {0: perturbed_rows(trained, 5, 0)})
    logger = RecordingWandb(tmp_path)
    report = UncertaintyReport("bank", dirpath=str(folder), upload=False)
    report_of(tmp_path, trained, report, logger=logger)
    assert logger.figures
    assert logger.artifacts == []
    assert logger.tables == []  # nobody has diagnosed the bank


def test_other_loggers_get_files_in_the_folder_of_the_run(tmp_path, trained):
    report_of(tmp_path, trained, UncertaintyReport(), logger=CSVLogger(tmp_path, "name", "version"))
    for name in ("reliability.png", "entropy.png"):
        assert (tmp_path / "name" / "version" / name).read_bytes()[1:4] == b"PNG"


def test_run_without_a_logger_leaves_no_files(tmp_path, trained):
    report_of(tmp_path, trained, UncertaintyReport())
    assert list(tmp_path.iterdir()) == []


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "laplace"}, "source must be 'network', .* or 'distilled', got 'laplace'"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"dirpath": "x"}, "dirpath would have no effect: .*source is 'network'; got 'x'"),
    ],
    ids=["source", "number", "dirpath"],
)
def test_arguments_that_make_no_sense_are_rejected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        UncertaintyReport(**kwargs)


def test_what_cannot_be_reported_is_explained(tmp_path, trained):
    with pytest.raises(ValueError, match="no SGLDSampler among the callbacks.*dirpath"):
        report_of(tmp_path, trained, UncertaintyReport("bank"))
    with pytest.raises(FileNotFoundError):
        report_of(tmp_path, trained, UncertaintyReport("bank", dirpath=str(tmp_path / "none")))
    empty = write_bank(tmp_path / "empty", trained, {0: torch.empty(0, 2260)})
    with pytest.raises(ValueError, match=r"empty has no sample yet\. Train for more than burn_in"):
        report_of(tmp_path, trained, UncertaintyReport("bank", dirpath=str(empty)))
    other = Classifier((1, 8, 8), 10, hidden=[29])
    foreign = write_bank(tmp_path / "other", other, {0: perturbed_rows(other, 2, 0)})
    with pytest.raises(ValueError, match=r"network\.1\.weight"):
        report_of(tmp_path, trained, UncertaintyReport("bank", dirpath=str(foreign)))
    with pytest.raises(
        TypeError, match="about a Classifier on HandwrittenDigits, got BoringModel and NoneType"
    ):
        quiet_trainer(tmp_path, callbacks=[UncertaintyReport()]).test(BoringModel(), verbose=False)
    plain = Classifier((1, 8, 8), 10)
    with pytest.raises(ValueError, match="needs a network with dropout"):
        report_of(tmp_path, plain, UncertaintyReport("dropout"))


def test_nothing_is_reported_while_fitting_or_in_a_trial_run(tmp_path, trained):
    report = UncertaintyReport("dropout")
    data = HandwrittenDigits(source="digits")
    trainer = quiet_trainer(tmp_path, callbacks=[report], limit_train_batches=1)
    trainer.fit(Classifier(), data)
    assert not any("posterior" in name for name in trainer.callback_metrics)
    found = report_of(tmp_path, trained, report, fast_dev_run=True)
    assert not any("posterior" in name for name in found)
