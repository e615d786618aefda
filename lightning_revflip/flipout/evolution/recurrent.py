"""nn.LSTM and nn.GRU with the weights of each member, which hold for all steps of a sequence."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_revflip.flipout.evolution.layers import VECTOR, MemberLayer, MemberMap, Use
from lightning_revflip.flipout.linear_maps import MatrixProduct
from lightning_revflip.flipout.recurrent_cells import GRU, LSTM, Cell

States = tuple[Tensor, ...]
"""(h,) of a GRU, (h, c) of an LSTM; each (layers * directions, rows, hidden_size)."""


class _MemberRNN(MemberLayer):
    """What the two have in common; a row of members is one sequence."""

    cell: ClassVar[Cell]
    """The arithmetic of a step."""

    @staticmethod
    def uses(module: nn.RNNBase) -> dict[str, Use]:
        if module.proj_size:
            raise ValueError("proj_size is not supported; build it without")
        uses = {}
        for name, parameter in module.named_parameters():
            uses[name] = VECTOR if parameter.dim() == 1 else Use(parameter.shape[1])
        return uses

    def _run(self, input: Any, initial: States | None) -> tuple[Any, States]:
        """Outputs and last states, in the form that the layer gives them."""
        if not isinstance(input, PackedSequence):
            self._check(input)
            x = input if self.module.batch_first else input.transpose(0, 1)
            output, last = self._layers(x, initial, None)
            return output if self.module.batch_first else output.transpose(0, 1), last
        x, lengths = pad_packed_sequence(input, batch_first=True)
        output, last = self._layers(x, initial, lengths.to(x.device))
        if input.sorted_indices is not None:
            output, lengths = output[input.sorted_indices], lengths[input.sorted_indices.cpu()]
        data = pack_padded_sequence(output, lengths, batch_first=True).data
        return input._replace(data=data), last

    def _check(self, input: Tensor) -> None:
        if input.dim() != 3:
            raise ValueError(
                f"{self.path} needs a batch of sequences, one for each row of members, got shape "
                f"{tuple(input.shape)}."
            )

    def _layers(
        self, x: Tensor, initial: States | None, lengths: Tensor | None
    ) -> tuple[Tensor, States]:
        """Outputs (rows, steps, features) of all layers, and the last states."""
        rnn: nn.RNNBase = self.module
        directions = 2 if rnn.bidirectional else 1
        if initial is None:
            zeros = x.new_zeros(rnn.num_layers * directions, len(x), rnn.hidden_size)
            initial = (zeros,) * self.cell.states
        last: list[States] = []
        for layer in range(rnn.num_layers):
            if layer and rnn.training and rnn.dropout:
                x = F.dropout(x, rnn.dropout)
            outputs = []
            for direction in range(directions):
                suffix = f"l{layer}" + ("_reverse" if direction else "")
                state = tuple(part[len(last)] for part in initial)
                output, state = self._sweep(x, state, suffix, bool(direction), lengths)
                outputs.append(output)
                last.append(state)
            x = torch.cat(outputs, -1)
        return x, tuple(torch.stack(parts) for parts in zip(*last, strict=True))

    def _sweep(
        self, x: Tensor, state: States, suffix: str, reverse: bool, lengths: Tensor | None
    ) -> tuple[Tensor, States]:
        """Outputs of one layer in one direction; past the end of a sequence they are 0."""
        of_input, of_hidden = (self._gates(kind, suffix) for kind in ("ih", "hh"))
        gates, outputs = of_input(x), [x] * x.shape[1]
        steps = range(x.shape[1])
        for step in reversed(steps) if reverse else steps:
            after = self.cell.step(gates[:, step], of_hidden(state[0]), state)
            output = after[0]
            if lengths is not None:
                inside = (step < lengths).unsqueeze(1)
                after = tuple(
                    torch.where(inside, new, old) for new, old in zip(after, state, strict=True)
                )
                output = output * inside
            outputs[step], state = output, after
        return torch.stack(outputs, 1), state

    def _gates(self, kind: str, suffix: str) -> MemberMap:
        bias = f"bias_{kind}_{suffix}" if self.module.bias else None
        return self.map(MatrixProduct(), f"weight_{kind}_{suffix}", bias)


class MemberLSTM(_MemberRNN):
    """nn.LSTM."""

    cell = LSTM()

    def __call__(
        self, input: Any, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        output, (h, c) = self._run(input, hx)
        return output, (h, c)


class MemberGRU(_MemberRNN):
    """nn.GRU."""

    cell = GRU()

    def __call__(self, input: Any, hx: Tensor | None = None) -> tuple[Any, Tensor]:
        output, (h,) = self._run(input, None if hx is None else (hx,))
        return output, h
