"""Layers that stand in for others take the arguments of these by the same names, in their order."""

import inspect

import pytest
import torch
from torch import nn

from lightning_revflip.flipout import FLIPOUT_LAYERS, FlipoutConv2d, FlipoutGRU, FlipoutLSTM
from lightning_revflip.reversible import RevGRU, RevLSTM
from lightning_revflip.reversible_flipout import REVERSIBLE_FLIPOUT_LAYERS

PAIRS = {**FLIPOUT_LAYERS, **REVERSIBLE_FLIPOUT_LAYERS}


def arguments_of(layer: type[nn.Module]) -> dict[str, object]:
    """Names and defaults of the constructor, as written."""
    written = layer if layer not in (nn.LSTM, nn.GRU) else nn.RNNBase  # these take *args
    parameters = inspect.signature(written.__init__).parameters
    return {n: p.default for n, p in parameters.items() if n not in ("self", "mode")}


@pytest.mark.parametrize("plain", PAIRS, ids=lambda plain: plain.__name__)
def test_arguments_are_those_of_the_plain_layer_and_then_those_of_flipout(plain):
    expected, found = arguments_of(plain), arguments_of(PAIRS[plain])
    assert list(found.items())[: len(expected)] == list(expected.items())
    further = set(found) - set(expected)
    assert {"perturbation", "estimator", "base_perturbations"} <= further
    assert further <= {
        *("perturbation", "estimator", "base_perturbations"),
        *("example_dim", "perturbed"),
    }


@pytest.mark.parametrize(("plain", "reversible"), [(nn.GRU, RevGRU), (nn.LSTM, RevLSTM)])
def test_reversible_layers_take_the_arguments_of_the_layers_they_replace(plain, reversible):
    expected, found = arguments_of(plain), arguments_of(reversible)
    assert {name: found[name] for name in expected} == expected
    positional = list(expected)[: list(expected).index("proj_size")]
    assert list(found)[: len(positional)] == positional


def test_arguments_reach_the_plain_layer():
    conv = FlipoutConv2d(4, 6, (3, 1), 2, "valid", 1, 2, False, "zeros", "cpu", torch.float64)
    plain = nn.Conv2d(4, 6, (3, 1), 2, "valid", 1, 2, False, "zeros", "cpu", torch.float64)
    assert conv.extra_repr().startswith(plain.extra_repr())
    assert conv.weight.dtype == torch.float64
    for layer, like in ((FlipoutLSTM, nn.LSTM), (FlipoutGRU, nn.GRU)):
        rnn = layer(4, 6, 2, False, True, 0.5, True, dtype=torch.float64)
        assert rnn.extra_repr().startswith(
            like(4, 6, 2, False, True, 0.5, True, dtype=torch.float64).extra_repr()
        )
        assert rnn.weight_hh_l1_reverse.dtype == torch.float64
