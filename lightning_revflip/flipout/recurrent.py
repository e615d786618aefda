"""`FlipoutLSTM` and `FlipoutGRU`: nn.LSTM and nn.GRU with perturbed weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import _VF, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_revflip.flipout.draw import Draw
from lightning_revflip.flipout.layer import Estimator, PerturbedLayer
from lightning_revflip.flipout.noise import composing
from lightning_revflip.flipout.perturbation_sample import sample
from lightning_revflip.flipout.perturbations import Perturbation
from lightning_revflip.flipout.recurrent_cells import GRU, LSTM, Cell
from lightning_revflip.flipout.recurrent_pass import Setting, Weight, recurrent_pass
from lightning_revflip.flipout.recurrent_rows import Steps

_KINDS = ("weight_ih", "weight_hh")

Hidden = Any
"""h_0 of a GRU, (h_0, c_0) of an LSTM."""


class _FlipoutRNN(PerturbedLayer, nn.RNNBase):
    """What the two have in common; mixed in before the nn class."""

    cell: ClassVar[Cell]
    function: ClassVar[Any]
    """torch's own, of all layers."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        perturbation: Perturbation | None = None,
        estimator: Estimator = "flipout",
        base_perturbations: int = 1,
        perturbed: Sequence[str] = _KINDS,
    ) -> None:
        options: Any = (batch_first, dropout, bidirectional, proj_size, device, dtype)
        # nn.LSTM and nn.GRU name the mode themselves, which nn.RNNBase takes first.
        plain: Any = super().__init__
        plain(input_size, hidden_size, num_layers, bias, *options)
        self.names_to_perturb(self, perturbed)
        self._configure(perturbed)
        self._perturb(perturbation, estimator, base_perturbations)

    # --- which weights -------------------------------------------------------------------------

    @staticmethod
    def names_to_perturb(
        module: nn.Module, perturbed: Sequence[str] = _KINDS, **arguments: Any
    ) -> Sequence[str]:
        """Names of the weights of all layers that are to be perturbed.

        Raises:
            ValueError: for a module with a projection, or kinds of weights that there are not.
        """
        assert isinstance(module, nn.RNNBase)
        if module.proj_size:
            raise ValueError(
                f"flipout layers have no projection, got proj_size={module.proj_size}. "
                "Use proj_size=0 and an nn.Linear."
            )
        kinds = set(perturbed)
        if isinstance(perturbed, str) or not kinds or not kinds <= set(_KINDS):
            raise ValueError(
                f"perturbed must name some of the weights {_KINDS}, got {perturbed!r}. "
                'Use perturbed=("weight_hh",) for the recurrent weights alone.'
            )
        return [name for name in module._flat_weights_names if name.rsplit("_l", 1)[0] in kinds]

    def perturbed_names(self) -> Sequence[str]:
        """Names of the weights that are perturbed."""
        return self.names_to_perturb(self, self.perturbed)

    def _configure(self, perturbed: Sequence[str] = _KINDS) -> None:
        self.perturbed = tuple(perturbed)

    # --- forward -------------------------------------------------------------------------------

    def _run(
        self, input: Tensor | PackedSequence, hx: Hidden | None, draws: dict[str, Draw]
    ) -> tuple[Any, Hidden]:
        """`forward` with perturbed weights."""
        self._update_flat_weights()
        self._check_count(hx)
        if isinstance(input, PackedSequence):
            return self._packed(input, hx, draws)
        if input.dim() == 3:
            return self._padded(input, hx, draws)
        if input.dim() != 2:
            raise ValueError(
                f"{type(self).__name__} takes inputs of 2 or 3 dimensions, or a PackedSequence, "
                f"got shape {tuple(input.shape)}."
            )
        batch_dim = 0 if self.batch_first else 1
        hx = None if hx is None else _each(hx, lambda state: state.unsqueeze(1))
        output, hx = self._padded(input.unsqueeze(batch_dim), hx, draws)
        return output.squeeze(batch_dim), _each(hx, lambda state: state.squeeze(1))

    def _padded(
        self, input: Tensor, hx: Hidden | None, draws: dict[str, Draw]
    ) -> tuple[Tensor, Hidden]:
        """Output and last states for sequences of one length."""
        x = input.transpose(0, 1) if self.batch_first else input
        hx = self._zeros(x, x.shape[1]) if hx is None else hx
        self._check_input(input, hx, None)
        output, hx = self._layers(x, None, hx, draws)
        return output.transpose(0, 1) if self.batch_first else output, hx

    def _packed(
        self, input: PackedSequence, hx: Hidden | None, draws: dict[str, Draw]
    ) -> tuple[PackedSequence, Hidden]:
        """Output and last states for sequences of several lengths, the longest first."""
        x, sizes, order, original = input
        hx = self._zeros(x, int(sizes[0])) if hx is None else self.permute_hidden(hx, order)
        self._check_input(x, hx, sizes)
        output, hx = self._layers(x, sizes, hx, draws)
        return PackedSequence(output, sizes, order, original), self.permute_hidden(hx, original)

    def _zeros(self, x: Tensor, batch: int) -> Hidden:
        """Initial states."""
        directions = 2 if self.bidirectional else 1
        zeros = x.new_zeros(self.num_layers * directions, batch, self.hidden_size)
        return _hidden([zeros] * self.cell.states)

    def _check_count(self, hx: Hidden | None) -> None:
        count = self.cell.states
        if hx is not None and len(_listed(hx)) != count:
            raise ValueError(
                f"{type(self).__name__} takes {'(h_0, c_0)' if count == 2 else 'one tensor h_0'} "
                f"as initial state, got {'one tensor' if count == 2 else 'a tuple'}."
            )

    def _check_input(self, input: Tensor, hx: Hidden, sizes: Tensor | None) -> None:
        """Raise what the plain layer raises, and for what it leaves to the function it calls."""
        self.check_forward_args(input, hx, sizes)
        if sizes is None and input.shape[int(self.batch_first)] == 0:
            raise ValueError(f"there must be at least one step, got shape {tuple(input.shape)}.")
        for state in _listed(hx):
            if state.dtype != input.dtype and not torch.is_autocast_enabled(input.device.type):
                raise ValueError(
                    f"initial states must have the dtype of the input, {input.dtype}, got "
                    f"{state.dtype}."
                )

    def _layers(
        self, x: Tensor, sizes: Tensor | None, hx: Hidden, draws: dict[str, Draw]
    ) -> tuple[Tensor, Hidden]:
        """Output and last states of x (steps, batch, features), or (rows, features) with sizes."""
        if composing() or all(draw.signed for draw in draws.values()):
            return self._one_by_one(x, sizes, hx, draws)
        return self._together(x, sizes, hx, draws)

    def _together(
        self, x: Tensor, sizes: Tensor | None, hx: Hidden, draws: dict[str, Draw]
    ) -> tuple[Tensor, Hidden]:
        """The layers with weights that all sequences share, by torch's own function."""
        weights = [getattr(self, name) for name in self._flat_weights_names]
        for place, name in enumerate(self._flat_weights_names):
            if name in draws:
                seed, mean = draws[name].weight_seed(0), weights[place]
                weights[place] = mean + sample(self.perturbation, seed, mean, self.spread(name))
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional)
        if sizes is None:
            output, *last = self.function(x, hx, weights, *options, False)
        else:
            output, *last = self.function(x, sizes, hx, weights, *options)
        return output, _hidden(last)

    def _one_by_one(
        self, x: Tensor, sizes: Tensor | None, hx: Hidden, draws: dict[str, Draw]
    ) -> tuple[Tensor, Hidden]:
        """The layers with weights of its own for each sequence."""
        # Not tolist(), which fails within torch.func in torch 2.6.
        counts = [x.shape[1]] * len(x) if sizes is None else [int(size) for size in sizes]
        draw = next(iter(draws.values()))
        steps = Steps(counts, draw.groups(counts[0]), x.device)
        if sizes is not None and steps.dense:
            x = x.reshape(len(counts), counts[0], x.shape[-1])
        directions = ("", "_reverse") if self.bidirectional else ("",)
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer and self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            outputs = []
            for backwards, direction in enumerate(directions):
                setting = Setting(self.cell, self.perturbation, steps, bool(backwards))
                weights = [self._weight(kind, f"l{layer}{direction}", draws) for kind in _KINDS]
                initial = [state[len(last)] for state in _listed(hx)]
                output, final = recurrent_pass(setting, x, initial, weights)
                outputs.append(output)
                last.append(final)
            x = torch.cat(outputs, dim=-1) if self.bidirectional else outputs[0]
        if sizes is not None and steps.dense:
            x = x.flatten(0, 1)
        return x, _hidden([torch.stack(parts) for parts in zip(*last, strict=True)])

    def _weight(self, kind: str, suffix: str, draws: dict[str, Draw]) -> Weight:
        """The input or recurrent weight of a layer and direction."""
        name = f"{kind}_{suffix}"
        draw = draws.get(name)
        bias = getattr(self, name.replace("weight", "bias")) if self.bias else None
        return Weight(getattr(self, name), bias, [] if draw is None else self.spread(name), draw)

    # --- the rest ------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        """The arguments that are not usual."""
        text = super().extra_repr()
        return text if self.perturbed == _KINDS else f"{text}, perturbed={self.perturbed}"


