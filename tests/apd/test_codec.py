"""Codecs make whitened codes of samples, and samples of codes."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_revflip.apd import Codec, IdentityCodec, ParameterCodec, encode_all
from lightning_revflip.posterior import Layout, LowRankGaussian
from tests.helpers.properties import examples
from tests.helpers.row_samples import RowSamples, correlated

ROWS = correlated(count=30, size=12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- encoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_codes_of_the_fitted_samples_are_white(dtype):
    codec = ParameterCodec.fit(RowSamples(ROWS, 7), rank=6, dtype=dtype)
    codes = encode_all(codec, RowSamples(ROWS), chunk_size=4)
    assert codes.shape == (30, 6)
    # The last component varies 1000 times less than the first, whose rounding falls on it, too.
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    numpy.testing.assert_allclose(codes.mean(0), numpy.zeros(6), atol=1e-4)
    numpy.testing.assert_allclose(numpy.cov(codes.double().T), numpy.eye(6), atol=tolerance)


def test_codes_are_the_left_singular_vectors():
    codec = ParameterCodec.fit(RowSamples(ROWS), rank=4, dtype=torch.float32)
    exact = ROWS.double().numpy()
    left, _, _ = numpy.linalg.svd(exact - exact.mean(0), full_matrices=False)
    overlap = codec.encode(ROWS).double().numpy().T @ left[:, :4] / 29**0.5
    numpy.testing.assert_allclose(numpy.abs(overlap), numpy.eye(4), atol=1e-4)


def test_codes_along_which_all_samples_agree_are_zero():
    rows = torch.randn(6, 1, generator=generator()) * torch.ones(5)
    codec = ParameterCodec.fit(RowSamples(rows), rank=3)
    codes = codec.encode(rows)
    assert codes[:, 0].std() > 0.9
    assert codes[:, 1:].eq(0).all()


# --- decoding ------------------------------------------------------------------------------------


@examples(max_examples=25)
@given(count=st.integers(3, 12), size=st.integers(2, 9), seed=st.integers(0, 99), data=st.data())
def test_decoding_a_code_gives_a_sample_of_that_code(count, size, seed, data):
    rows = torch.randn(count, size, generator=generator(seed))
    rank = data.draw(st.integers(1, min(count - 1, size)))
    codec = ParameterCodec.fit(RowSamples(rows), rank, residual=None, dtype=torch.float32)
    codes = codec.encode(rows)
    decoded = codec.decode(codes)
    torch.testing.assert_close(codec.encode(decoded), codes, atol=1e-3, rtol=1e-3)
    if rank == min(count - 1, size):  # nothing is left out
        torch.testing.assert_close(decoded, rows, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("residual", ["diagonal", None])
def test_normal_codes_are_samples_of_the_gaussian(residual):
    codec = ParameterCodec.fit(RowSamples(ROWS), 3, residual=residual)
    n = 20_000
    rows = codec.decode(torch.randn(n, 3, generator=generator()), generator(1)).double()
    gaussian = LowRankGaussian.fit(RowSamples(ROWS), 3, residual)
    drawn = torch.cat(
        [value.flatten(1) for value in gaussian.sample(n, generator(2)).values()], 1
    ).double()
    scale = drawn.T.cov().max()
    # A variance is known within sqrt(2 / n) = 1 %, here of both; 5 times that.
    assert (rows.T.cov() - drawn.T.cov()).abs().max() < 0.07 * scale
    assert (rows.mean(0) - drawn.mean(0)).abs().max() < 5 * (2 * scale / n).sqrt()


def test_the_residual_of_a_sample_is_drawn_on_its_own():
    codec = ParameterCodec.fit(RowSamples(ROWS), 3)
    codes = torch.randn(5, 3, generator=generator())
    draws, one_by_one = generator(1), generator(1)
    whole = codec.decode(codes, draws)
    parts = [codec.decode(code[None], one_by_one) for code in codes]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert draws.get_state().equal(one_by_one.get_state())


def test_the_identity_codec_leaves_weights_as_they_are():
    codec = IdentityCodec.fit(RowSamples(ROWS, 7))
    assert (codec.size, codec.num_samples, codec.nbytes) == (12, 30, 0)
    assert codec.encode(ROWS).equal(ROWS)
    assert codec.decode(ROWS).equal(ROWS)


# --- storage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "codec",
    [
        ParameterCodec.fit(RowSamples(ROWS), 3),
        ParameterCodec.fit(RowSamples(ROWS), 3, residual=None, dtype=torch.float32),
        IdentityCodec.fit(RowSamples(ROWS)),
    ],
    ids=["residual", "no_residual", "identity"],
)
def test_a_codec_is_restored_from_its_settings_and_tensors(codec):
    restored = Codec.from_tensors(codec.settings(), codec.to_tensors())
    assert type(restored) is type(codec)
    assert repr(restored) == repr(codec)
    assert restored.nbytes == codec.nbytes
    codes = codec.encode(ROWS)
    assert restored.encode(ROWS).equal(codes)
    assert restored.decode(codes, generator()).equal(codec.decode(codes, generator()))


def test_nbytes_are_those_of_mean_components_and_residual():
    codec = ParameterCodec.fit(RowSamples(ROWS), 3)
    assert codec.nbytes == 12 * 4 + 3 * 12 * 2 + 3 * 4
    codec = ParameterCodec.fit(RowSamples(ROWS), 3, residual="diagonal")
    assert codec.nbytes == 12 * 4 + 3 * 12 * 2 + 3 * 4 + 12 * 4


def test_an_unknown_codec_is_refused():
    settings = IdentityCodec.fit(RowSamples(ROWS)).settings() | {"kind": "WaveletCodec"}
    with pytest.raises(ValueError, match="no codec 'WaveletCodec', only ParameterCodec"):
        Codec.from_tensors(settings, {})


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, "rank must be from 1 to 29, .* got 0"), (30, "one less than the 30 samples, got 30")],
)
def test_a_rank_out_of_range_is_refused(rank, message):
    with pytest.raises(ValueError, match=message):
        ParameterCodec.fit(RowSamples(ROWS), rank)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_samples_that_diverged_are_refused_by_name(value):
    codec = ParameterCodec.fit(RowSamples(ROWS), 3)
    rows = ROWS.clone()
    rows[20, -1] = value
    for use in (
        lambda: ParameterCodec.fit(RowSamples(rows, 7), 3),
        lambda: IdentityCodec.fit(RowSamples(rows, 7)),
        lambda: codec.encode(rows),
    ):
        with pytest.raises(ValueError, match="samples of bias have values that are not finite"):
            use()


def test_samples_that_float32_cannot_hold_are_refused_by_name():
    codec = ParameterCodec.fit(RowSamples(ROWS), 3)
    rows = ROWS.double()
    rows[20, -1] = 1e300
    with pytest.raises(ValueError, match="samples of bias have values that are not finite"):
        codec.encode(rows)


def test_a_bank_of_another_architecture_is_refused_by_the_first_difference():
    codec = ParameterCodec.fit(RowSamples(ROWS), 3)
    with pytest.raises(
        ValueError, match=r"the bank has 'weight' of shape \(8,\), expected \(11,\)"
    ):
        encode_all(codec, RowSamples(ROWS[:, :9]))
    other = RowSamples(ROWS)
    other.layout = Layout(("weight", "offset"), ((11,), (1,)))
    with pytest.raises(ValueError, match=r"the bank lacks 'bias' of shape \(1,\)"):
        encode_all(codec, other)


@pytest.mark.parametrize("codec", [ParameterCodec, IdentityCodec], ids=lambda kind: kind.__name__)
def test_codes_and_rows_of_other_sizes_are_refused(codec):
    codec = codec.fit(RowSamples(ROWS), *([3] if codec is ParameterCodec else []))
    with pytest.raises(ValueError, match=r"rows must have shape \(n, 12\), .* got \(2, 9\)"):
        codec.encode(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=rf"codes must have shape \(n, {codec.size}\)"):
        codec.decode(torch.zeros(2, 9))
