"""The generator and the critic have the sizes and the starting point that they promise."""

import pytest
import torch
from torch import nn

from lightning_revflip.apd import Critic, Generator, standardized


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_papers_generator_is_as_large_as_101_networks():
    network_size = 79_510  # 784-100-10
    generated = Generator(latent_size=32, code_size=network_size)
    last = generated.layers[-1]
    assert last.weight.numel() + last.bias.numel() == 101 * network_size
    widths = [layer.out_features for layer in generated.layers if isinstance(layer, nn.Linear)]
    assert widths == [100, 100, 100, network_size]


def test_a_generator_with_skip_starts_as_the_identity_and_learns():
    network = Generator(4, 4, hidden=[8, 8], skip=True)
    latents = network.draw_latents(16, generator())
    assert network(latents).equal(latents)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves the last layer only, as it hides the others
        optimizer.zero_grad()
        (network(latents) - 1).square().sum().backward()
        optimizer.step()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    assert not network(latents).equal(latents)


def test_latent_vectors_are_normal_and_drawn_one_by_one():
    network = Generator(50, 3)
    latents = network.draw_latents(400, generator())
    # 20,000 numbers: a mean is known within 0.007, a variance within 0.01; 5 times that.
    assert abs(latents.mean()) < 0.035
    assert abs(latents.var() - 1) < 0.05
    few = generator()
    assert torch.cat([network.draw_latents(1, few), network.draw_latents(2, few)]).equal(
        latents[:3]
    )
    assert network.double().draw_latents(1).dtype == torch.float64


def test_settings_make_a_generator_of_the_same_sizes():
    network = Generator(4, 4, hidden=(7,), skip=True)
    again = Generator(**network.settings())
    again.load_state_dict(network.state_dict())
    latents = network.draw_latents(2, generator())
    assert again(latents).equal(network(latents))


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "no_skip"])
def test_a_standardized_generator_has_white_codes_of_the_same_shape(skip):
    torch.manual_seed(0)
    network = Generator(3, 3, hidden=[8], skip=skip)
    with torch.no_grad():
        network.last.weight.mul_(2).add_(torch.randn(3, 8, generator=generator()))
        network.last.bias.add_(5)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    white = standardized(network, generator(1), n=20_000)
    with torch.no_grad():
        latents = network.draw_latents(20_000, generator(1))
        codes, found = network(latents).double(), white(latents).double()
    torch.testing.assert_close(found.mean(0), torch.zeros(3).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.T.cov(), torch.eye(3).double(), atol=1e-4, rtol=0)
    # The codes are an affine map of the earlier ones.
    columns = torch.cat([codes, torch.ones(len(codes), 1).double()], 1)
    affine = torch.linalg.lstsq(columns, found).solution
    torch.testing.assert_close(columns @ affine, found, atol=1e-4, rtol=0)
    assert all(value.equal(before[name]) for name, value in network.state_dict().items())


def test_a_direction_that_hardly_varies_is_stretched_within_bounds():
    network = Generator(2, 2, hidden=[4], skip=True)
    network.skip_weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.01]]))
    white = standardized(network, generator(), max_stretch=4)
    torch.testing.assert_close(white.skip_weight[1, 1].item(), 0.04, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="takes more codes than that, got n=2"):
        standardized(network, n=2)


def test_the_critic_gives_a_number_for_each_code():
    assert Critic(6)(torch.zeros(5, 6)).shape == (5,)


def test_spectral_norm_bounds_the_slope_of_the_critic():
    torch.manual_seed(0)
    critic = Critic(6, hidden=[40, 40], spectral_norm=True)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.mul_(30)
        for _ in range(100):  # the power iteration takes some steps
            critic(torch.zeros(1, 6))
    critic.eval()
    codes = (10 * torch.randn(200, 6, generator=generator())).requires_grad_()
    (slopes,) = torch.autograd.grad(critic(codes).sum(), codes)
    assert slopes.norm(dim=1).max() < 1.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Generator(0, 4), "sizes must be at least 1, got 0, 100"),
        (lambda: Generator(4, 4, hidden=[8, 0]), "sizes must be at least 1, got 4, 8, 0, 4"),
        (lambda: Generator(3, 4, skip=True), "must be equal, got 3 and 4"),
        (lambda: Critic(0), "sizes must be at least 1"),
    ],
    ids=["latent", "hidden", "skip", "critic"],
)
def test_sizes_that_make_no_network_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
