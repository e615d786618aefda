"""Gaussians fitted to samples have the moments of the samples, and are stored safely."""

import json

import numpy
import pytest
import torch
from safetensors.torch import load_file

from lightning_revflip.posterior import DiagonalGaussian, LowRankGaussian, moments
from tests.helpers.row_samples import RowSamples, correlated

ROWS = correlated(count=30, size=12)
EXACT = ROWS.double().numpy()


def matrix(samples):
    """Samples by name, shape (n, *shape), as rows."""
    return torch.cat([value.flatten(1) for value in samples.values()], 1)


def covariance(gaussian):
    """The covariance of a LowRankGaussian, by its definition."""
    scaled = gaussian.components.double() * gaussian.component_std.double().unsqueeze(1)
    residual = gaussian.residual_std
    diagonal = torch.zeros(len(gaussian.mean)) if residual is None else residual.double().square()
    return (scaled.T @ scaled + diagonal.diag()).numpy()


@pytest.fixture(params=[1, 7, 30], ids=lambda most: f"chunks_of_{most}")
def samples(request):
    return RowSamples(ROWS, request.param)


# --- fitting -------------------------------------------------------------------------------------


def test_mean_and_variance_are_those_of_all_samples(samples):
    gaussian = DiagonalGaussian.fit(samples)
    numpy.testing.assert_allclose(gaussian.mean, EXACT.mean(0), rtol=1e-6)
    numpy.testing.assert_allclose(gaussian.std, EXACT.std(0, ddof=1), rtol=1e-6)
    assert len(gaussian) == 30
    assert samples.passes == 1


def test_components_are_the_right_singular_vectors(samples):
    gaussian = LowRankGaussian.fit(samples, rank=4)
    centred = EXACT - EXACT.mean(0)
    _, singular, right = numpy.linalg.svd(centred, full_matrices=False)
    numpy.testing.assert_allclose(gaussian.component_std, singular[:4] / 29**0.5, rtol=1e-6)
    overlap = gaussian.components.double().numpy() @ right[:4].T
    numpy.testing.assert_allclose(numpy.abs(overlap), numpy.eye(4), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_marginal_variances_are_those_of_the_samples(dtype):
    gaussian = LowRankGaussian.fit(RowSamples(ROWS), 4, "diagonal", dtype=dtype)
    expected = EXACT.var(0, ddof=1)
    # Rounding a component may put its own variance above that of the samples, where no residual
    # can take it away again; bfloat16 has 8 bits.
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    numpy.testing.assert_allclose(covariance(gaussian).diagonal(), expected, rtol=tolerance)


def test_all_components_alone_are_the_covariance_of_the_samples():
    few = ROWS[:8]  # fewer samples than parameters
    gaussian = LowRankGaussian.fit(RowSamples(few, 3), rank=7)
    expected = numpy.cov(few.double().numpy(), rowvar=False)
    numpy.testing.assert_allclose(covariance(gaussian), expected, atol=1e-5 * expected.max())


def test_samples_that_vary_in_fewer_directions_have_fewer_components():
    rows = torch.randn(6, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(5)
    gaussian = LowRankGaussian.fit(RowSamples(rows), rank=3)
    assert gaussian.component_std[0] > 0
    assert gaussian.component_std[1:].tolist() == [0, 0]
    assert gaussian.components.isfinite().all()
    assert LowRankGaussian.fit(RowSamples(torch.ones(4, 5)), 2).sample(2)["bias"].tolist() == [
        [1],
        [1],
    ]


def test_swag_has_the_deviations_from_the_running_mean(samples):
    gaussian = LowRankGaussian.swag(samples, rank=5)
    running = EXACT.cumsum(0) / numpy.arange(1, 31)[:, None]
    deviations = (EXACT - running)[-5:]
    low_rank = deviations.T @ deviations / (2 * (5 - 1))
    expected = low_rank + numpy.diag(EXACT.var(0)) / 2
    numpy.testing.assert_allclose(covariance(gaussian), expected, atol=1e-6 * expected.max())
    numpy.testing.assert_allclose(gaussian.mean, EXACT.mean(0), rtol=1e-6)


def test_chunks_take_a_bounded_memory(monkeypatch):
    monkeypatch.setattr(moments, "_CHUNK_BYTES", 8 * 12 * 4)  # 4 rows in float64
    sizes = [len(chunk) for chunk in moments.wide_chunks(RowSamples(ROWS))]
    assert sizes == [4] * 7 + [2]
    gaussian = LowRankGaussian.fit(RowSamples(ROWS), rank=11)
    expected = numpy.cov(EXACT, rowvar=False)
    numpy.testing.assert_allclose(covariance(gaussian), expected, atol=1e-5 * expected.max())


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        (lambda rows: LowRankGaussian.fit(rows, 0), "rank must be from 1 to 29, .* got 0"),
        (lambda rows: LowRankGaussian.fit(rows, 30), "rank must be from 1 to 29, .* got 30"),
        (lambda rows: LowRankGaussian.swag(rows, 1), "rank must be from 2 to 29, .* got 1"),
        (lambda rows: LowRankGaussian.fit(rows, 3, "full"), "residual must be 'diagonal' or None"),
        (lambda rows: LowRankGaussian.fit(rows, 3, dtype=torch.int8), "got torch.int8"),
        (lambda rows: DiagonalGaussian.fit(RowSamples(ROWS[:1])), "at least 2 samples, got 1"),
        (lambda rows: LowRankGaussian.fit(RowSamples(ROWS[:1]), 1), "at least 2 samples, got 1"),
    ],
    ids=["rank_0", "rank_K", "swag_rank_1", "residual", "dtype", "one_sample", "one_sample_low"],
)
def test_what_cannot_be_fitted_is_refused(fit, message):
    with pytest.raises(ValueError, match=message):
        fit(RowSamples(ROWS))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("fit", [DiagonalGaussian.fit, lambda rows: LowRankGaussian.swag(rows, 3)])
