"""`ReversibleRNN`: make the recurrent layers of any LightningModule reversible."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_revflip.callbacks._conversion import ConversionCallback
from lightning_revflip.reversible import RevGRU, RevLSTM

_RULES: dict[type[nn.Module], Any] = {nn.GRU: RevGRU, nn.LSTM: RevLSTM}


class ReversibleRNN(ConversionCallback):
    """Replaces every nn.GRU by RevGRU and every nn.LSTM by RevLSTM.

    Acts in `setup` of every stage, before optimizers are made and weights are restored, so
    `fit(ckpt_path=...)`, `validate`, `test` and `predict` see the same model. Layers that the
    module makes in its own `setup` or in `configure_model` are replaced right after that hook.

    Replaced layers start from their own initialisation: the shapes of their recurrent weights
    differ from those of nn.GRU and nn.LSTM, whose weights cannot be carried over.

    Checkpoints hold what was converted. They resume in a Trainer with this callback; without one,
    load them by `lightning_revflip.convert.load_from_checkpoint`.

    Does not work with nn.RNN, cells (nn.GRUCell, nn.LSTMCell), `proj_size`, subclasses of nn.GRU
    and nn.LSTM, and odd hidden sizes: `setup` raises and names the layer. Callbacks
    that average weights must come after this one in the Trainer's list, and strategies that spawn
    or fork need a model that was converted before; otherwise `setup` raises.

    Args:
        max_forget_bits: how much a unit may forget per step: a number of bits, or None for no
            limit; 0 leaves forgetting out.
        targets: glob patterns of module paths, for example `["encoder.*"]`, or module types, that
            choose the layers; None: all. Two ReversibleRNN in one Trainer need different ones.
        chunk_steps: steps that are recomputed together in the backward pass; None chooses.
        forget_bias: added to the bias of the forget gates at initialisation; below 0 the network
            starts by forgetting much, which may help RevLSTM at first and stores more bits.

    Raises:
        ValueError: in `setup`, if there is nothing to convert or something cannot be.
        MisconfigurationException: in `setup`, if a callback that averages weights comes first, or
            the strategy spawns.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos import LightningTransformer
        >>> trainer = Trainer(callbacks=[ReversibleRNN(max_forget_bits=2.0)], logger=False)
        >>> trainer.callbacks[0].max_forget_bits
        2.0
    """

    def __init__(
        self,
        max_forget_bits: float | None = 3.0,
        targets: Sequence[str | type[nn.Module]] | None = None,
        chunk_steps: int | None = None,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__(targets)
        self.max_forget_bits = max_forget_bits
        self.chunk_steps = chunk_steps
        self.forget_bias = forget_bias

    def rules(self) -> Mapping[type[nn.Module], Any]:
        return _RULES

    def arguments(self) -> dict[str, Any]:
        return {
            "max_forget_bits": self.max_forget_bits,
            "chunk_steps": self.chunk_steps,
            "forget_bias": self.forget_bias,
        }
