"""Models whose layers members can differ in, and inputs for them."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Tied(nn.Module):
    """An embedding whose table is also the weight of the read-out, and a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=2)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        return self.head(self.hidden(self.hidden(self.embedding(words)).tanh()))


class Recurrent(nn.Module):
    """A recurrent layer, with an initial state; sequences of different lengths may be packed."""

    def __init__(self, rnn: nn.RNNBase, lengths: bool = False, state: bool = False) -> None:
        super().__init__()
        self.rnn = rnn
        self.lengths = lengths
        self.state = state

    def forward(self, x):
        state = self._initial(x) if self.state else None
        if self.lengths:
            lengths = 1 + torch.arange(len(x)) % x.shape[1]
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            packed, last = self.rnn(packed, state)
            output, _ = pad_packed_sequence(packed, batch_first=True)
        else:
            output, last = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1), state)
            output = output if self.rnn.batch_first else output.transpose(0, 1)
        last = last if isinstance(last, tuple) else (last,)
        return torch.cat(
            [output.flatten(1), *[part.transpose(0, 1).flatten(1) for part in last]], 1
        )

    def _initial(self, x):
        count = self.rnn.num_layers * (2 if self.rnn.bidirectional else 1)
        h = x.sum((1, 2)).view(1, -1, 1).expand(count, -1, self.rnn.hidden_size).sin()
        return (h, h.cos()) if isinstance(self.rnn, nn.LSTM) else h


def conv(kind, *args, shape, **kwargs):
    return (lambda: kind(*args, **kwargs)), (lambda rows: torch.randn(rows, *shape))


def words(rows):
    return torch.randint(7, (rows, 3))


def sequences(rows):
    return torch.randn(rows, 4, 3)


MODELS = {
    "linear": (lambda: nn.Linear(5, 3), lambda rows: torch.randn(rows, 5)),
    "linear-of-sequences": (lambda: nn.Linear(5, 3), lambda rows: torch.randn(rows, 2, 4, 5)),
    "linear-without-bias": (lambda: nn.Linear(5, 3, False), lambda rows: torch.randn(rows, 5)),
    "conv1d": conv(nn.Conv1d, 4, 6, 3, shape=(4, 8), groups=2, dilation=2),
    "conv2d": conv(nn.Conv2d, 3, 5, 3, shape=(3, 6, 5), padding=1, stride=2),
    "conv2d-depthwise": conv(nn.Conv2d, 4, 8, 3, shape=(4, 5, 5), groups=4, bias=False),
    "conv2d-circular": conv(
        nn.Conv2d, 2, 3, 3, shape=(2, 5, 5), padding=1, padding_mode="circular"
    ),
    "conv2d-same": conv(nn.Conv2d, 2, 3, 3, shape=(2, 5, 5), padding="same"),
    "conv3d": conv(nn.Conv3d, 2, 3, 2, shape=(2, 3, 4, 3)),
    "embedding": (lambda: nn.Embedding(7, 4), words),
    "tied": (Tied, words),
    "lstm": (lambda: Recurrent(nn.LSTM(3, 4)), sequences),
    "gru": (lambda: Recurrent(nn.GRU(3, 4, batch_first=True)), sequences),
    "gru-without-bias": (lambda: Recurrent(nn.GRU(3, 4, bias=False)), sequences),
    "lstm-deep-packed": (
        lambda: Recurrent(nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True), True, True),
        sequences,
    ),
    "gru-deep-packed": (
        lambda: Recurrent(nn.GRU(3, 4, 2, batch_first=True, bidirectional=True), True, True),
        sequences,
    ),
    "gru-with-state": (lambda: Recurrent(nn.GRU(3, 4, 2), state=True), sequences),
    "mlp": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)),
        lambda rows: torch.randn(rows, 2, 3),
    ),
}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
