"""FlipoutES: each row has the weights of its member, and the estimate is the formula's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_revflip.flipout.evolution import FlipoutES
from tests.helpers.evolution_models import MODELS, mlp

SETTINGS = [(1, True), (3, True), (4, False)]
"""Base perturbations, and whether members come in pairs."""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def flat_grad(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


# --- members -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "antithetic", "rows"), [(1, True, 1), (3, True, 3), (4, False, 2)]
)
@pytest.mark.parametrize("name", MODELS)
def test_each_row_is_computed_with_the_weights_of_its_member(name, groups, antithetic, rows):
    make, draw = MODELS[name]
    model = make()
    es = FlipoutES(model, 0.3, 12, groups, antithetic, seed=1)
    x = draw(12 * rows)
    with es.members():
        output = model(x)

    # Lengths of packed sequences follow from the place in the batch: give every model all rows.
    each = [functional_call(model, es.member(n), x)[n * rows : (n + 1) * rows] for n in range(12)]
    assert not torch.allclose(output, model(x), atol=0.01)
    torch.testing.assert_close(output, torch.cat(each), atol=1e-5, rtol=1e-4)


def test_members_differ_from_one_another_and_from_generation_to_generation():
    model = nn.Linear(30, 20)
    es = FlipoutES(model, 0.1, 64, base_perturbations=2, seed=0)
    weights = [es.member(n)["weight"] for n in range(64)]
    es.next_generation()
    weights += [es.member(n)["weight"] for n in range(64)]
    assert len({tuple(w.flatten().tolist()) for w in weights}) == 128


@pytest.mark.parametrize("groups", [1, 4])
def test_perturbations_have_mean_0_and_the_given_standard_deviation(groups):
    model = nn.Linear(40, 30)
    es = FlipoutES(model, 0.2, 32, groups, seed=0)
    deltas = torch.stack([es.member(n)["weight"] - model.weight for n in range(32)]).detach()
    biases = torch.stack([es.member(n)["bias"] - model.bias for n in range(0, 32, 32)]).detach()
    # 1,200 weights: their mean square has a relative standard deviation of sqrt(2 / 1200) = 4 %.
    assert deltas.square().mean().sqrt() == pytest.approx(0.2, rel=0.1)
    torch.testing.assert_close(deltas.mean(0), torch.zeros(30, 40), atol=1e-6, rtol=0)
    assert biases.square().mean().sqrt() == pytest.approx(0.2, rel=0.5)


def test_second_half_of_a_group_is_the_first_with_opposite_sign():
    model = mlp()
    es = FlipoutES(model, 0.2, 12, base_perturbations=3, seed=0)
    for name, mean in model.named_parameters():
        deltas = [es.member(n)[name] - mean for n in range(12)]
        for forwards in (0, 1, 4, 5, 8, 9):
            torch.testing.assert_close(deltas[forwards], -deltas[forwards + 2])


def test_model_is_itself_again_after_the_context():
    model = mlp()
    x = torch.randn(8, 4).double()
    before, names = model(x), list(model.state_dict())
    es = FlipoutES(model, 0.2, 8, seed=0)
    with es.members():
        inside = model(x)
    assert not inside.equal(before)
    assert not inside.requires_grad
    assert model(x).equal(before)
    assert list(model.state_dict()) == names
    assert "forward" not in vars(model[0])
    with pytest.raises(RuntimeError, match="in the middle"), es.members():
        raise RuntimeError("in the middle")
    assert model(x).equal(before)


@pytest.mark.parametrize("name", ["mlp", "lstm", "conv2d"])
def test_kept_draws_are_the_same_as_new_ones(name):
    make, draw = MODELS[name]
    model, x = make(), draw(8)
    es = FlipoutES(model, 0.2, 8, 2, seed=0)
    with es.members():
        expected = model(x)
    with es.members(keep_draws=True):
        assert model(x).equal(expected)
        assert model(x).equal(expected)


def test_a_wrapped_forward_stays_wrapped():
    model = nn.Linear(2, 2)
    original = model.forward
    model.forward = lambda x: original(x) + 1
    before = model.forward
    with FlipoutES(model, 0.2, 4, seed=0).members():
        assert model.forward is not before
    assert model.forward is before


def test_large_inputs_are_perturbed_part_by_part(monkeypatch):
    model, x = nn.Linear(6, 3), torch.randn(24, 6)
    es = FlipoutES(model, 0.2, 8, seed=0)
    with es.members():
        expected = model(x)
    monkeypatch.setattr("lightning_revflip.flipout.evolution.layers._NUMBERS_AT_ONCE", 50)
    with es.members():
        torch.testing.assert_close(model(x), expected)


def test_autocast_gives_members_in_its_dtype():
    model, x = mlp().float(), torch.randn(8, 4)
    es = FlipoutES(model, 0.2, 8, seed=0)
    with es.members():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.03, rtol=0.03)


# --- the estimate ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "antithetic", "shaping"),
    [(1, True, "none"), (3, True, "rank"), (4, False, "standardized")],
)
@pytest.mark.parametrize("name", MODELS)
def test_gradient_is_the_mean_of_weighted_perturbations(name, groups, antithetic, shaping):
    model = MODELS[name][0]().double()
    es = FlipoutES(model, 0.3, 12, groups, antithetic, shaping=shaping, seed=1)
    fitness = torch.randn(12, dtype=torch.float64)
    es.gradient(fitness)

    shaped = {
        "none": fitness,
        "rank": fitness.argsort().argsort() / 11 - 0.5,
        "standardized": (fitness - fitness.mean()) / fitness.std(correction=0),
    }[shaping]
    for key, mean in model.named_parameters():
        deltas = torch.stack([es.member(n)[key] - mean for n in range(12)])
        expected = torch.tensordot(shaped.double(), deltas, 1) / (12 * 0.3**2)
        torch.testing.assert_close(mean.grad, -expected)


@pytest.mark.parametrize(("groups", "antithetic"), SETTINGS)
def test_estimates_average_to_the_gradient_of_the_smoothed_function(groups, antithetic):
    """F(w) = b.w - w'Aw/2 - c, whose smoothed version has the same gradient b - Aw."""
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    es = FlipoutES(model, 0.5, 48, groups, antithetic, shaping="none", seed=3)
    A = torch.randn(6, 6, dtype=torch.float64)
    A = A @ A.T / 6
    b = torch.randn(6, dtype=torch.float64)
    w = model.weight.detach().flatten()
    estimates = []
    for _ in range(800):
        with es.members():
            columns = model(es.repeat(torch.eye(3, dtype=torch.float64)))
        members = columns.view(48, 3, 2).mT.flatten(1)
        values = members @ b - ((members @ A) * members).sum(1) / 2
        es.gradient(values)
        estimates.append(-model.weight.grad.flatten())
        es.next_generation()
    estimates = torch.stack(estimates)
    error = estimates.std(0) / 800**0.5
    # 6 numbers, each within 4 standard errors but once in 2,600 seeds.
    assert ((estimates.mean(0) - (b - A @ w)).abs() < 4 * error).all()


