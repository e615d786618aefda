"""The translator as the search wants it: one target token after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from recipes.nmt.module import Translator


class Context(NamedTuple):
    """What the decoder attends to.

    Attributes:
        steps: (batch, source steps, features).
        mask: bool, (batch, source steps), which of them are real.
    """

    steps: Tensor
    mask: Tensor


class Stepwise:
    """The decoder of a translator; a state is (context, state of the recurrent layer)."""

    def __init__(self, model: Translator) -> None:
        self._model = model

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Log-probabilities of the next token after one more token per row."""
        context, before = state
        attended, _, after = self._model.decode(tokens.unsqueeze(0), None, context, before)
        return self._model.logits(attended[0]).float().log_softmax(-1), (context, after)

    def select(self, state: Any, rows: Tensor) -> Any:
        """The state of these rows."""
        context, recurrent = state
        chosen = Context(context.steps[rows], context.mask[rows])
        if isinstance(recurrent, Tensor):
            return chosen, recurrent[:, rows]
        return chosen, tuple(part[:, rows] for part in recurrent)
