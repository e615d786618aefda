"""The compiled steps are the steps of torch with the same noise."""

import pytest
import torch
from torch import nn

from lightning_revflip.sgld import native
from lightning_revflip.sgld.noise import normal
from tests.helpers.samplers import build, each_sampler, take_steps, values
from tests.helpers.samplers import normal as seeded_normal

pytestmark = pytest.mark.skipif(not native.LIBRARY.available, reason="there is no C compiler")

# Odd sizes around the 1,024 numbers made at a time and the 16,384 of a seed.
SHAPES = [(1,), (1023,), (7, 3), (), (2, 1025), (16383,), (129, 257), (5,)]


def parameters():
    return [nn.Parameter(seeded_normal(*shape, seed=i)) for i, shape in enumerate(SHAPES)]


def trajectory(sampler, steps, **changes):
    params = parameters()
    optimizer = build(sampler, params, **changes)
    take_steps(optimizer, params, range(steps))
    states = [optimizer.state[p].get(name) for p in params for name in optimizer.state_names]
    return values(params), states


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@each_sampler
def test_compiled_steps_are_those_of_torch(monkeypatch, sampler, temperature):
    compiled = trajectory(sampler, 8, temperature=temperature)
    monkeypatch.setattr(native, "takes", lambda *lists: False)
    plain = trajectory(sampler, 8, temperature=temperature)
    for found, expected in zip(compiled, plain, strict=True):
        for one, other in zip(found, expected, strict=True):
            # A fused multiply-add rounds once where torch rounds twice.
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


@each_sampler
def test_compiled_steps_are_taken(monkeypatch, sampler):
    """Else the comparison would be one of torch with itself."""
    calls = []
    call = native.call
    monkeypatch.setattr(
        native, "call", lambda name, *args, **kw: calls.append(name) or call(name, *args, **kw)
    )
    trajectory(sampler, 3)
    assert calls == [sampler] * 3


def test_the_noise_of_a_step_is_the_stream_of_its_seed():
    params = parameters()
    moved = [torch.zeros_like(each) for each in params]
    zeros = [torch.zeros_like(each) for each in params]
    native.call("sgld", (moved, zeros), 123, 0.0, 0.0, 1.0)
    for found, expected in zip(moved, normal(params, 123), strict=True):
        assert torch.equal(found, expected)


def test_a_stream_does_not_depend_on_how_it_is_divided():
    whole = normal([torch.empty(40_000)], 5)[0]
    parts = normal([torch.empty(size) for size in (1, 1023, 16_384, 22_592)], 5)
    assert torch.equal(torch.cat(parts), whole)


def test_streams_of_different_seeds_and_blocks_are_not_correlated():
    count = 1 << 18
    streams = [normal([torch.empty(count)], seed)[0] for seed in (0, 1, 2, 2**61)]
    blocks = list(streams[0].split(16_384))
    for group, length in ((streams, count), (blocks, 16_384)):
        correlation = torch.corrcoef(torch.stack(group)).fill_diagonal_(0).abs().max()
        assert correlation < 5 / length**0.5  # 5 standard errors of at most 120 pairs


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.zeros(3, dtype=torch.float64)],
        [torch.zeros(4, 4).t()[1:]],
        [torch.zeros(3), torch.zeros(3, dtype=torch.float64)],
    ],
    ids=["float64", "not_contiguous", "one_of_two"],
)
def test_other_tensors_are_left_to_torch(tensors):
    assert native.takes([torch.zeros(3)])
    assert not native.takes(tensors)
