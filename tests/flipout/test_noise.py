"""Noise from a seed: quality of the generators, compiled and in torch, and how seeds are made."""

import copy
import math
import pickle
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_revflip.flipout import NoiseSource
from lightning_revflip.flipout.draw import Draw
from lightning_revflip.flipout.noise import LIBRARY, derive, hashed_signs, normal, signs
from tests.helpers.flipout_layers import NEEDS_COMPILER, torch_only
from tests.helpers.properties import examples
from tests.helpers.statistics import (
    largest_correlation,
    largest_distance,
    normal_distance,
    two_sample_distance,
)

MANY = 2**20
BLOCK = 16_384
"""Numbers that the compiled generators give before they are seeded again."""
ROUND = 32
"""Gaussian numbers that they give at once."""
CPU = torch.device("cpu")


@pytest.fixture(params=[pytest.param("compiled", marks=NEEDS_COMPILER), "torch"])
def path(request):
    """Both ways to make noise."""
    if request.param == "compiled":
        assert LIBRARY.available
        yield request.param
    else:
        with torch_only():
            yield request.param


def normals(count=MANY, seed=1):
    return normal(torch.empty(count), seed).double()


# Deviations are held against 5 standard errors (one in 2 million for one number), or 6 where the
# largest of thousands is looked at. Seeds are fixed.


@pytest.mark.usefixtures("path")
def test_normal_moments_up_to_the_sixth():
    z = normals()
    moments = {k: math.prod(range(k - 1, 0, -2)) if k % 2 == 0 else 0 for k in range(1, 13)}
    for k in range(1, 7):
        error = math.sqrt((moments[2 * k] - moments[k] ** 2) / MANY)
        assert abs(float((z**k).mean()) - moments[k]) < 5 * error, k


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1, 2**63 - 1])
def test_normal_follows_the_normal_distribution(seed):
    assert normal_distance(normals(seed=seed)) < largest_distance(MANY)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("limit", [3.0, 4.0, 4.5])
def test_normal_has_tails(limit):
    z = normals(4 * MANY)
    expected = len(z) * math.erfc(limit / math.sqrt(2)) / 2
    for side in (z, -z):
        assert abs(int((side > limit).sum()) - expected) < 5 * math.sqrt(expected)
    assert bool(z.isfinite().all())


@NEEDS_COMPILER
def test_compiled_lanes_and_pairs_are_uncorrelated():
    columns = normals(8 * MANY).view(-1, ROUND)
    assert largest_correlation(columns) < 6
    assert largest_correlation(columns.square()) < 6  # sine and cosine share a radius


@NEEDS_COMPILER
def test_compiled_blocks_are_uncorrelated():
    blocks = normals(64 * BLOCK).view(64, BLOCK).T
    assert largest_correlation(blocks) < 6
    assert largest_correlation(blocks.abs()) < 6


def test_seeds_that_are_neighbours_are_uncorrelated(path):
    # torch's generator for the CPU takes 32 bits of a seed; `derive` mixes all 64 into them.
    bits = 62 if path == "compiled" else 31
    seeds = [*range(32), *(2**k for k in range(6, bits))]
    columns = torch.stack([normals(BLOCK, seed) for seed in seeds], dim=1)
    assert largest_correlation(columns) < 6
    assert largest_correlation(columns.square()) < 6


@pytest.mark.usefixtures("path")
def test_neighbours_are_uncorrelated():
    z = normals()
    for values in (z, z.square() - 1):
        for lag in (1, 2, 15, 16, 17, 31, 32, 33, 64, 1024, BLOCK):
            correlation = float((values[lag:] * values[:-lag]).mean() / values.var())
            assert abs(correlation) < 5 / math.sqrt(len(values) - lag), lag


@NEEDS_COMPILER
@examples(max_examples=40)
@given(count=st.integers(0, 2 * BLOCK + 40), seed=st.integers(0, 2**63 - 1))
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(count, seed):
    longer = torch.full((2 * BLOCK + 41,), math.nan)
    longer[:] = normal(torch.empty(len(longer)), seed)
    assert torch.equal(normal(torch.empty(count), seed), longer[:count])
    drawn = signs((count,), seed, torch.float32, CPU)
    assert torch.equal(drawn, signs((len(longer),), seed, torch.float32, CPU)[:count])


@NEEDS_COMPILER
@pytest.mark.parametrize("count", [1, 15, 31, 33, 511, 513, BLOCK - 1, BLOCK + 1])
def test_compiled_functions_write_their_part_of_memory_only(count):
    for name in ("normal", "signs"):
        memory = torch.full((count + 64,), 7.0)
        LIBRARY.call(name, count, 3, memory)
        assert bool((memory[count:] == 7.0).all())
        assert bool((memory[:count] != 7.0).all())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_signs_are_exactly_one_and_minus_one(dtype):
    drawn = signs((37, 41), 3, dtype, CPU)
    assert drawn.dtype == dtype
    assert drawn.shape == (37, 41)
    assert set(drawn.flatten().tolist()) == {1.0, -1.0}
    assert torch.equal(drawn.float(), signs((37, 41), 3, torch.float32, CPU))


