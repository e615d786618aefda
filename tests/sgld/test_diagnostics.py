"""Effective sample size, split R-hat and autocorrelation against arviz and known chains."""

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lightning_revflip.sgld import diagnostics
from lightning_revflip.sgld.diagnostics import (
    autocorrelation,
    diagnose,
    effective_sample_size,
    probe_weights,
    split_rhat,
)
from lightning_revflip.sgld.figures import autocorrelation_figure, trace_figure


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def autoregressive(phi: float, *shape: int) -> torch.Tensor:
    """AR(1) chains that start in their stationary distribution, a standard normal."""
    draws = normal(*shape)
    for t in range(1, shape[1]):
        draws[:, t] = phi * draws[:, t - 1] + math.sqrt(1 - phi**2) * draws[:, t]
    return draws


CHAINS = {
    "independent": normal(4, 200, 20),
    "float32": normal(4, 200, 20).float(),
    "slow": autoregressive(0.95, 4, 200, 20),
    "alternating": autoregressive(-0.7, 3, 201, 20),
    "drifting": autoregressive(0.999, 2, 300, 20),
    "apart": normal(4, 100, 20) + torch.arange(4.0)[:, None, None],
    "of_different_width": normal(4, 100, 20) * torch.tensor([1, 1, 1, 5])[:, None, None],
    "with_ties": normal(4, 101, 20).round(),
    "binary": (normal(4, 101, 20) > 0).double(),
    "standing_still_apart": torch.arange(4.0)[:, None, None].expand(4, 30, 2),
    "odd": normal(2, 51, 20),
    **{f"of_{length}_draws": normal(2, length, 100) for length in range(4, 14)},
}
ONE_CHAIN = {
    "one_slow": autoregressive(0.9, 1, 200, 20),
    "one_of_4_draws": normal(1, 4, 20),
}


@pytest.mark.parametrize("method", ["bulk", "mean"])
@pytest.mark.parametrize("name", [*CHAINS, *ONE_CHAIN])
def test_effective_sample_size_is_that_of_arviz(name, method):
    pytest.importorskip("arviz_stats")
    draws = (CHAINS | ONE_CHAIN)[name]
    ours = effective_sample_size(draws, method, backend="torch")
    torch.testing.assert_close(
        ours, effective_sample_size(draws, method, backend="arviz"), rtol=1e-9, atol=0
    )
    assert ours.isfinite().all()


@pytest.mark.parametrize("name", CHAINS)
def test_rhat_is_that_of_arviz(name):
    pytest.importorskip("arviz_stats")
    draws = CHAINS[name]
    theirs = split_rhat(draws, backend="arviz")
    torch.testing.assert_close(split_rhat(draws, backend="torch"), theirs, rtol=1e-9, atol=0)


def test_autocorrelation_is_that_of_arviz():
    base = pytest.importorskip("arviz_stats.base")
    draws = CHAINS["slow"]
    theirs = torch.as_tensor(base.array_stats.autocorr(draws.numpy(), axis=1))
    torch.testing.assert_close(autocorrelation(draws), theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(autocorrelation(draws[..., 0], 7), theirs[:, :8, 0])


def test_rhat_of_one_chain_compares_its_halves():
    draws = ONE_CHAIN["one_slow"][0, :, 0].numpy()

    def rhat(values: np.ndarray) -> float:
        scores = stats.norm.ppf((stats.rankdata(values) - 3 / 8) / (200 + 1 / 4)).reshape(2, 100)
        within = scores.var(axis=1, ddof=1).mean()
        between = 100 * scores.mean(axis=1).var(ddof=1)
        return math.sqrt((99 / 100 * within + between / 100) / within)

    expected = max(rhat(draws), rhat(abs(draws - np.median(draws))))
    for backend in (None, "torch"):
        found = split_rhat(torch.as_tensor(draws)[None], backend=backend)
        assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("phi", [-0.5, 0.0, 0.5, 0.9])
def test_effective_sample_size_of_an_autoregressive_chain(phi):
    # For the mean of AR(1) it is S (1 - phi) / (1 + phi). Estimates of 4 x 2,000 draws spread by up
    # to 13 %, so the mean of 200 is known to 1 %; Geyer's truncation adds a bias of up to 4 %.
    draws = autoregressive(phi, 4, 2000, 200)
    exact = 8000 * (1 - phi) / (1 + phi)
    for method in ("bulk", "mean"):
        found = effective_sample_size(draws, method, backend="torch")
        assert found.mean().item() == pytest.approx(exact, rel=0.06)


def test_effective_sample_size_tells_the_error_of_a_mean():
    # Means spread as sd / sqrt(ESS). The spread of 1,000 means is known to 2.2 % (one standard
    # error), the prediction to 1 %.
    draws = autoregressive(0.8, 4, 1000, 1000)
    ess = effective_sample_size(draws, "mean", backend="torch")
    predicted = (draws.flatten(0, 1).var(0) / ess).mean().sqrt()
    observed = draws.mean((0, 1)).square().mean().sqrt()
    assert observed.item() == pytest.approx(predicted.item(), rel=0.08)


def test_autocorrelation_of_an_autoregressive_chain():
    found = autocorrelation(autoregressive(0.8, 4, 2000, 50), max_lag=5).mean((0, 2))
    # The mean of 200 chains is known to 0.004; centring each at its own mean takes off 0.006.
    torch.testing.assert_close(found, 0.8 ** torch.arange(6.0).double(), rtol=0, atol=0.015)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(4, 40), st.integers(0, 1000), st.floats(0.01, 100))
