"""`RevGRU` and `RevLSTM`: drop-in replacements for `nn.GRU` and `nn.LSTM`."""

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_revflip.reversible.cells import Cell, RevGRUCell, RevLSTMCell
from lightning_revflip.reversible.rnn_base import ReversibleRNNBase


class RevGRU(ReversibleRNNBase, nn.GRU):
    """Gated recurrent units whose hidden states are recomputed exactly in the backward pass.

    Takes the arguments of `nn.GRU` and returns what it returns, for 3-D, unbatched 2-D and packed
    input; per step it stores only the bits that its forget gates destroy. See
    `lightning_revflip.reversible.cells` for the equations (MacKay et al., 2018, arXiv 1810.10999).

    Parameters carry torch's names. `weight_ih_l[k]` has shape (3 * hidden_size, input features),
    `weight_hh_l[k]` (3 * hidden_size, hidden_size / 2), rows r, z, g of the first half of the
    units, then of the second. Matrix products and outputs follow autocast; gates are at least
    float32, and final states have the dtype of the parameters.

    Without gradients (`torch.no_grad`, or no input that requires any) nothing is stored, and the
    outputs are the same bits.

    Args:
        input_size: features of the input.
        hidden_size: features of the output, even.
        num_layers: layers on top of each other.
        bias: whether to add biases.
        batch_first: input and output are (batch, steps, features) instead of (steps, batch, ...).
        dropout: probability between layers, in training.
        bidirectional: run a second set of layers backwards in time and concatenate.
        max_forget_bits: how much a unit may forget per step: a number of bits, or None for no
            limit; 0 leaves forgetting out.
        chunk_steps: steps that are recomputed together in the backward pass; None chooses about
            256 / batch.
        forget_bias: added to the bias of the forget gates at initialisation. Below 0 the network
            starts by forgetting much, which is nearer to nn.LSTM, and stores more bits; 0 is the
            initialisation of nn.GRU and nn.LSTM.
        proj_size: only 0; present because nn.LSTM has it.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for an odd hidden_size, negative max_forget_bits, an input or state of the wrong
            shape or dtype, NaN or infinity, or a state outside the fixed-point range (|h| < 255).
        ReversalError: in the backward pass, if the recomputed states are not the original ones.

    Examples:
        >>> import torch
        >>> rnn = RevGRU(8, 16, num_layers=2)
        >>> output, h_n = rnn(torch.randn(70, 4, 8))
        >>> output.shape, h_n.shape
        (torch.Size([70, 4, 16]), torch.Size([2, 4, 16]))
        >>> output.sum().backward()
    """

    unsupported: ClassVar[tuple[type[nn.Module], ...]] = (nn.RNN, nn.RNNCell, nn.GRUCell)

    def make_cell(self) -> Cell[Any]:
        return RevGRUCell(self.hidden_size, self.max_forget_bits)

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Outputs of the last layer and final states.

        Args:
            input: (steps, batch, input_size), (batch, steps, input_size) with batch_first,
                (steps, input_size), or a PackedSequence.
            hx: initial state (layers * directions, batch, hidden_size), without the batch
                dimension for a 2-D input; zero by default.

        Returns:
            Output (steps, batch, directions * hidden_size) in the layout of the input, and the
            final state in the shape of `hx`.
        """
        given: Any = hx
        if isinstance(given, tuple | list):
            raise ValueError("RevGRU takes one initial state h_0, got a tuple; RevLSTM takes two.")
        output, (h_n,) = self._run(input, [] if hx is None else [hx])
        return output, h_n


class RevLSTM(ReversibleRNNBase, nn.LSTM):
    """Long short-term memory whose states are recomputed exactly in the backward pass.

    As `RevGRU`, with the call and return shapes of `nn.LSTM` (without proj_size). A half-step has
    five gates, rows z, p, f, o, g: `weight_ih_l[k]` has shape (5 * hidden_size, input features),
    `weight_hh_l[k]` (5 * hidden_size, hidden_size / 2); with max_forget_bits=0 there are three,
    f, o, g. Initial states must stay below 2047 in magnitude; no sequence of inputs can leave the
    range then.

    Examples:
        >>> import torch
        >>> rnn = RevLSTM(8, 16, batch_first=True, bidirectional=True)
        >>> output, (h_n, c_n) = rnn(torch.randn(4, 70, 8))
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([4, 70, 32]), torch.Size([2, 4, 16]), torch.Size([2, 4, 16]))
    """

    unsupported: ClassVar[tuple[type[nn.Module], ...]] = (nn.RNN, nn.RNNCell, nn.LSTMCell)

    def make_cell(self) -> Cell[Any]:
        return RevLSTMCell(self.hidden_size, self.max_forget_bits)

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Outputs of the last layer and final states.

        As `RevGRU.forward`, with `hx = (h_0, c_0)` and `(h_n, c_n)`, each of the shape given there.
        """
        given: Any = () if hx is None else hx
        if isinstance(given, Tensor) or len(given) not in (0, 2):
            found = "one tensor" if isinstance(given, Tensor) else f"{len(given)} tensors"
            raise ValueError(f"RevLSTM takes the initial state (h_0, c_0), got {found}.")
        output, (h_n, c_n) = self._run(input, list(given))
        return output, (h_n, c_n)