@pytest.mark.usefixtures("path")
def test_signs_are_fair_coins_and_uncorrelated():
    drawn = signs((MANY,), 5, torch.float32, CPU).double()
    assert abs(float(drawn.mean())) < 5 / math.sqrt(MANY)
    for lag in (1, 2, 8, 16, 32, 63, 64, 512, BLOCK):
        assert abs(float((drawn[lag:] * drawn[:-lag]).mean())) < 5 / math.sqrt(MANY - lag), lag
    assert largest_correlation(drawn.view(-1, 512)) < 6


@pytest.mark.usefixtures("path")
def test_signs_of_each_byte_are_equally_frequent():
    drawn = signs((MANY,), 6, torch.float32, CPU).view(-1, 8)
    bytes_ = ((drawn < 0).long() << torch.arange(8)).sum(1)
    counts = torch.bincount(bytes_, minlength=256).double()
    expected = MANY / 8 / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_hashed_signs_are_fair_and_uncorrelated_in_rows_and_columns():
    rows, columns = torch.arange(2048).view(-1, 1), torch.arange(256)
    drawn = hashed_signs(9, rows, columns)
    assert drawn.shape == (2048, 256)
    assert set(drawn.flatten().tolist()) == {1, -1}
    assert abs(float(drawn.double().mean())) < 5 / math.sqrt(drawn.numel())
    assert largest_correlation(drawn.double()) < 6
    assert largest_correlation(drawn.double().T[:, :512]) < 6


def test_hashed_signs_depend_on_the_seed_and_on_the_place_of_a_number():
    numbers = torch.arange(64)
    by_seed = torch.stack([hashed_signs(seed, numbers) for seed in range(400)]).double()
    assert largest_correlation(by_seed) < 6
    a, b = numbers.view(-1, 1), numbers
    assert not torch.equal(hashed_signs(1, a, b), hashed_signs(1, b, a))


def test_compiled_and_torch_noise_have_one_law():
    compiled = normals()
    with torch_only():
        assert two_sample_distance(compiled, normals(seed=2)) < largest_distance(MANY, MANY)


@pytest.mark.usefixtures("path")
def test_noise_depends_on_the_shape_and_not_on_strides():
    like = torch.empty(6, 4)
    strided = torch.empty(4, 6).t()
    assert not strided.is_contiguous()
    assert torch.equal(normal(like, 3), normal(strided, 3))


@pytest.mark.usefixtures("path")
def test_the_default_dtype_of_torch_does_not_matter():
    expected = normal(torch.empty(50), 3), signs((50,), 3, torch.float32, CPU)
    torch.set_default_dtype(torch.float64)
    try:
        like = torch.empty(50, dtype=torch.float32)
        found = normal(like, 3), signs((50,), 3, torch.float32, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.usefixtures("path")
def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    normal(torch.empty(100), 1)
    normal(torch.empty(100, dtype=torch.float64), 1)
    signs((100,), 1, torch.float32, CPU)
    hashed_signs(1, torch.arange(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_derived_seeds_do_not_collide():
    seeds = {derive(seed, a, b) for seed in range(20) for a in range(20) for b in range(20)}
    seeds |= {derive(seed, a) for seed in range(20) for a in range(20)}
    assert len(seeds) == 20**3 + 20**2
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- sources and draws ------------------------------------------------------------------------


def test_a_seed_is_one_draw_of_the_global_generator():
    torch.manual_seed(0)
    NoiseSource().seed()
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randint(2**62, ())
    assert torch.equal(torch.get_rng_state(), after)


def test_a_source_with_a_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    first = NoiseSource(torch.Generator().manual_seed(4)).seed()
    assert torch.equal(torch.get_rng_state(), before)
    assert first == NoiseSource(torch.Generator().manual_seed(4)).seed()
    assert first != NoiseSource(torch.Generator().manual_seed(5)).seed()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_source_goes_on_where_the_original_is(copied):
    source = NoiseSource(torch.Generator().manual_seed(4))
    source.seed()
    other = copied(source)
    assert [other.seed() for _ in range(3)] == [source.seed() for _ in range(3)]
    assert copied(NoiseSource()).generator is None


def test_generators_of_other_devices_are_refused():
    elsewhere = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(ValueError, match="seeds are drawn on the CPU, got a generator of cuda"):
        NoiseSource(elsewhere)


@examples(max_examples=100)
@given(count=st.integers(0, 40), bases=st.integers(1, 50))
def test_groups_are_neighbours_and_as_equal_as_can_be(count, bases):
    groups = Draw(0, base_perturbations=bases).groups(count)
    members = [list(range(*group.indices(count))) for group in groups]
    assert list(chain.from_iterable(members)) == list(range(count))
    sizes = [len(group) for group in members]
    assert len(groups) == max(1, min(bases, count))
    assert max(sizes) - min(sizes) <= 1


def test_weights_and_signs_of_a_draw_have_seeds_of_their_own():
    draw = Draw(5, base_perturbations=3)
    like = torch.empty(0)
    seeds = {draw.weight_seed(group) for group in range(3)}
    assert len(seeds) == 3
    s, r = draw.input_signs(64, 64, like), draw.output_signs(64, 64, like)
    assert abs(float((s * r).mean())) < 5 / 64
    assert Draw(5, signed=False).input_signs(4, 4, like) is None