def test_rank_statistics_do_not_change_with_a_monotone_map(chains, length, seed, scale):
    draws = normal(chains, length, 3, seed=seed)
    bulk = effective_sample_size(draws, backend="torch")
    assert torch.equal(effective_sample_size((draws * scale).exp(), backend="torch"), bulk)
    mean = effective_sample_size(draws, "mean", backend="torch")
    moved = effective_sample_size(scale * draws + 1, "mean", backend="torch")
    torch.testing.assert_close(moved, mean, rtol=1e-6, atol=0)
    assert (bulk > 0).all()
    assert (bulk <= chains * length * math.log10(chains * length)).all()


@pytest.mark.parametrize("backend", ["arviz", "torch"])
def test_constant_quantities_are_told_apart_from_others(backend):
    if backend == "arviz":
        pytest.importorskip("arviz_stats")
    draws = CHAINS["independent"].clone()
    draws[..., 3] = 0.1
    for values in (
        effective_sample_size(draws, backend=backend),
        effective_sample_size(draws, "mean", backend=backend),
        split_rhat(draws, backend=backend),
    ):
        assert values.isnan().nonzero().flatten().tolist() == [3]
    found = diagnose(draws, backend)
    assert (found.num_quantities, found.num_constant) == (19, 1)
    assert math.isfinite(found.ess_min)
    assert autocorrelation(draws)[..., 3].isnan().all()
    nothing = diagnose(draws[..., 3], backend)
    assert math.isnan(nothing.ess_min)
    assert "No quantity changed" in nothing.warnings()[0]


def test_the_shape_without_quantities_is_that_of_one():
    draws = CHAINS["slow"]
    for function in (effective_sample_size, split_rhat):
        single = function(draws[..., 0], backend="torch")
        assert single.shape == ()
        assert single == function(draws, backend="torch")[0]


@pytest.mark.parametrize("function", [effective_sample_size, split_rhat, autocorrelation, diagnose])
def test_bad_draws_are_refused(function):
    with pytest.raises(ValueError, match="At least 4 draws of each chain are needed, got 3"):
        function(normal(2, 3))
    with pytest.raises(ValueError, match=r"shape \(chains, draws\).* got shape \(10,\)"):
        function(normal(10))
    with pytest.raises(ValueError, match=r"got shape \(2, 10, 0\)"):
        function(normal(2, 10, 0))
    draws = normal(2, 10, 5)
    draws[1, 3, 2] = math.nan
    with pytest.raises(ValueError, match="1 of 5 quantities .* the first is number 2"):
        function(draws)


def test_bad_arguments_are_refused(monkeypatch):
    draws = normal(2, 10)
    with pytest.raises(ValueError, match="method must be 'bulk' or 'mean', got 'tail'"):
        effective_sample_size(draws, "tail")
    with pytest.raises(ValueError, match="backend must be"):
        split_rhat(draws, "numpy")
    with pytest.raises(ValueError, match="max_lag must be from 0 to 9.* got 10"):
        autocorrelation(draws, 10)
    monkeypatch.setattr(diagnostics, "find_spec", lambda name: None)
    assert effective_sample_size(draws).isfinite()
    with pytest.raises(ImportError, match="pip install arviz-stats"):
        effective_sample_size(draws, backend="arviz")


def test_draws_are_left_as_they_were():
    draws = normal(2, 10, 3).float().requires_grad_()
    before = draws.detach().clone()
    assert diagnose(draws, "torch").warnings()
    assert torch.equal(draws, before)


