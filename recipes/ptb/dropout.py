"""Dropout of words and of recurrent weights (Merity et al., 2018, 1708.02182).

The third kind, of the same units at every step, is `lightning_revflip.reversible.LockedDropout`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_revflip.reversible import SequenceNoise


class EmbeddingWithDropout(nn.Embedding, SequenceNoise):
    """An embedding that in training drops some words of its vocabulary wherever they occur.

    Its parameter is that of `nn.Embedding`.

    Args:
        num_embeddings: V, the number of words.
        embedding_dim: size of an embedding.
        p: probability with which a word is dropped.

    Raises:
        ValueError: for `p` outside [0, 1).
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, p: float = 0.1) -> None:
        super().__init__(num_embeddings, embedding_dim)
        if not 0 <= p < 1:
            raise ValueError(f"p must be at least 0 and below 1, got {p}.")
        self.p = p

    def draw(self, batch: int, device: torch.device) -> Tensor:
        """What words are multiplied by: 0 or 1 / (1 - p), float32, (V, 1), in every column."""
        return F.dropout(torch.ones(self.num_embeddings, 1, device=device), self.p)

    def forward(self, inputs: Tensor) -> Tensor:
        """Embeddings of int64 `inputs`, (steps, batch) -> (steps, batch, embedding_dim)."""
        embedded = super().forward(inputs)
        if not self.training or self.p == 0:
            return embedded
        keep = self.noise(inputs.shape[1], inputs.device).to(embedded.dtype)
        return embedded * F.embedding(inputs, keep)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{super().extra_repr()}, p={self.p}"


def drop_weights(rnn: nn.Module, p: float) -> dict[str, Tensor]:
    """Drop some hidden-to-hidden weights of a recurrent module, for `torch.func.functional_call`.

    Any module will do that names these weights as `nn.GRU` and `nn.LSTM` do. The module stays as it
    is; gradients of the dropped weights flow to its parameters.

    Args:
        rnn: the module.
        p: probability with which a weight is dropped; 0 for evaluation.

    Returns:
        The dropped weights by the name of their parameter; nothing if `p` is 0.

    Raises:
        ValueError: if the module has no parameter `weight_hh_l0` to drop from.
    """
    if p == 0:
        return {}
    dropped = {
        name: F.dropout(weight, p)
        for name, weight in rnn.named_parameters(recurse=False)
        if name.startswith("weight_hh_l")
    }
    if not dropped:
        names = [name for name, _ in rnn.named_parameters()]
        raise ValueError(
            "Weight drop needs a recurrent module with parameters named weight_hh_l0, weight_hh_l1 "
            f"and so on, as nn.LSTM has; {type(rnn).__name__} has {names}. Set weight_drop to 0."
        )
    return dropped