def test_samples_that_diverged_are_refused_by_name(fit, value):
    rows = ROWS.clone()
    rows[20, -1] = value
    with pytest.raises(ValueError, match="samples of bias have values that are not finite"):
        fit(RowSamples(rows, 7))


# --- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["diagonal", None])
def test_samples_have_the_mean_and_covariance_of_the_distribution(residual):
    gaussian = LowRankGaussian.fit(RowSamples(ROWS), 3, residual)
    n = 20_000
    drawn = matrix(gaussian.sample(n, torch.Generator().manual_seed(0))).double().numpy()
    expected = covariance(gaussian)
    # A variance is known within sqrt(2 / n) = 1 %, a mean within std / sqrt(n); 5 times that.
    numpy.testing.assert_allclose(numpy.cov(drawn.T), expected, atol=0.05 * expected.max())
    error = numpy.abs(drawn.mean(0) - gaussian.mean.numpy())
    assert (error < 5 * numpy.sqrt(expected.diagonal() / n) + 1e-5).all()


def test_a_diagonal_gaussian_draws_independent_parameters():
    gaussian = DiagonalGaussian.fit(RowSamples(ROWS))
    n = 20_000
    drawn = matrix(gaussian.sample(n, torch.Generator().manual_seed(0)))
    z = (drawn - gaussian.mean) / gaussian.std
    # Entries of the covariance are known within 1 / sqrt(n) or sqrt(2 / n); 5 times that.
    numpy.testing.assert_allclose(numpy.cov(z.T), numpy.eye(12), atol=0.05)


@pytest.mark.parametrize("chunk_size", [1, 4, 10, 20])
def test_samples_do_not_depend_on_the_size_of_chunks(chunk_size):
    gaussian = LowRankGaussian.fit(RowSamples(ROWS), 3)
    whole = gaussian.sample(10, torch.Generator().manual_seed(3))
    parts = list(gaussian.sample_chunks(10, chunk_size, torch.Generator().manual_seed(3)))
    assert max(len(part["bias"]) for part in parts) == min(chunk_size, 10)
    torch.testing.assert_close(torch.cat([matrix(part) for part in parts]), matrix(whole))


def test_without_a_generator_the_global_one_is_used():
    gaussian = DiagonalGaussian.fit(RowSamples(ROWS))
    torch.manual_seed(1)
    first, second = matrix(gaussian.sample(2))
    torch.manual_seed(1)
    assert matrix(gaussian.sample(1))[0].equal(first)
    assert not first.equal(second)


