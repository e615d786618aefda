"""What a call keeps for its backward pass, and what it takes on the way."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from lightning_revflip.flipout import (
    DropConnect,
    FlipoutConv2d,
    FlipoutEmbedding,
    FlipoutLinear,
    Gaussian,
    MultiplicativeGaussian,
)

PERTURBATIONS = [Gaussian(), MultiplicativeGaussian(), DropConnect()]


def kept_by(call):
    """Storages that the graph of a call keeps: bytes by address."""
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = call()
    return kept, output


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def memory_of(call):
    """Bytes that a call holds at most, and at its end, beyond what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    now = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    del result
    return peak, now


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=repr)
@pytest.mark.parametrize("bases", [1, 4])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda **kwargs: FlipoutLinear(64, 32, **kwargs), (16, 64)),
        (lambda **kwargs: FlipoutConv2d(8, 16, 3, **kwargs), (16, 8, 9, 9)),
    ],
    ids=["linear", "conv"],
)
def test_a_call_keeps_input_and_parameters_only(make, shape, bases, perturbation):
    layer, x = make(perturbation=perturbation, base_perturbations=bases), torch.randn(shape)
    kept, output = kept_by(lambda: layer(x.requires_grad_()))
    assert set(kept) <= storages([x, *layer.parameters()])
    _, held = memory_of(lambda: layer(x))  # nothing hidden elsewhere, such as on the context
    assert held <= output.nbytes


@pytest.mark.parametrize("bases", [1, 4])
def test_calls_keep_nothing_on_the_layer(bases):
    layer = FlipoutLinear(64, 32, base_perturbations=bases)
    before = {name: id(value) for name, value in vars(layer).items()}
    layer(torch.randn(16, 64)).sum()
    assert {name: id(value) for name, value in vars(layer).items()} == before
    assert not list(layer.buffers())


def test_an_embedding_keeps_no_more_than_its_output():
    layer = FlipoutEmbedding(10_000, 16)
    words = torch.randint(50, (8, 20))
    kept, output = kept_by(lambda: layer(words))
    beyond = {
        address: size
        for address, size in kept.items()
        if address not in storages(layer.parameters())
    }
    assert sum(beyond.values()) <= 2 * output.nbytes < layer.weight.nbytes


@pytest.mark.parametrize("bases", [1, 2, 32])
@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=repr)
def test_forward_and_backward_take_few_copies_of_the_weight_at_once(bases, perturbation):
    size, batch = 512, 32
    layer = FlipoutLinear(size, size, perturbation=perturbation, base_perturbations=bases)
    x = torch.randn(batch, size)
    layer(x).sum().backward()
    layer.zero_grad()
    weight = layer.weight.nbytes
    peak, _ = memory_of(lambda: layer(x).sum().backward())
    # The gradients that stay are one or two weights, inputs and outputs a sixteenth each; the rest
    # is dW and its gradient of one group. It does not grow with the groups.
    assert peak < (3.5 if bases == 1 else 4.5) * weight


def test_a_convolution_takes_little_beyond_a_plain_one():
    torch.manual_seed(0)
    x = torch.randn(32, 32, 24, 24)
    peaks = []
    for layer in (nn.Conv2d(32, 32, 3, padding=1), FlipoutConv2d(32, 32, 3, padding=1)):
        layer(x).sum().backward()
        layer.zero_grad()
        peaks.append(memory_of(lambda layer=layer: layer(x).sum().backward())[0])
    assert peaks[1] < 2.5 * peaks[0]
