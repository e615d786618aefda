"""Samples in memory that are read in chunks, as a bank on disk is."""

import torch

from lightning_revflip.posterior import Layout


class RowSamples:
    """Rows of float32 with a layout of two tensors; counts how often it was read."""

    def __init__(self, rows, most=None):
        size = rows.shape[1]
        self.layout = Layout(("weight", "bias"), ((size - 1,), (1,)))
        self.rows = rows.float()
        self.most = most or len(rows)
        self.passes = 0

    def chunks(self, size):
        """At most `most` at a time, so that small tests have several chunks, too."""
        self.passes += 1
        yield from self.rows.split(min(size, self.most))


def correlated(count, size, seed=0):
    """Rows that vary in some directions much more than in others, far from 0."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(1, -3, size)
    directions = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    rows = torch.randn(count, size, generator=generator) * scales @ directions
    return rows + 5 * torch.randn(size, generator=generator)
