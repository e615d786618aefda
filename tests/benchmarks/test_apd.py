"""The benchmarks of APD measure what they say."""

import dataclasses
from functools import partial

import pytest
import torch

from benchmarks import apd, apd_bank, apd_modes
from lightning_revflip.posterior import SampleBank
from lightning_revflip.posterior.layout import Layout
from lightning_revflip.posterior.writer import ChainWriter
from recipes.mnist.module import Classifier


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A bank of two chains, whose networks predict at random."""
    folder = tmp_path_factory.mktemp("bank")
    torch.manual_seed(0)
    module = Classifier(**apd_bank.NETWORK)
    layout = Layout.of_parameters(module)
    for chain in range(2):
        start = layout.flatten(dict(module.named_parameters())) + 0.05 * torch.randn(layout.numel)
        with ChainWriter(folder, layout, chain=chain, max_samples=None) as writer:
            for step in range(10):
                writer.append(step, start + 0.01 * torch.randn(layout.numel))
    return folder


@pytest.fixture(scope="module")
def images():
    random = torch.Generator().manual_seed(0)
    test, outliers = (torch.rand(30, 1, 28, 28, generator=random) for _ in range(2))
    return apd_bank.Images(test, torch.arange(30) % 10, outliers)


@pytest.fixture
def few_steps(monkeypatch):
    """Generators that are hardly trained."""
    for module in (apd_bank, apd_modes):
        monkeypatch.setattr(module, "distil", partial(module.distil, steps=2))


def uneven(networks, seed=0):
    """Predictions of random networks."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, networks, 30, 10, generator=random)
    return apd_bank.Probabilities(*logits.softmax(-1))


# --- banks and what takes their place ------------------------------------------------------------


def test_all_candidates_of_a_bank_are_compared(few_steps, path, images):
    rows = apd_bank.compare(path, None, images, ranks=(2, 4), raw=False)
    names = [(row["posterior"], row.get("rank")) for row in rows]
    assert len(set(names)) == len(names)
    for rank in (2, 4):
        expected = ("low-rank Gaussian", "low-rank Gaussian, no residual", apd_bank.WHITENED)
        assert {(name, rank) for name in (*expected, "bank, thinned")} <= set(names)
    by_name = dict(zip(names, rows, strict=True))
    assert by_name["bank", None]["correlation"] == pytest.approx(1)
    assert by_name["mean weights", None]["networks"] == 1
    assert by_name["bank", None]["networks"] == 10  # 20 samples in float16
    for rank in (2, 4):
        thinned, distilled = (by_name[name, rank] for name in ("bank, thinned", apd_bank.WHITENED))
        half = 2 * SampleBank(path).layout.numel
        assert distilled["bytes"] - half < thinned["bytes"] <= distilled["bytes"]
    for posterior, *_ in names:
        assert posterior in {row[0] for row in table_rows(apd_bank.table(with_run(rows)))}


def with_run(rows):
    return [{"run": "sgld", **row} for row in rows]


def table_rows(table):
    """Name and rank of each row."""
    return list(zip(table.columns[1]._cells, table.columns[2]._cells, strict=True))


def test_swag_is_for_one_chain(path):
    def names(bank):
        return {each.name for each in apd_bank.candidates(bank, (2,), False, 0)}

    assert "SWAG" not in names(SampleBank(path))
    assert "SWAG" in names(SampleBank(path, chains=[0]))


def test_raw_distillation_is_that_of_the_paper(monkeypatch, path):
    called = []
    monkeypatch.setattr(apd_bank, "distil", lambda *given, **named: called.append((given, named)))
    apd_bank.distil_raw(SampleBank(path), seconds=0.0)
    (_, rank), settings = called[-1]
    assert rank is None
    assert {key: settings[key] for key in ("critic_steps", "gradient_penalty", "r1", "lr")} == {
        "critic_steps": 5,
        "gradient_penalty": 10,
        "r1": 0,
        "lr": 1e-4,
    }


def test_model_variance_is_that_of_the_probabilities():
    probs = torch.tensor([[[0.2, 0.8]], [[0.6, 0.4]]])
    found = apd_bank.Probabilities(probs, probs).model_variance
    assert found.tolist() == pytest.approx([0.08])  # of both classes, unbiased


def test_figures_compare_with_the_bank(images):
    whole, other = uneven(20), uneven(20, seed=1)
    assert apd_bank.figures(whole, images, whole)["correlation"] == pytest.approx(1)
    assert abs(apd_bank.figures(other, images, whole)["correlation"]) < 0.6
    one = apd_bank.figures(whole.some(torch.tensor([0])), images, whole)
    assert "correlation" not in one
    assert "auroc_mutual_information" not in one


