"""Modules that compute predictions in many ways, and predictions one sample at a time."""

import copy

import torch
from torch import nn


def one_by_one(module, parameters, *arguments):
    """Outputs of each sample, loaded into a copy of the module in eval mode."""
    network = copy.deepcopy(module).eval()
    count = len(next(iter(parameters.values())))
    outputs = []
    for index in range(count):
        state = {name: value[index] for name, value in parameters.items()}
        network.load_state_dict(state, strict=False)
        with torch.no_grad():
            outputs.append(network(*arguments))
    return torch.stack(outputs)


def stacked(module, count=5, seed=0):
    """Samples around the parameters of a module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value.detach() + 0.3 * torch.randn(count, *value.shape, generator=generator)
        for name, value in module.named_parameters()
    }


class LastState(nn.Module):
    """A recurrent network and a read-out of its last output."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        self.read_out = nn.Linear(rnn.hidden_size, 3)

    def forward(self, x):
        return self.read_out(self.rnn(x)[0][:, -1])


class Attention(nn.Module):
    """Self-attention and a mean over positions."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0].mean(1)


class Branching(nn.Module):
    """Control flow that depends on the outputs, without gradients."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        outputs = self.linear(x)
        with torch.no_grad():
            positive = bool(outputs.sum() > 0)
        return outputs if positive else 2 * outputs.flip(-1)


class InPlace(nn.Module):
    """Writes outputs into a tensor that is the same for all samples."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        outputs = torch.zeros(len(x), 3)
        outputs += self.linear(x)
        return outputs


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu())


class TwoInputs(nn.Module):
    """Takes two tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x, y):
        return self.first(x) + self.second(y)
