"""FGSM and PGD: equal to their formulas, within the ball and the range, and worth their cost."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_revflip.applications import NetworkPredictor, PosteriorPredictor, fgsm, pgd
from tests.helpers.applications import FixedSamples, images, network, samples_around

NORMS = ["linf", "l2"]


def norm_of(change, norm):
    order = float("inf") if norm == "linf" else 2
    return torch.linalg.vector_norm(change.flatten(1), order, dim=1)


def slope(module, x, labels):
    """Gradient of the cross-entropy, by autograd."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(module(x), labels, reduction="sum"), x)[0]


def plain_pgd(module, inputs, labels, start, epsilon, step, steps):
    """The formula of Madry et al., clipped to 0 and 1."""
    x = (inputs + start).clamp(0, 1)
    for _ in range(steps):
        x = x + step * slope(module, x, labels).sign()
        x = torch.min(torch.max(x, inputs - epsilon), inputs + epsilon).clamp(0, 1)
    return x


def double():
    return network(norm=True).double().eval(), images(16)[0].double(), images(16)[1]


# --- equal to the definition -----------------------------------------------------------------


def test_fgsm_is_one_step_along_the_sign_of_the_gradient():
    module, inputs, labels = double()
    expected = (inputs + 0.1 * slope(module, inputs, labels).sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(NetworkPredictor(module), inputs, labels, 0.1), expected)


def test_fgsm_in_the_euclidean_norm_is_one_step_along_the_gradient():
    module, inputs, labels = double()
    gradient = slope(module, inputs, labels)
    step = 0.5 * gradient / norm_of(gradient, "l2").view(-1, 1, 1, 1)
    found = fgsm(NetworkPredictor(module), inputs, labels, 0.5, norm="l2")
    torch.testing.assert_close(found, (inputs + step).clamp(0, 1))


@pytest.mark.parametrize("random_start", [False, True])
def test_pgd_is_the_formula_of_the_paper(random_start):
    module, inputs, labels = double()
    start = torch.zeros_like(inputs)
    if random_start:
        start.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(7))
    expected = plain_pgd(module, inputs, labels, start, 0.2, 0.03, 10)
    found = pgd(
        NetworkPredictor(module),
        inputs,
        labels,
        0.2,
        steps=10,
        step_size=0.03,
        random_start=random_start,
        generator=torch.Generator().manual_seed(7),
    )
    torch.testing.assert_close(found, expected)


def test_attacks_are_those_of_torchattacks():
    torchattacks = pytest.importorskip("torchattacks")
    module, inputs, labels = double()
    predictor = NetworkPredictor(module)
    theirs = torchattacks.FGSM(module, eps=0.1)(inputs, labels)
    torch.testing.assert_close(fgsm(predictor, inputs, labels, 0.1), theirs)
    for random_start in (False, True):
        attack = torchattacks.PGD(module, 0.2, alpha=0.03, steps=10, random_start=random_start)
        torch.manual_seed(3)
        theirs = attack(inputs, labels)
        torch.manual_seed(3)
        ours = pgd(
            predictor, inputs, labels, 0.2, steps=10, step_size=0.03, random_start=random_start
        )
        torch.testing.assert_close(ours, theirs)
    theirs = torchattacks.PGDL2(module, 1.0, alpha=0.2, steps=10, random_start=False)(
        inputs, labels
    )
    ours = pgd(
        predictor, inputs, labels, 1.0, steps=10, step_size=0.2, random_start=False, norm="l2"
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("norm", NORMS)
def test_linear_classifier_of_two_classes_loses_as_much_as_it_can(norm):
    """In closed form: the margin falls by epsilon times the dual norm of the weights."""
    torch.manual_seed(0)
    module = nn.Linear(5, 2).double()
    inputs, labels = torch.full((4, 5), 0.5).double(), torch.tensor([0, 1, 0, 1])
    weights = (module.weight[1] - module.weight[0]).detach()
    dual = weights.abs().sum() if norm == "linf" else weights.norm()

    def margin(x):
        logits = module(x).detach()
        own = logits.gather(1, labels[:, None])
        return (own - logits.gather(1, 1 - labels[:, None])).squeeze(1)

    for attack in (fgsm, functools.partial(pgd, steps=30, random_start=False)):
        found = attack(NetworkPredictor(module), inputs, labels, 0.3, norm=norm)
        torch.testing.assert_close(margin(found), margin(inputs) - 0.3 * dual, rtol=1e-4, atol=1e-6)


def test_attack_on_an_ensemble_is_along_the_gradient_of_its_mean():
    module = network().double()
    inputs, labels = images(16)[0].double(), images(16)[1]
    samples = {name: value.double() for name, value in samples_around(module, 6).items()}
    predictor = PosteriorPredictor(FixedSamples(samples), module, chunk_size=4)
    x = inputs.clone().requires_grad_()
    probs = torch.stack(
        [
            torch.func.functional_call(module, {k: v[i] for k, v in samples.items()}, (x,)).softmax(
                -1
            )
            for i in range(6)
        ]
    )
    loss = F.nll_loss(probs.mean(0).log(), labels, reduction="sum")
    expected = (inputs + 0.1 * torch.autograd.grad(loss, x)[0].sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(predictor, inputs, labels, 0.1), expected)


# --- within bounds ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    attack=st.sampled_from([fgsm, functools.partial(pgd, steps=3, step_size=0.4)]),
    norm=st.sampled_from(NORMS),
    low=st.floats(-3, 1),
    width=st.floats(0.1, 5),
    share=st.floats(0, 1),
    targeted=st.booleans(),
)
def test_change_stays_in_the_ball_and_in_the_range(attack, norm, low, width, share, targeted):
    inputs, labels = images(6)
    inputs = (low + width * inputs).clamp(low, low + width)
    epsilon = share * width
    found = attack(
        NetworkPredictor(network()),
        inputs,
        labels,
        epsilon,
        norm=norm,
        data_range=(low, low + width),
        targeted=targeted,
    )
    # Rounding of float32 at numbers of this size.
    assert (norm_of(found - inputs, norm) <= epsilon + 1e-5).all()
    lowest, highest = torch.tensor([low, low + width])
    assert ((found >= lowest) & (found <= highest)).all()
    assert found.shape == inputs.shape
    assert not found.requires_grad


