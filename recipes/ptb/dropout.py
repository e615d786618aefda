"""The three kinds of dropout of a regularised language model (Merity et al., 2018, 1708.02182)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call


def locked_dropout(hidden: Tensor, p: float) -> Tensor:
    """Drop the same units at every step.

    Args:
        hidden: shape (steps, batch, units).
        p: probability with which a unit of a column is dropped; 0 for evaluation.

    Returns:
        The shape of `hidden`.
    """
    if p == 0:
        return hidden
    return hidden * F.dropout(hidden.new_ones(1, *hidden.shape[1:]), p)


def embed_with_dropout(embedding: nn.Embedding, inputs: Tensor, p: float) -> Tensor:
    """Look up embeddings, with some words of the vocabulary dropped wherever they occur.

    Args:
        embedding: of V words.
        inputs: int64, shape (steps, batch).
        p: probability with which a word is dropped; 0 for evaluation.

    Returns:
        Shape (steps, batch, embedding size).
    """
    embedded: Tensor = embedding(inputs)
    if p == 0:
        return embedded
    keep = F.dropout(embedded.new_ones(embedding.num_embeddings, 1), p)
    return embedded * F.embedding(inputs, keep)


def call_with_weight_drop(rnn: nn.Module, p: float, *args: Any) -> Any:
    """Call a recurrent module with some of its hidden-to-hidden weights dropped at all steps.

    Any module will do that names these weights as `nn.GRU` and `nn.LSTM` do. The module, its
    parameters and its `state_dict` stay as they are: the dropped weights exist in this call only,
    and their gradients flow to the parameters.

    Args:
        rnn: the module.
        p: probability with which a weight is dropped; 0 for evaluation.
        args: what the module is called with.

    Returns:
        What the module returns.

    Raises:
        ValueError: if the module has no parameter `weight_hh_l0` to drop from.
    """
    if p == 0:
        return rnn(*args)
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
    return functional_call(rnn, dropped, args)
