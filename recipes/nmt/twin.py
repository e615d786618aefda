"""Memory mode `sequence` of the translator: encoder and decoder in a reversible pass each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_revflip.reversible import RevDecoder, RevEncoder, RevGRU, RevLSTM
from recipes.nmt.batches import Batch

if TYPE_CHECKING:
    from recipes.nmt.module import Translator


class ReversibleTwin:
    """Computes the loss of a translator with its own layers, reversibly.

    It is not a module: the layers stay registered in the model alone, so that parameters and
    `state_dict` are the same in either mode.

    Args:
        model: a translator whose layers exist.

    Raises:
        ValueError: if a recurrent layer is not reversible.
    """

    def __init__(self, model: Translator) -> None:
        layers: list[Any] = [model.encoder, model.decoder]
        if not all(isinstance(layer, RevGRU | RevLSTM) for layer in layers):
            kinds = ", ".join(type(layer).__name__ for layer in layers)
            raise ValueError(
                "memory: sequence needs reversible recurrent layers, but these are "
                f"{kinds}. Add the callback ReversibleRNN to the Trainer (for example --config "
                "recipes/nmt/configs/rev3.yaml), or set memory: plain."
            )
        self.encoder = RevEncoder(
            nn.Sequential(model.source_embedding, model.source_dropout),  # type: ignore[arg-type]
            layers[0],
            model.hparams["context"],
            chunk_steps=model.hparams["chunk_steps"],
        )
        self.decoder = RevDecoder(
            nn.Sequential(model.target_embedding, model.target_dropout),  # type: ignore[arg-type]
            layers[1],
            model.attention,
            model.generator,  # type: ignore[arg-type]
            dropout=model.output_dropout,
            chunk_steps=model.hparams["chunk_steps"],
        )
        theirs = set(model.modules())
        both = (*self.encoder.modules(), *self.decoder.modules())
        self._own = [module for module in both if module not in theirs]

    def negative_log_likelihood(self, batch: Batch, training: bool) -> Tensor:
        """Of all target tokens of a batch, summed, in nats.

        Args:
            batch: the sentences.
            training: mode of the model; its layers have theirs already.
        """
        for module in self._own:  # which no Trainer switches
            module.training = training
        source, state = self.encoder(batch.source, batch.source_lengths)
        inputs, targets, lengths = batch.target_inputs, batch.targets, batch.target_lengths
        loss, _ = self.decoder(inputs, targets, source, state, lengths)
        return loss