@pytest.mark.parametrize("attack", [fgsm, pgd], ids=["fgsm", "pgd"])
@pytest.mark.parametrize("norm", NORMS)
def test_epsilon_0_changes_nothing(attack, norm):
    inputs, labels = images(6)
    assert torch.equal(attack(NetworkPredictor(network()), inputs, labels, 0, norm=norm), inputs)


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball(norm):
    """With steps of size 0 the start is what is left."""
    inputs = torch.full((2000, 2), 0.5)
    start = pgd(
        NetworkPredictor(nn.Linear(2, 2)),
        inputs,
        torch.zeros(2000, dtype=torch.int64),
        0.4,
        norm=norm,
        steps=1,
        step_size=0,
        generator=torch.Generator().manual_seed(0),
    )
    radius = norm_of(start - inputs, norm) / 0.4
    # Uniform in two dimensions: the square of the radius is uniform, in both norms. The
    # Kolmogorov-Smirnov distance of 2,000 draws is below 1.95 / sqrt(2000) with p = 0.999.
    squares = radius.square().sort().values
    distance = (squares - torch.linspace(0, 1, 2000)).abs().max()
    assert distance < 1.95 / 2000**0.5


# --- worth their cost ------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_finds_a_loss_at_least_that_of_fgsm(norm):
    module = nn.Sequential(nn.Flatten(), nn.Linear(72, 40), nn.ReLU(), nn.Linear(40, 4))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)  # strongly curved, so that one step is not enough
    predictor, (inputs, labels) = NetworkPredictor(module), images(64)
    epsilon = 0.2 if norm == "linf" else 1.0
    generator = torch.Generator().manual_seed(0)
    loss = {
        name: -predictor.log_likelihood(
            attack(predictor, inputs, labels, epsilon, norm=norm), labels
        )[0]
        for name, attack in {
            "one step": fgsm,
            "many": functools.partial(pgd, steps=40, generator=generator),
            "several times": functools.partial(pgd, steps=40, restarts=5, generator=generator),
        }.items()
    }
    assert loss["many"].mean() > loss["one step"].mean() > 0
    assert loss["several times"].mean() > loss["many"].mean()
    assert (loss["several times"] >= loss["one step"] - 1e-3).double().mean() > 0.95


def test_restarts_keep_for_each_input_what_misleads():
    module, (inputs, labels) = network(), images(64)
    predictor = NetworkPredictor(module)

    def wrong(restarts, seed):
        generator = torch.Generator().manual_seed(seed)
        found = pgd(
            predictor, inputs, labels, 0.03, steps=2, restarts=restarts, generator=generator
        )
        return predictor(found)[0].argmax(-1) != labels

    # The first of the restarts draws what a single run draws.
    first, all_of_them = wrong(1, 5), wrong(6, 5)
    assert (all_of_them | ~first).all()
    assert all_of_them.sum() >= first.sum()


@pytest.mark.parametrize("attack", [fgsm, pgd], ids=["fgsm", "pgd"])
def test_targeted_attack_makes_the_target_likelier(attack):
    predictor, (inputs, labels) = NetworkPredictor(network()), images(32)
    target = (labels + 1) % 4
    before, _ = predictor.log_likelihood(inputs, target)
    found = attack(predictor, inputs, target, 0.1, targeted=True)
    after, _ = predictor.log_likelihood(found, target)
    assert (after > before).all()


def test_small_gradients_have_a_direction_in_the_euclidean_norm():
    """Of a network so confident that squares of its gradients are 0 in float32."""
    module = nn.Linear(2, 2, bias=False)
    module.weight.data.copy_(torch.tensor([[60.0, 0.0], [0.0, 0.0]]))
    inputs = torch.tensor([[1.0, 0.5]])
    found = fgsm(NetworkPredictor(module), inputs, torch.tensor([0]), 0.25, norm="l2")
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.5]]))


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": 1.5}, "epsilon must be from 0 to 1, .* got 1.5"),
        ({"epsilon": -0.1}, "epsilon must be from 0 to 1, .* got -0.1"),
        ({"epsilon": float("nan")}, "epsilon must be from 0 to 1"),
        ({"data_range": (0, 0.5)}, "inputs must be from 0 to 0.5, the data_range, got 0.0"),
        ({"data_range": (1, 0)}, "data_range must be"),
        ({"norm": "l1"}, "norm must be 'linf' or 'l2', got 'l1'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"restarts": 0}, "restarts must be at least 1, got 0"),
        ({"restarts": 2, "random_start": False}, "restarts need random_start"),
        ({"step_size": -1.0}, "step_size must not be negative, got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense_are_rejected(settings, message):
    inputs, labels = images(4)
    with pytest.raises(ValueError, match=message):
        pgd(NetworkPredictor(network()), inputs, labels, **{"epsilon": 0.1, **settings})


def test_integer_inputs_and_diverged_networks_are_named():
    inputs, labels = images(4)
    with pytest.raises(ValueError, match="floating-point numbers, got torch.int64"):
        fgsm(NetworkPredictor(network()), inputs.long(), labels, 0.1)
    module = network()
    module[-1].bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="has the model diverged"):
        fgsm(NetworkPredictor(module), inputs, labels, 0.1)