def _listed(hx: Hidden) -> Sequence[Tensor]:
    """The states that a layer takes or returns."""
    return [hx] if isinstance(hx, Tensor) else hx


def _hidden(states: Sequence[Tensor]) -> Hidden:
    """The states as a layer takes and returns them."""
    return states[0] if len(states) == 1 else tuple(states)


def _each(hx: Hidden, function: Callable[[Tensor], Tensor]) -> Hidden:
    """Apply a function to each state."""
    return _hidden([function(state) for state in _listed(hx)])


class FlipoutLSTM(_FlipoutRNN, nn.LSTM):
    """nn.LSTM whose weights are perturbed independently for each sequence.

    A sequence sees one set of weights W + dW * (r_n s_n^T) at all steps, with signs of their own
    for input and recurrent weights, layers and directions (Wen et al., 2018, arXiv 1803.04386).
    Biases are not perturbed. Of each step the backward pass keeps what it keeps of a plain LSTM;
    noise is drawn again.

    Takes 3-D, unbatched 2-D and packed input as nn.LSTM does, and its checkpoints. Products and
    outputs follow autocast; gates are at least float32. On a GPU each step launches kernels of its
    own; cuDNN serves where all sequences share their weights, that is with estimator `shared` and
    with mean weights.

    Args:
        input_size: as for nn.LSTM.
        hidden_size: as for nn.LSTM.
        num_layers: as for nn.LSTM.
        bias: as for nn.LSTM.
        batch_first: as for nn.LSTM.
        dropout: as for nn.LSTM.
        bidirectional: as for nn.LSTM.
        proj_size: only 0; present because nn.LSTM has it.
        device: of the parameters.
        dtype: of the parameters.
        perturbation: how weights are perturbed; by default `Gaussian()`.
        estimator: `flipout` or `shared`.
        base_perturbations: how many independent dW a batch gets.
        perturbed: which weights are, of `weight_ih` and `weight_hh`. `("weight_hh",)` with
            `DropConnect()` is the weight drop of Merity et al. (2018, arXiv 1708.02182), with a
            mask for each sequence instead of one for a batch.

    Raises:
        ValueError: for settings that do not fit together, such as local reparameterization, for a
            projection, or in a call for an input without steps.

    Examples:
        >>> layer = FlipoutLSTM(8, 16, batch_first=True, bidirectional=True)
        >>> output, (h_n, c_n) = layer(torch.randn(4, 35, 8))
        >>> output.shape, h_n.shape, layer.weight_hh_l0_rho.shape
        (torch.Size([4, 35, 32]), torch.Size([2, 4, 16]), torch.Size([64, 16]))
    """

    unsupported = (nn.RNN, nn.RNNCell, nn.LSTMCell)
    cell = LSTM()
    function = _VF.lstm

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Outputs of the last layer and last states.

        Args:
            input: (steps, batch, input_size), (batch, steps, input_size) with batch_first,
                (steps, input_size), or a PackedSequence.
            hx: initial states h_0 and c_0, (layers * directions, batch, hidden_size) each, without
                the batch dimension for a 2-D input; zero by default.

        Returns:
            Output (steps, batch, directions * hidden_size) in the layout of the input, and h_n and
            c_n in the shape of the initial states.
        """
        draws = self.draws()
        if draws is None:
            return super().forward(input, hx)
        return self._run(input, hx, draws)


class FlipoutGRU(_FlipoutRNN, nn.GRU):
    """nn.GRU whose weights are perturbed independently for each sequence, see `FlipoutLSTM`.

    Examples:
        >>> layer = FlipoutGRU(8, 16, perturbed=("weight_hh",))
        >>> output, h_n = layer(torch.randn(35, 4, 8))
        >>> output.shape, h_n.shape
        (torch.Size([35, 4, 16]), torch.Size([1, 4, 16]))
    """

    unsupported = (nn.RNN, nn.RNNCell, nn.GRUCell)
    cell = GRU()
    function = _VF.gru

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """As `FlipoutLSTM.forward`, with one state h_0 and h_n."""
        draws = self.draws()
        if draws is None:
            return super().forward(input, hx)
        return self._run(input, hx, draws)
