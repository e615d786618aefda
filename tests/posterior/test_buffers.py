"""Re-estimated statistics are those of torch.optim.swa_utils.update_bn, for each sample."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from lightning_revflip.posterior import predict, reestimate_buffers
from tests.helpers.predictors import stacked


class Network(nn.Module):
    """A convolution and two kinds of normalization, one of them without statistics."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3, momentum=0.3)
        self.linear = nn.Linear(27, 4)
        self.last = nn.BatchNorm1d(4)
        self.without = nn.BatchNorm1d(4, track_running_stats=False)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return self.without(self.last(self.linear(self.norm(self.conv(x)).relu().flatten(1))))


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = Network()
    network(torch.randn(8, 1, 5, 5))
    return network


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 1, 5, 5, generator=generator) for size in (8, 8, 5)]


def expected(network, samples, batches):
    """The buffers of each sample, by torch."""
    states = []
    for index in range(len(samples["conv.weight"])):
        one = copy.deepcopy(network)
        one.load_state_dict({name: v[index] for name, v in samples.items()}, strict=False)
        update_bn(batches, one)
        states.append(one.state_dict())
    names = [f"{layer}.{statistic}" for layer in ("norm", "last") for statistic in STATISTICS]
    return {name: torch.stack([state[name] for state in states]) for name in names}


def test_statistics_are_those_of_update_bn(network, batches):
    samples = stacked(network)
    buffers = reestimate_buffers(network, samples, batches)
    torch.testing.assert_close(buffers, expected(network, samples, batches))
    assert buffers["norm.num_batches_tracked"].tolist() == [3] * 5


def test_batches_are_read_once_and_may_have_targets(network, batches):
    samples = stacked(network)
    pairs = ((x, torch.zeros(len(x))) for x in batches)
    buffers = reestimate_buffers(network, samples, pairs)
    torch.testing.assert_close(buffers, expected(network, samples, batches))


def test_forward_says_how_to_call_the_module(network, batches):
    samples = stacked(network)
    named = [{"image": x} for x in batches]
    buffers = reestimate_buffers(
        network, samples, named, forward=lambda module, batch: module(batch["image"])
    )
    torch.testing.assert_close(buffers, expected(network, samples, batches))


def test_the_module_is_left_as_it_was(network, batches):
    network.norm.eval()
    state = copy.deepcopy(network.state_dict())
    reestimate_buffers(network, stacked(network), batches)
    for name, value in network.state_dict().items():
        assert value.equal(state[name]), name
    assert network.training
    assert not network.norm.training
    assert (network.norm.momentum, network.last.momentum) == (0.3, 0.1)


def test_the_module_is_left_as_it_was_after_an_error(network):
    with pytest.raises(RuntimeError):
        reestimate_buffers(network.eval(), stacked(network), [torch.randn(8, 3, 5, 5)])
    assert not any(part.training for part in network.modules())
    assert network.norm.momentum == 0.3


def test_samples_are_left_as_they_were_and_may_hold_old_statistics(network, batches):
    samples = stacked(network)
    old = torch.full((5, 3), 7.0, dtype=torch.float16)
    buffers = reestimate_buffers(network, samples | {"norm.running_mean": old}, batches)
    torch.testing.assert_close(buffers, expected(network, samples, batches))
    assert (old == 7).all()


def test_predict_takes_statistics_with_the_parameters(network, batches):
    samples = stacked(network)
    buffers = reestimate_buffers(network, samples, batches)
    predictions = predict(network, samples | buffers, batches[0], transform=None)
    for index in range(5):
        one = copy.deepcopy(network)
        one.load_state_dict({name: v[index] for name, v in samples.items()}, strict=False)
        update_bn(batches, one)
        with torch.no_grad():
            torch.testing.assert_close(
                predictions[index], one.eval()(batches[0]), atol=1e-5, rtol=1e-5
            )


def test_a_module_that_is_one_layer():
    layer, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    buffers = reestimate_buffers(layer, {"weight": torch.ones(2, 3)}, [x])
    torch.testing.assert_close(buffers["running_mean"], x.mean(0).expand(2, 3))


def test_no_batches_and_no_statistics_are_refused(network):
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_buffers(network, stacked(network), [])
    linear = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has no batch normalization"):
        reestimate_buffers(linear, stacked(linear), [torch.ones(1, 2)])
