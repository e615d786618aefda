"""FlipoutES names what it cannot do, and says what to do instead."""

import pytest
import torch
from torch import nn

from lightning_revflip.flipout.evolution import FlipoutES
from lightning_revflip.flipout.evolution.fitness import shape_fitness
from tests.helpers.evolution_models import mlp


def parametrized_linear():
    return nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))


def weight_norm_linear():
    linear = nn.Linear(2, 2)
    linear.weight_v = nn.Parameter(linear.weight.detach().clone())
    del linear.weight
    linear.weight = linear.weight_v / 2
    return linear


def tied_convolutions():
    model = nn.Sequential(nn.Conv1d(2, 4, 1, groups=2), nn.Conv1d(1, 4, 1))
    model[1].weight = model[0].weight
    return model


def late_padding():
    model = nn.Sequential(nn.Linear(4, 7), nn.Embedding(7, 4, padding_idx=0))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "1 \\(LayerNorm\\)"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "1 \\(BatchNorm1d\\)"),
        (lambda: nn.TransformerEncoderLayer(4, 2), "self_attn .*out_proj.*norm1"),
        (lambda: nn.RNN(2, 2), "the model itself \\(RNN\\)"),
        (lambda: nn.LSTM(4, 4, proj_size=2), "proj_size"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (parametrized_linear, "ParametrizedLinear"),
        (weight_norm_linear, "computed from others"),
        (tied_convolutions, "1.weight is also 0.weight"),
        (late_padding, "padding_idx=0"),
        (nn.ReLU, "no parameter to perturb"),
        (lambda: nn.Linear(2, 2).requires_grad_(False), "no parameter to perturb"),
    ],
    ids=[
        "layer-norm",
        "batch-norm",
        "attention",
        "rnn",
        "proj-size",
        "max-norm",
        "parametrized",
        "weight-norm",
        "tied-convolutions",
        "late-padding",
        "no-parameters",
        "frozen",
    ],
)
def test_parameters_that_cannot_be_perturbed_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        FlipoutES(make(), 0.1, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, "sigma must be a positive"),
        ({"sigma": float("nan")}, "sigma must be a positive"),
        ({"sigma": "0.1"}, "sigma must be a positive"),
        ({"population": 0}, "population must be a whole number from 1, got 0"),
        ({"population": 64.0}, "population must be a whole number from 1, got 64.0"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"population": 7}, "antithetic pairs.*multiple of 2"),
        ({"population": 8, "base_perturbations": 3}, "multiple of 6"),
        (
            {"population": 8, "base_perturbations": 0},
            "base_perturbations must be a whole number from 1",
        ),
        ({"population": 5, "base_perturbations": 2, "antithetic": False}, "multiple of 2"),
        ({"shaping": "ranks"}, "shaping must be one of"),
        ({"targets": ["missing.*"]}, "'missing.\\*' fits no module"),
        ({"targets": "net.1"}, "targets must be a list of patterns or types, got 'net.1'"),
        ({"targets": nn.Linear}, "targets must be a list of patterns or types"),
        ({"targets": [1]}, "targets must be a list of patterns or types"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FlipoutES(**{"model": mlp(), "sigma": 0.1, "population": 4, **settings})


def test_wrong_rows_fitness_and_use_are_refused():
    model = mlp().float()
    es = FlipoutES(model, 0.1, 4, seed=0)
    with es.members():
        with pytest.raises(ValueError, match=r"0 got an input of shape \(6, 4\).*4 members"):
            model(torch.randn(6, 4))
        with pytest.raises(ValueError, match="rows of members first"):
            model(torch.randn(4))
        with pytest.raises(ValueError, match="open already"), es.members():
            pass
    with pytest.raises(ValueError, match=r"each of 4 members, got shape \(3,\)"):
        es.gradient(torch.zeros(3))
    with pytest.raises(ValueError, match="not finite: 1, 2"):
        es.gradient(torch.tensor([0.0, float("nan"), float("inf"), 1.0]))
    with pytest.raises(ValueError, match="no member 4"):
        es.member(4)
    with pytest.raises(ValueError, match="equally many examples"):
        es.repeat((torch.zeros(2), torch.zeros(3)))
    for examples in (0, 2.5):
        with pytest.raises(ValueError, match=f"whole number from 1, or None.*got {examples}"):
            es.repeat(torch.zeros(2), examples=examples)
    with pytest.raises(ValueError, match=r"got shape \(\), one number for all.*reduction='none'"):
        es.fitness_of_losses(torch.tensor(1.0))
    with pytest.raises(ValueError, match="Call `gradient` before"):
        es.gradient_norm()
    with pytest.raises(ValueError, match="divided equally over 3"):
        es.share(0, 3)
    with pytest.raises(ValueError, match="rank must be"):
        es.share(2, 2)


def test_normalisation_over_the_batch_must_not_train():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False))
    es = FlipoutES(model, 0.1, 4, seed=0)
    with pytest.raises(ValueError, match=r"1 would normalise.*eval\(\)"), es.members():
        pass
    model.eval()
    with es.members():
        assert model(torch.randn(4, 2)).shape == (4, 3)


@pytest.mark.parametrize(
    ("fitness", "shaping", "message"),
    [
        (torch.zeros(3), "best", "shaping must be one of"),
        (torch.zeros(3, 1), "rank", "one floating point number for each"),
        (torch.zeros(3, dtype=torch.int64), "rank", "of torch.int64"),
        (torch.tensor([0.0, float("inf")]), "none", "1 of 2 members is not finite: 1"),
    ],
    ids=["shaping", "shape", "dtype", "infinite"],
)
def test_fitness_that_cannot_be_shaped_is_refused(fitness, shaping, message):
    with pytest.raises(ValueError, match=message):
        shape_fitness(fitness, shaping)
