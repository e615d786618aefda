"""Embedding and weight dropout of the PTB recipe."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_revflip.reversible import RevGRU, RevLSTM
from recipes.ptb.dropout import EmbeddingWithDropout, drop_weights


def test_embedding_dropout_drops_a_word_wherever_it_occurs():
    embedding = EmbeddingWithDropout(500, 4, 0.5)
    words = torch.arange(500)
    inputs = torch.stack([words, words.flip(0)], dim=1)
    dropped = embedding(inputs)
    first, second = dropped[:, 0], dropped[:, 1].flip(0)
    assert torch.equal(first, second)
    gone = (first == 0).all(1)
    assert gone.float().mean().item() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(first[~gone], embedding.weight[~gone] / 0.5)
    assert not torch.equal(embedding(inputs), embedding(inputs))  # drawn anew in every call


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_embedding_without_dropout_is_an_ordinary_one_and_draws_nothing(p, training):
    embedding = EmbeddingWithDropout(50, 4, p).train(training)
    inputs = torch.randint(50, (5, 3))
    before = torch.get_rng_state()
    assert torch.equal(embedding(inputs), F.embedding(inputs, embedding.weight))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(embedding.state_dict()) == ["weight"]


def test_embedding_dropout_outside_its_range_is_rejected():
    with pytest.raises(ValueError, match="at least 0 and below 1, got 1"):
        EmbeddingWithDropout(50, 4, 1.0)


def call_with_weight_drop(rnn, p, inputs):
    return functional_call(rnn, drop_weights(rnn, p), inputs)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, RevLSTM, RevGRU])
def test_weight_drop_computes_with_a_masked_copy_of_the_recurrent_weights(cell):
    torch.manual_seed(0)
    rnn = cell(6, 8, num_layers=2)
    inputs = torch.randn(5, 3, 6)
    reference = copy.deepcopy(rnn)
    torch.manual_seed(1)
    with torch.no_grad():
        masks = {
            name: F.dropout(torch.ones(parameter.shape), 0.5)
            for name, parameter in rnn.named_parameters()
            if name in ("weight_hh_l0", "weight_hh_l1")
        }
        for name, mask in masks.items():
            reference.get_parameter(name).mul_(mask)

    torch.manual_seed(1)
    output, _ = call_with_weight_drop(rnn, 0.5, inputs)
    expected, _ = reference(inputs)
    torch.testing.assert_close(output, expected)

    output.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in rnn.named_parameters():
        gradient = reference.get_parameter(name).grad * masks.get(name, 1)  # the chain rule
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("cell", [nn.LSTM, RevLSTM])
def test_weight_drop_leaves_the_module_as_it_was(cell):
    rnn = cell(6, 8)
    before = copy.deepcopy(rnn.state_dict())
    inputs = torch.randn(5, 3, 6)
    whole, _ = rnn(inputs)
    call_with_weight_drop(rnn, 0.5, inputs)
    after, _ = call_with_weight_drop(rnn, 0.0, inputs)
    torch.testing.assert_close(after, whole)
    assert list(rnn.state_dict()) == list(before)
    assert all(torch.equal(rnn.state_dict()[name], before[name]) for name in before)
    assert all(isinstance(weight, nn.Parameter) for weight in rnn.parameters())


def test_weight_drop_draws_a_new_mask_at_every_call():
    rnn, inputs = nn.LSTM(6, 8), torch.randn(5, 3, 6)
    outputs = [call_with_weight_drop(rnn, 0.5, inputs)[0] for _ in range(2)]
    assert not torch.equal(*outputs)


def test_weight_drop_of_a_module_without_recurrent_weights_is_rejected():
    with pytest.raises(ValueError, match=r"weight_hh_l0.*Linear has .*weight"):
        drop_weights(nn.Linear(2, 2), 0.5)