@pytest.mark.parametrize(
    ("name", "warnings"),
    [
        ("independent", []),
        ("apart", ["tell as much as", "chains have not seen the same distribution"]),
        ("drifting", ["tell as much as", "chains have not seen the same distribution"]),
        ("one_slow", ["tell as much as", "halves of the chain", "One chain cannot tell"]),
    ],
)
def test_warnings_say_what_is_wrong(name, warnings):
    found = diagnose((CHAINS | ONE_CHAIN)[name])
    assert len(found.warnings()) == len(warnings)
    for warning, words in zip(found.warnings(), warnings, strict=True):
        assert words in warning
        assert warning in str(found)


def test_diagnostics_are_those_of_the_quantities():
    draws = CHAINS["slow"]
    found = diagnose(draws, "torch")
    ess, rhat = effective_sample_size(draws, backend="torch"), split_rhat(draws, "torch")
    assert (found.num_chains, found.num_draws, found.num_quantities) == (4, 200, 20)
    assert (found.ess_min, found.rhat_max) == (ess.min(), rhat.max())
    assert found.ess_median == pytest.approx(np.median(ess))
    assert found.rhat_median == pytest.approx(np.median(rhat))


def test_a_thousand_quantities_take_no_loop_over_them():
    draws = normal(4, 500, 1000)
    begin = time.process_time()
    effective_sample_size(draws, backend="torch")
    # 0.3 s on one thread; the rest is room for a busy machine.
    assert time.process_time() - begin < 3


# --- weight space ----------------------------------------------------------------------------


def test_probes_are_weights_and_unit_projections_of_all_weights():
    probe = probe_weights(torch.eye(50), num_coordinates=5, num_projections=7, seed=3)
    coordinates, directions = probe[:, :5], probe[:, 5:]
    assert coordinates.sum(0).tolist() == [1] * 5
    assert coordinates.argmax(0).tolist() == sorted(set(coordinates.argmax(0).tolist()))
    torch.testing.assert_close(directions.norm(dim=0), torch.ones(7).double(), rtol=1e-6, atol=0)
    rows = normal(6, 50).float()
    expected = torch.cat([rows.double() @ coordinates, rows.double() @ directions], 1)
    torch.testing.assert_close(probe_weights(rows, 5, 7, seed=3), expected, rtol=0, atol=1e-5)


def test_probes_of_parts_are_those_of_the_whole():
    rows = normal(9, 30).half()
    parts = torch.cat([probe_weights(part) for part in rows.split(4)])
    torch.testing.assert_close(parts, probe_weights(rows), rtol=1e-5, atol=1e-6)
    assert probe_weights(rows).shape == (9, 32)
    assert probe_weights(rows[:, :3], num_projections=0).shape == (9, 3)


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match=r"rows of shape \(samples, weights\).*\(5,\)"):
        probe_weights(normal(5))
    with pytest.raises(ValueError, match="at least 0, got 16 and -1"):
        probe_weights(normal(5, 5), num_projections=-1)


# --- figures ---------------------------------------------------------------------------------


def test_figures_show_the_draws_of_each_chain():
    pytest.importorskip("matplotlib")
    draws = normal(3, 40, 2)
    figure = trace_figure(draws, ["bias", "weight"], steps=range(0, 400, 10))
    assert [axes.get_ylabel() for axes in figure.axes] == ["bias", "weight"]
    for quantity, axes in enumerate(figure.axes):
        for chain, line in enumerate(axes.get_lines()):
            assert list(line.get_xdata()) == list(range(0, 400, 10))
            np.testing.assert_array_equal(line.get_ydata(), draws[chain, :, quantity])
    figure = autocorrelation_figure(draws, max_lag=10)
    lines = figure.axes[1].get_lines()[:3]
    shown = torch.stack([torch.as_tensor(line.get_ydata()) for line in lines])
    torch.testing.assert_close(shown, autocorrelation(draws, 10)[..., 1])
    assert len(trace_figure(draws[..., 0]).axes) == 1
    assert len(autocorrelation_figure(draws[..., 0]).axes[0].get_lines()[0].get_xdata()) == 40


def test_figures_refuse_what_does_not_fit():
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="1 to 12 quantities, got shape"):
        trace_figure(normal(2, 10, 13))
    with pytest.raises(ValueError, match="a name for each of 2 quantities, got 1"):
        autocorrelation_figure(normal(2, 10, 2), ["one"])
    with pytest.raises(ValueError, match="a step for each of 10 draws, got 3"):
        trace_figure(normal(2, 10), steps=[1, 2, 3])
