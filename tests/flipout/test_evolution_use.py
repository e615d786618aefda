"""FlipoutES: rows of a batch, which parameters differ, state, shares of processes."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from lightning_revflip.flipout.evolution import FlipoutES
from tests.helpers.evolution_models import mlp


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- rows --------------------------------------------------------------------------------------


def test_repeat_gives_every_member_the_batch():
    es = FlipoutES(nn.Linear(2, 1), 0.1, 4, seed=0)
    assert es.repeat(torch.tensor([7, 8])).tolist() == [7, 8] * 4


def test_repeat_gives_a_pair_its_own_examples():
    es = FlipoutES(nn.Linear(2, 1), 0.1, 8, base_perturbations=2, seed=0)
    batch = {"x": torch.arange(8), "name": "some", "y": [torch.arange(8) * 10]}
    rows = es.repeat(batch, examples=2)
    expected = [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert rows["x"].tolist() == expected
    assert rows["y"][0].tolist() == [10 * n for n in expected]
    assert rows["name"] == "some"


def test_repeat_reads_a_short_batch_again():
    es = FlipoutES(nn.Linear(2, 1), 0.1, 4, antithetic=False, seed=0)
    assert es.repeat(torch.arange(3), examples=2).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


# --- which parameters --------------------------------------------------------------------------


def test_frozen_parameters_and_modules_beside_the_targets_stay():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[0].bias.requires_grad_(False)
    es = FlipoutES(model, 0.1, 4, targets=[nn.Linear], seed=0)
    assert [p.name for p in es.parameters] == ["0.weight", "2.weight", "2.bias"]
    x = torch.randn(4, 3)
    with es.members():
        output = model(x)
    each = [functional_call(model, es.member(n), x[n : n + 1]) for n in range(4)]
    torch.testing.assert_close(output, torch.cat(each))
    es.gradient(torch.randn(4))
    assert model[0].bias.grad is None
    assert model[1].weight.grad is None
    assert [p.name for p in FlipoutES(model, 0.1, 4, targets=["2"]).parameters] == [
        "2.weight",
        "2.bias",
    ]


def test_encoder_layers_call_their_parts_within_the_context():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    es = FlipoutES(model, 0.3, 4, targets=["linear*"], seed=0)
    x = torch.randn(8, 3, 8)
    with es.members():
        output = model(x)
    each = [functional_call(model, es.member(n), x[2 * n : 2 * n + 2]) for n in range(4)]
    torch.testing.assert_close(output, torch.cat(each), atol=1e-5, rtol=1e-4)


# --- state and processes -----------------------------------------------------------------------


def test_a_restored_population_goes_on_with_the_same_members():
    model = mlp()
    es = FlipoutES(model, 0.1, 4)
    es.next_generation()
    state = es.state_dict()
    es.next_generation()
    other = FlipoutES(model, 0.1, 4)
    assert not other.member(0)["0.weight"].equal(es.member(0)["0.weight"])
    other.load_state_dict(state)
    other.next_generation()
    assert other.member(0)["0.weight"].equal(es.member(0)["0.weight"])


def test_random_numbers_leave_the_global_generator_alone():
    model = mlp()
    es = FlipoutES(model, 0.1, 4, seed=0)
    before = torch.random.get_rng_state()
    with es.members():
        model(torch.zeros(4, 4).double())
    es.gradient(torch.randn(4, generator=torch.Generator().manual_seed(0)))
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize(("groups", "antithetic"), [(1, True), (3, True), (4, False)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_make_up_the_population(groups, antithetic, world_size):
    model = mlp()
    es = FlipoutES(model, 0.3, 24, groups, antithetic, seed=0)
    x = torch.randn(24, 4).double()
    with es.members():
        expected = model(x)
    seen = []
    for rank in range(world_size):
        es.share(rank, world_size)
        mine = es.population.member_numbers()
        assert len(mine) == es.local_population
        with es.members():
            torch.testing.assert_close(model(x[mine]), expected[mine])
        seen += mine.tolist()
    assert sorted(seen) == list(range(24))


def test_repeat_gives_the_members_of_a_share_the_same_examples_as_alone():
    es = FlipoutES(nn.Linear(2, 1), 0.1, 12, base_perturbations=3, seed=0)
    batch = torch.arange(12)
    alone = es.repeat(batch, examples=2).view(12, 2)
    for rank in range(2):
        es.share(rank, 2)
        mine = es.population.member_numbers()
        rows = es.repeat(batch, examples=2).view(6, 2)
        divided = es.repeat(batch[6 * rank : 6 * rank + 6], examples=2).view(6, 2)
        assert rows.equal(alone[mine])
        assert divided.equal(rows)


def test_fitness_of_16_bits_is_shaped_in_32():
    model = nn.Linear(2, 1)
    es = FlipoutES(model, 0.1, 1024, seed=0)
    fitness = torch.randn(1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    es.gradient(fitness)
    half = model.weight.grad
    es.gradient(fitness.double())
    torch.testing.assert_close(half, model.weight.grad)
