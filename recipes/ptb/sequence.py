"""Memory mode `sequence` of the language model: a window as one reversible pass, in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from lightning_revflip.reversible import (
    LinearCrossEntropy,
    ReversibleSequence,
    RevGRU,
    RevLSTM,
)


class SequenceReader:
    """Reads windows with the layers of a model, in memory that does not grow with the window.

    It is not a module: the layers stay registered in the model alone, so that parameters and
    `state_dict` are the same whether or not the model reads through it.

    Args:
        read_in: layers from the tokens to the first recurrent layer.
        rnns: the recurrent layers, RevGRU or RevLSTM.
        between: a layer between each two of them.
        output_dropout: what comes before the softmax.
        softmax: makes the summed loss.
        chunk_steps: time steps that are computed at a time; None chooses.

    Raises:
        ValueError: if a recurrent layer is not reversible.
    """

    def __init__(
        self,
        read_in: Sequence[nn.Module],
        rnns: Sequence[nn.Module],
        between: Sequence[nn.Module],
        output_dropout: nn.Module,
        softmax: LinearCrossEntropy,
        chunk_steps: int | None = None,
    ) -> None:
        reversible: list[Any] = [rnn for rnn in rnns if isinstance(rnn, RevGRU | RevLSTM)]
        if len(reversible) < len(rnns):
            kinds = ", ".join(type(rnn).__name__ for rnn in rnns)
            raise ValueError(
                "memory: sequence needs reversible recurrent layers, but these are "
                f"{kinds}. Add the callback ReversibleRNN to the Trainer (for example --config "
                "recipes/ptb/configs/rev3.yaml), or set memory: plain."
            )
        self._sequence = ReversibleSequence(
            nn.Sequential(*read_in),
            reversible,
            _ReadOut(output_dropout, softmax),
            between=between,
            chunk_steps=chunk_steps,
        )

    def __call__(
        self,
        inputs: Tensor,
        targets: Tensor,
        states: Any,
        weights: Sequence[Mapping[str, Tensor]],
        training: bool,
    ) -> tuple[Tensor, Any]:
        """Read a window.

        Args:
            inputs: int64, shape (steps, batch).
            targets: as `inputs`.
            states: of the recurrent layers, or None for zeros.
            weights: for each recurrent layer those that take the place of its own, by name.
            training: mode of the model; its layers have theirs already.

        Returns:
            The summed loss, and the states after the window.
        """
        # The trainer knows these three only through their layers and does not switch them.
        for part in (self._sequence, self._sequence.read_in, self._sequence.read_out):
            part.training = training
        replaced = {
            f"rnns.{number}.{name}": weight
            for number, of_rnn in enumerate(weights)
            for name, weight in of_rnn.items()
        }
        result: tuple[Tensor, Any] = functional_call(
            self._sequence, replaced, (inputs, states, targets)
        )
        return result


class _ReadOut(nn.Module):
    """Dropout, softmax and loss."""

    def __init__(self, dropout: nn.Module, softmax: LinearCrossEntropy) -> None:
        super().__init__()
        self.dropout = dropout
        self.softmax = softmax

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.softmax(self.dropout(hidden), targets)
        return loss
