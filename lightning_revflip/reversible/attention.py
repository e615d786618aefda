"""What a decoder attends to, and how: sliced contexts and Luong's "general" attention."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ContextSpec:
    """What attention sees of each source step.

    Args:
        embedding: the input of the recurrent layer, which is looked up again and costs no memory.
        units: the first units of the hidden state, kept as floats; None: all of them.
    """

    embedding: bool
    units: int | None

    @classmethod
    def parse(cls, text: str) -> ContextSpec:
        """Read `hidden`, `slice:k`, `embedding` or `embedding+slice:k`.

        Raises:
            ValueError: for anything else.

        Examples:
            >>> ContextSpec.parse("embedding+slice:20")
            ContextSpec(embedding=True, units=20)
        """
        found = re.fullmatch(r"(?P<both>embedding\+)?(hidden|slice:(?P<units>[1-9]\d*))", str(text))
        if text == "embedding":
            return cls(True, 0)
        if found is None:
            raise ValueError(
                "context must be 'hidden' (all units), 'slice:k' (the first k units), 'embedding', "
                f"'embedding+slice:k' or 'embedding+hidden', got {text!r}."
            )
        units = found["units"]
        return cls(bool(found["both"]), None if units is None else int(units))

    def hidden_units(self, hidden_size: int) -> int:
        """How many units of a layer of this size are seen.

        Raises:
            ValueError: if the layer has fewer.
        """
        if self.units is None:
            return hidden_size
        if self.units > hidden_size:
            raise ValueError(
                f"context asks for {self.units} units, but the recurrent layer has {hidden_size}. "
                "Use 'hidden' for all of them."
            )
        return self.units

    def size(self, embedding_size: int, hidden_size: int) -> int:
        """Features of the context of a source step."""
        return self.hidden_units(hidden_size) + (embedding_size if self.embedding else 0)


class LuongAttention(nn.Module):
    """Attention with the "general" score, and the attentional hidden state.

        score(t, s) = h_t^T W m_s        a_t = softmax over the real steps s of score(t, s)
        c_t = sum_s a_ts m_s             attended_t = tanh(W_c [c_t; h_t])

    (Luong, Pham and Manning, 2015, arXiv 1508.04025; without input feeding). `query.weight` is
    W^T, `combine.weight` is W_c.

    Args:
        hidden_size: H, size of the decoder's h_t and of what is returned.
        context_size: D, size of the m_s.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        context_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.query = nn.Linear(hidden_size, context_size, bias=False, device=device, dtype=dtype)
        self.combine = nn.Linear(
            context_size + hidden_size, hidden_size, bias=False, device=device, dtype=dtype
        )

    @property
    def context_size(self) -> int:
        """D."""
        return self.query.out_features

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            hidden: (target steps, batch, H).
            context: (batch, source steps, D).
            mask: bool, (batch, source steps): which steps are real; at least one per sequence.

        Returns:
            The attentional hidden states, (target steps, batch, H), and the weights,
            (target steps, batch, source steps), which sum to 1 over real steps and are 0 elsewhere.
        """
        scores = torch.bmm(self.query(hidden).transpose(0, 1), context.to(hidden.dtype).mT)
        weights = scores.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(dim=-1)
        summary = torch.bmm(weights.to(context.dtype), context).transpose(0, 1)
        attended = torch.tanh(self.combine(torch.cat([summary.to(hidden.dtype), hidden], dim=-1)))
        return attended, weights.transpose(0, 1)