def test_a_sample_has_names_shapes_and_float32():
    sample = LowRankGaussian.fit(RowSamples(ROWS), 3, dtype=torch.float16).sample(2)
    assert {name: tuple(value.shape) for name, value in sample.items()} == {
        "weight": (2, 11),
        "bias": (2, 1),
    }
    assert {value.dtype for value in sample.values()} == {torch.float32}


def test_no_samples_and_empty_chunks_are_refused():
    gaussian = DiagonalGaussian.fit(RowSamples(ROWS))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        gaussian.sample(0)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        next(gaussian.sample_chunks(0, 3))
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        next(gaussian.sample_chunks(3, 0))


# --- storage -------------------------------------------------------------------------------------

FITTED = {
    "diagonal": lambda: DiagonalGaussian.fit(RowSamples(ROWS)),
    "low_rank": lambda: LowRankGaussian.fit(RowSamples(ROWS), 3, "diagonal"),
    "float16": lambda: LowRankGaussian.fit(RowSamples(ROWS), 3, "diagonal", torch.float16),
    "no_residual": lambda: LowRankGaussian.fit(RowSamples(ROWS), 3),
}


@pytest.mark.parametrize("name", FITTED)
def test_loading_gives_what_was_saved(tmp_path, name):
    gaussian = FITTED[name]()
    gaussian.save(tmp_path / "fitted")
    loaded = type(gaussian).load(tmp_path / "fitted")
    assert loaded.layout == gaussian.layout
    assert repr(loaded) == repr(gaussian)
    drawn = [matrix(one.sample(3, torch.Generator().manual_seed(0))) for one in (gaussian, loaded)]
    assert drawn[0].equal(drawn[1])


@pytest.mark.parametrize("name", FITTED)
def test_nbytes_are_those_of_the_numbers_on_disk(tmp_path, name):
    gaussian = FITTED[name]()
    gaussian.save(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert gaussian.nbytes == sum(tensor.nbytes for tensor in load_file(file).values())
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == header + gaussian.nbytes


def test_saving_again_replaces_the_earlier_one(tmp_path):
    LowRankGaussian.fit(RowSamples(ROWS), 3).save(tmp_path)
    LowRankGaussian.fit(RowSamples(ROWS), 5).save(tmp_path)
    assert LowRankGaussian.load(tmp_path).rank == 5
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_what_was_saved_before(tmp_path, monkeypatch):
    LowRankGaussian.fit(RowSamples(ROWS), 3).save(tmp_path)
    before = sorted(tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        LowRankGaussian.fit(RowSamples(ROWS), 5).save(tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    assert LowRankGaussian.load(tmp_path).rank == 3


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="holds other files"):
        DiagonalGaussian.fit(RowSamples(ROWS)).save(tmp_path)


def test_a_config_of_something_else_is_no_licence_to_write(tmp_path):
    others = {"config.json": "{}", "notes.tmp": "", "tensors-mine.safetensors": ""}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError, match="holds other files"):
        DiagonalGaussian.fit(RowSamples(ROWS)).save(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == others


def damage_tensors(folder):
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def cut_tensors(folder):
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])


def remove_tensors(folder):
    (file,) = folder.glob("*.safetensors")
    file.unlink()


def cut_config(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[:-5])


def change_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage_tensors, "is damaged: its checksum"),
        (cut_tensors, "is damaged: its checksum"),
        (remove_tensors, "is damaged: tensors-.* is missing"),
        (cut_config, "is damaged: it is not JSON"),
        (change_config(format="other"), "was not written by save"),
        (change_config(version=2), "has version 2 of the format"),
        (change_config(kind="LowRankGaussian"), "holds a LowRankGaussian, not a DiagonalGaussian"),
    ],
    ids=["flipped_bit", "cut", "removed", "cut_config", "foreign", "version", "kind"],
)
def test_damaged_and_foreign_folders_are_refused(tmp_path, change, message):
    DiagonalGaussian.fit(RowSamples(ROWS)).save(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        DiagonalGaussian.load(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no LowRankGaussian to load"):
        LowRankGaussian.load(tmp_path / "nothing")


def test_shapes_that_do_not_fit_are_refused():
    layout = RowSamples(ROWS).layout
    with pytest.raises(ValueError, match=r"std must have the shape \(12,\), got \(3,\)"):
        DiagonalGaussian(layout, torch.zeros(12), torch.ones(3), num_samples=2)
