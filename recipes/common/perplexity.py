"""Perplexity over batches of different length."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Perplexity(Metric):
    """exp(sum of the negative log-likelihoods / number of tokens), over all batches and processes.

    `torchmetrics.text.Perplexity` is the same number, but takes logits and runs a second softmax
    over the vocabulary; this one takes what the loss has computed already.

    Example:
        >>> perplexity = Perplexity()
        >>> perplexity.update(torch.tensor(8.0).log(), 1)  # one token with probability 1/8
        >>> perplexity.update(3 * torch.tensor(2.0).log(), 3)  # three with 1/2
        >>> round(perplexity.compute().item(), 4)  # (8 * 2 * 2 * 2) ** (1 / 4)
        2.8284
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nll: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("nll", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: int | Tensor) -> None:
        """Add a batch: the sum of its negative log-likelihoods in nats, and its tokens."""
        self.nll += nll.detach()
        self.tokens += tokens

    def compute(self) -> Tensor:
        """A scalar; nan before the first token."""
        return (self.nll / self.tokens).exp()