def test_a_constant_cancels_between_antithetic_members():
    model = mlp()
    es = FlipoutES(model, 0.2, 16, 2, shaping="none", seed=0)
    fitness = torch.randn(16).double()
    es.gradient(fitness)
    before = flat_grad(model)
    es.gradient(fitness + 1000)
    torch.testing.assert_close(flat_grad(model), before, atol=1e-9, rtol=1e-9)


def test_rank_shaping_sees_only_the_order():
    model = mlp()
    es = FlipoutES(model, 0.2, 16, seed=0)
    fitness = torch.randn(16).double()
    es.gradient(fitness)
    before = flat_grad(model)
    es.gradient(fitness.exp() * 5 + 2)
    assert flat_grad(model).equal(before)


def test_gradient_returns_the_fitness_and_accumulates_on_demand():
    model = mlp()
    es = FlipoutES(model, 0.2, 8, seed=0)
    fitness = torch.randn(8)
    assert es.gradient(fitness).equal(fitness)
    once = flat_grad(model)
    es.gradient(fitness, accumulate=True, scale=0.5)
    torch.testing.assert_close(flat_grad(model), 1.5 * once)
    es.gradient(fitness)
    assert flat_grad(model).equal(once)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5),
    "adam": lambda p: torch.optim.Adam(p, lr=0.03),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_raises_the_fitness(name):
    model = mlp().float()
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    es = FlipoutES(model, 0.1, 64, 4, seed=0)
    optimizer = OPTIMIZERS[name](model.parameters())
    start = F.cross_entropy(model(x), y)
    for _ in range(60):
        with es.members():
            losses = F.cross_entropy(model(es.repeat(x)), es.repeat(y), reduction="none")
        es.gradient(-losses.view(64, 20).mean(1))
        optimizer.step()
        es.next_generation()
    assert F.cross_entropy(model(x), y) < 0.8 * start


def test_padding_of_an_embedding_gets_no_gradient():
    model = nn.Embedding(5, 3, padding_idx=1)
    es = FlipoutES(model, 0.2, 8, seed=0)
    es.gradient(torch.randn(8))
    assert (model.weight.grad[1] == 0).all()
    assert (model.weight.grad[[0, 2, 3, 4]] != 0).all()
