"""Rows of a batch that reach a layer out of place are refused; those in place are not."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_revflip.flipout.evolution import FlipoutES


class Sequences(nn.Module):
    """A model of words, which are (steps, rows) if the recurrent layer gets them so."""

    def __init__(self, batch_first, transpose, read):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.dropout = nn.Dropout(0.0)
        self.rnn = nn.GRU(4, 5, batch_first=batch_first)
        self.head = nn.Linear(5, 3)
        self.transpose = transpose
        self.read = read

    def forward(self, words):
        x = self.dropout(self.embedding(words)).relu()
        output, h = self.rnn(x.transpose(0, 1) if self.transpose else x)
        return self.head(self.read(output, h))


def first(output, h):
    return output[:, -1]


def last(output, h):
    return output[-1]


def state(output, h):
    return h[0]


def flat(output, h):
    return output.reshape(-1, 5)


def whole(output, h):
    return output


def turned(output, h):
    return torch.cat([output, output.tanh()], 0).chunk(2)[0].permute(1, 0, 2)


def members(model, words):
    es = FlipoutES(model, 0.3, 8, seed=0)
    with es.members():
        output = model(words)
    rows = len(output) // 8
    each = [functional_call(model, es.member(n), words) for n in range(8)]
    expected = torch.cat([part[n * rows : (n + 1) * rows] for n, part in enumerate(each)])
    return output, expected


@pytest.mark.parametrize(
    ("batch_first", "transpose", "read"),
    [
        (True, False, first),
        (True, False, state),
        (True, False, flat),
        (True, False, whole),
        (False, True, last),
        (False, True, state),
        (False, True, turned),
    ],
)
@pytest.mark.parametrize("rows", [8, 16])
def test_rows_in_place_have_the_weights_of_their_members(batch_first, transpose, read, rows):
    torch.manual_seed(0)
    output, expected = members(Sequences(batch_first, transpose, read), torch.randint(7, (rows, 8)))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("batch_first", "transpose", "read", "layer"),
    [
        (False, False, last, "rnn"),
        (False, True, flat, "head"),
        (False, True, whole, "head"),
        (True, True, first, "rnn"),
    ],
)
@pytest.mark.parametrize("rows", [8, 16])
def test_rows_out_of_place_are_refused(batch_first, transpose, read, layer, rows):
    model = Sequences(batch_first, transpose, read)
    es = FlipoutES(model, 0.3, 8, seed=0)
    message = f"{layer} would compute rows with the weights of other members"
    for _ in range(2):  # an error does not count as a check
        with pytest.raises(ValueError, match=message), es.members():
            model(torch.randint(7, (8, rows) if not transpose else (rows, 8)))


def packed(x):
    return pack_padded_sequence(x, torch.arange(1, 9), True, enforce_sorted=False)


def test_packed_sequences_have_the_weights_of_their_members():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.rnn = nn.GRU(4, 5, batch_first=True)
            self.head = nn.Linear(5, 3)

        def forward(self, words):
            output, _ = self.rnn(packed(self.embedding(words)))
            return self.head(pad_packed_sequence(output, True)[0])

    torch.manual_seed(0)
    output, expected = members(Packed(), torch.randint(7, (8, 8)))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


def test_layers_between_packing_and_unpacking_are_refused():
    """Packed data have the steps of all sequences one after the other, 36 in all here."""

    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.rnn = nn.GRU(4, 5, batch_first=True)

        def forward(self, words):
            sequences = packed(words)
            return self.rnn(sequences._replace(data=self.embedding(sequences.data)))

    es = FlipoutES(Wrong(), 0.3, 4, seed=0)
    with pytest.raises(ValueError, match="rnn would compute"), es.members():
        es.model(torch.randint(7, (8, 8)))


def test_a_flattened_image_keeps_its_rows():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )
    output, expected = members(model, torch.randn(16, 1, 6, 6))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


def test_more_rows_may_pass_through_one_layer_than_through_another():
    """Patches that are folded into the rows of their member, and back."""

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.outer = nn.Linear(12, 2)

        def forward(self, x):
            folded = self.inner(x.flatten(0, 1)).tanh()
            return self.outer(folded.view(len(x), -1))

    output, expected = members(Patches(), torch.randn(16, 3, 4))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("reorder", "allowed"),
    [
        (lambda x: x[torch.arange(8)], True),
        (lambda x: torch.stack(x.unbind(0)), True),
        (lambda x: torch.cat([x[:, :2], torch.zeros(8, 2)], 1), True),
        (lambda x: x + torch.ones(4), True),
        (lambda x: nn.functional.layer_norm(x, (4,)), True),
        (lambda x: x.clone().mul_(2), True),
        (lambda x: torch.zeros_like(x.flip(0)), True),
        (lambda x: x.flip(0), False),
        (lambda x: x[torch.arange(7, -1, -1)], False),
        (lambda x: torch.cat([x[4:], x[:4]]), False),
        (lambda x: x.T.reshape(8, 4).relu(), False),
        (lambda x: x.repeat(2, 1), False),
        (lambda x: x.repeat_interleave(2, 0), True),
    ],
    ids=[
        "index",
        "stack",
        "concatenate",
        "add",
        "normalise",
        "in-place",
        "new",
        "flip",
        "reverse",
        "swap",
        "transpose",
        "repeat",
        "interleave",
    ],
)
def test_rows_are_followed_through_functions_of_torch(reorder, allowed):
    layer = nn.Linear(4, 4)
    es = FlipoutES(layer, 0.1, 8, seed=0)
    x = torch.randn(8, 4)
    with es.members():
        if allowed:
            layer(reorder(layer(x)))
        else:
            with pytest.raises(ValueError, match="weights of other members"):
                layer(reorder(layer(x)))


def test_only_the_first_context_with_a_layer_follows_rows():
    layer = nn.Linear(4, 4)
    es = FlipoutES(layer, 0.1, 8, seed=0)
    x = torch.randn(8, 4)
    with es.members():
        pass
    with es.members():
        inside = layer(x)
        with pytest.raises(ValueError, match="weights of other members"):
            layer(inside.flip(0))
    with es.members():
        outside = layer(x)
        layer(outside.flip(0))
    assert outside.equal(inside)
    assert not vars(inside)