def test_halves_of_a_bank_spread_around_it(images):
    whole = uneven(200)
    found, figures = apd_bank.spread(whole, images), apd_bank.figures(whole, images, whole)
    for key in ("nll", "auroc_entropy"):
        each = found[f"halves_{key}"]
        assert each["std"] > 0
        assert each["mean"] == pytest.approx(figures[key], abs=4 * each["std"])


def test_acceptance_is_by_the_spread_of_the_halves():
    bank = {"auroc_entropy": 0.9, "auroc_mutual_information": 0.95}
    bank["halves_accuracy"] = {"mean": 0.97, "std": 0.001}
    bank["halves_nll"] = {"mean": 0.1, "std": 0.01}
    good = {"networks": 25, "seconds": 60, "accuracy": 0.9681, "nll": 0.119, "correlation": 0.95}
    good |= {"auroc_entropy": 0.891, "auroc_mutual_information": 0.96}
    assert all(apd_bank.acceptance([bank, good]).values())
    worse = {"networks": 26, "seconds": 61, "accuracy": 0.967, "nll": 0.121, "correlation": 0.94}
    worse |= {"auroc_entropy": 0.889, "auroc_mutual_information": 0.93}
    assert not any(apd_bank.acceptance([bank, worse]).values())


# --- several modes -------------------------------------------------------------------------------


def test_modes_are_covered_where_samples_are():
    centres = torch.tensor([[0.0, 0], [4, 0], [0, 4], [4, 4]])
    samples = centres[torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1, 1])]
    samples = torch.cat([samples, torch.full((2, 2), 2.0) + 0.1])  # 2.7 from the nearest
    found = apd_modes.in_plane(samples, samples, centres)
    assert (found["covered"], found["modes"], found["sliced_wasserstein"]) == (2, 4, 0)
    assert found["at_modes"] == pytest.approx(10 / 12)


@pytest.mark.parametrize("modes", [2, 8])
def test_samples_of_a_mixture_are_at_its_modes(modes):
    case = apd_modes.mixture(modes, seed=0)
    assert case.train.shape == case.held_out.shape == (1000, 1000)
    plane = apd_modes.plane_through(case.centres)
    assert plane.shape == (1000, modes - 1)
    found = apd_modes.in_plane(
        *(each @ plane for each in (case.train, case.held_out, case.centres))
    )
    assert (found["covered"], found["at_modes"]) == (modes, 1)


def test_a_gaussian_misses_the_modes_of_a_ring_and_its_own_samples_do_not(few_steps):
    found, points = apd_modes.compare(apd_modes.ring(seed=0))
    rows = {row["method"]: row for row in found}
    assert list(rows) == list(apd_modes.METHODS)
    assert rows["samples"]["covered"] == rows["Gaussian mixture"]["covered"] == 8
    assert rows["low-rank Gaussian"]["at_modes"] < 0.6
    far, near = (
        rows[name]["sliced_wasserstein"] for name in ("low-rank Gaussian", "Gaussian mixture")
    )
    assert near < far / 2
    assert apd_modes.table(found).row_count == len(rows)
    line = {method: samples[:, :1] for method, samples in points.items()}  # is left out
    titles = [axes.get_title() for axes in apd_modes.figure({"ring": points, "two": line}).axes]
    assert titles == list(apd_modes.METHODS)


def test_each_chain_is_a_mode_and_every_fifth_sample_is_held_out(path):
    case = apd_modes.chains(path)
    assert (len(case.train), len(case.held_out), len(case.centres)) == (16, 4, 2)
    first = SampleBank(path, chains=[0]).rows()
    assert case.held_out[:2].equal(first[[4, 9]])
    torch.testing.assert_close(case.centres[0], first[[0, 1, 2, 3, 5, 6, 7, 8]].mean(0))


def test_methods_fit_a_bank_of_chains(few_steps, path):
    case = dataclasses.replace(apd_modes.chains(path), rank=3)
    rows, _ = apd_modes.compare(case)
    assert all(torch.tensor(row["sliced_wasserstein"]).isfinite() for row in rows)


def test_an_unknown_part_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["apd", "modez"])
    with pytest.raises(SystemExit):
        apd.main()
    assert "invalid choice: 'modez'" in capsys.readouterr().err
