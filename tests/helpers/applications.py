"""Small networks, images and posteriors of known samples for anomalies and attacks."""

import torch
from torch import nn

from lightning_revflip.posterior import Layout, Posterior
from tests.helpers.predictors import stacked

SHAPE = (2, 6, 6)
CLASSES = 4


def images(count, seed=0):
    """Images from 0 to 1 and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return torch.rand(count, *SHAPE, generator=generator), labels


def network(dropout=0.0, norm=False, seed=0):
    """A small convolutional network, in training mode."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.BatchNorm2d(3) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(48, CLASSES),
        )
    return module


def samples_around(module, count):
    return stacked(module, count)


class FixedSamples(Posterior):
    """The samples that it is given, in their order."""

    def __init__(self, samples):
        self.samples = samples
        shapes = tuple(tuple(value.shape[1:]) for value in samples.values())
        self.layout = Layout(tuple(samples), shapes)

    def sample(self, n, generator=None):
        return {name: value[:n] for name, value in self.samples.items()}

    def __len__(self):
        return len(next(iter(self.samples.values())))

    @property
    def nbytes(self):
        return sum(value.nbytes for value in self.samples.values())

    def save(self, path):
        raise NotImplementedError

    @classmethod
    def load(cls, path):
        raise NotImplementedError
