"""ParallelChains: each copy trains as the network alone would on its part of every batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_revflip.sgld import SGLD, ParallelChains, log_mean_softmax
from lightning_revflip.sgld.chains import Parts

CHAINS = 3


def network(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *layers, nn.Tanh(), nn.Linear(8, 5))


def batch(size: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator)
    return x, torch.randint(5, (size,), generator=generator)


def parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.tensor_split(tensor, CHAINS)


@pytest.mark.parametrize("size", [12, 13, 14, 3, 4])
def test_each_copy_has_the_outputs_and_gradients_of_the_network_on_its_part(size):
    chains = ParallelChains(network(), CHAINS)
    singles = [chains.network(chain) for chain in range(CHAINS)]
    x, y = batch(size)
    outputs = chains(x)
    F.cross_entropy(outputs, y).backward()
    expected = []
    for chain, (single, own_x, own_y) in enumerate(zip(singles, parts(x), parts(y), strict=True)):
        expected.append(single(own_x))
        F.cross_entropy(expected[-1], own_y).backward()
        for name, param in single.named_parameters():
            stacked = chains.stacked.get_parameter(name).grad
            torch.testing.assert_close(stacked[chain], param.grad)
    torch.testing.assert_close(outputs, torch.cat(expected))


def test_several_steps_are_those_of_single_networks():
    chains = ParallelChains(network(), CHAINS)
    singles = [chains.network(chain) for chain in range(CHAINS)]
    optimizers = [torch.optim.SGD(each.parameters(), 0.3) for each in (chains, *singles)]
    for step in range(5):
        x, y = batch(10, seed=step)
        F.cross_entropy(chains(x), y).backward()
        for single, own_x, own_y in zip(singles, parts(x), parts(y), strict=True):
            F.cross_entropy(single(own_x), own_y).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for chain, single in enumerate(singles):
        found = chains.network(chain).state_dict()
        for name, value in single.state_dict().items():
            torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("size", [12, 14])
def test_batch_normalization_is_over_the_part(size):
    chains = ParallelChains(network(nn.BatchNorm1d(8)), CHAINS)
    singles = [chains.network(chain) for chain in range(CHAINS)]
    x, _ = batch(size)
    outputs = chains(x)
    if size % CHAINS == 0:
        expected = torch.cat([each(own) for each, own in zip(singles, parts(x), strict=True)])
        torch.testing.assert_close(outputs, expected)
        for chain, single in enumerate(singles):
            found = chains.network(chain).state_dict()
            for name, value in single.state_dict().items():
                torch.testing.assert_close(found[name], value)
    else:  # parts that lack an example repeat their last one
        assert torch.isfinite(outputs).all()
    chains.eval()
    chains(x)
    counts = chains.get_buffer("stacked.1.num_batches_tracked")
    assert counts.tolist() == [1] * CHAINS


def test_dropout_differs_between_the_copies():
    chains = ParallelChains(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), CHAINS)
    with torch.no_grad():
        chains.get_parameter("stacked.0.weight").zero_()
        chains.get_parameter("stacked.0.bias").fill_(1)
    dropped = chains(torch.zeros(60, 4)) == 0
    masks = dropped.view(CHAINS, -1)
    assert 0.3 < dropped.float().mean() < 0.7
    assert not torch.equal(masks[0], masks[1])
    assert not (chains.eval()(torch.zeros(60, 4)) == 0).all()


def test_evaluation_combines_the_copies_over_the_whole_batch():
    chains = ParallelChains(network(), CHAINS).eval()
    x, _ = batch(7)
    probabilities = torch.stack([chains.network(chain)(x).softmax(-1) for chain in range(CHAINS)])
    torch.testing.assert_close(chains(x).softmax(-1), probabilities.mean(0))
    torch.testing.assert_close(chains(x).exp(), probabilities.mean(0))


def test_copies_have_weights_of_their_own_and_the_first_those_of_the_network():
    chains = ParallelChains(network(), CHAINS)
    weight = chains.get_parameter("stacked.0.weight")
    assert torch.equal(weight[0], network()[0].weight)
    assert not (weight[1] == weight[2]).any()
    assert weight.shape == (CHAINS, 8, 4)
    same = ParallelChains(network(), CHAINS, reinitialize=False).get_parameter("stacked.0.weight")
    assert torch.equal(same[0], same[2])


def test_the_network_itself_is_left_alone():
    original = network()
    before = [p.clone() for p in original.parameters()]
    chains = ParallelChains(original, CHAINS)
    F.cross_entropy(chains(batch(6)[0]), batch(6)[1]).backward()
    SGLD(chains.parameters(), 0.1, num_data=6).step()
    assert all(map(torch.equal, before, original.parameters()))
    assert all(p.grad is None for p in original.parameters())


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    chains = ParallelChains(Tied(), CHAINS)
    names = [name for name, _ in chains.named_parameters()]
    assert names == ["stacked.first.weight", "stacked.first.bias", "stacked.second.bias"]
    x, _ = batch(6)
    expected = [chains.network(i)(own) for i, own in enumerate(parts(x))]
    torch.testing.assert_close(chains(x), torch.cat(expected))


def test_several_inputs_and_outputs_are_divided_and_joined():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x, y):
            return {"sum": x + self.scale * y, "both": (x, y)}

    chains = ParallelChains(Two(), CHAINS, reinitialize=False)
    x, y = torch.arange(14.0).view(7, 2), torch.ones(7, 2)
    outputs = chains(x, y)
    assert torch.equal(outputs["sum"], x + 2 * y)
    assert torch.equal(outputs["both"][0], x)


def test_a_state_dict_restores_all_copies():
    torch.manual_seed(3)
    saved = ParallelChains(network(nn.BatchNorm1d(8)), CHAINS)
    saved(batch(9)[0])
    other = ParallelChains(network(nn.BatchNorm1d(8)), CHAINS)
    other.load_state_dict(saved.state_dict())
    x, _ = batch(5)
    assert torch.equal(other.eval()(x), saved.eval()(x))


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="num_chains must be at least 1, got 0"):
        ParallelChains(network(), 0)
    with pytest.raises(ValueError, match="a batch of 2 cannot be divided among 3 chains"):
        ParallelChains(network(), CHAINS)(batch(2)[0])


@given(st.integers(1, 40), st.integers(1, 8))
def test_parts_are_those_of_tensor_split_and_come_back_in_order(size, chains):
    if size < chains:
        return
    divided = Parts(size, chains)
    numbers = torch.arange(size)
    cut = divided.cut(numbers)
    for found, expected in zip(cut, numbers.tensor_split(chains), strict=True):
        assert torch.equal(found[: len(expected)], expected)
    assert torch.equal(divided.join(cut), numbers)
    # The mean over the batch of values that are means over parts.
    share = torch.tensor([len(part) for part in numbers.tensor_split(chains)]) / size
    torch.testing.assert_close(divided.weights * share, torch.ones(chains))


@given(st.integers(1, 6), st.integers(2, 5))
def test_log_mean_softmax_is_the_logarithm_of_the_mean(samples, classes):
    logits = 10 * torch.randn(samples, 3, classes, generator=torch.Generator().manual_seed(0))
    expected = logits.double().softmax(-1).mean(0).log()
    torch.testing.assert_close(log_mean_softmax(logits).double(), expected, rtol=1e-4, atol=1e-5)


def test_log_mean_softmax_of_equal_networks_is_their_log_softmax():
    logits = torch.tensor([[0.0, math.log(3)]]).expand(4, 1, 2)
    torch.testing.assert_close(log_mean_softmax(logits).exp(), torch.tensor([[0.25, 0.75]]))


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match=r"got shape \(4, 7, 1\) with a single one"):
        log_mean_softmax(torch.zeros(4, 7, 1))
