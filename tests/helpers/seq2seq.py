"""A translation model of RevEncoder and RevDecoder, and the same model by plain autograd."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_revflip.reversible import (
    LinearCrossEntropy,
    LuongAttention,
    RevDecoder,
    RevEncoder,
    RevLSTM,
)
from tests.helpers.passes import initial_states
from tests.helpers.reference_cell import ReferenceRNN
from tests.helpers.sequences import as_state

SOURCE_WORDS, TARGET_WORDS, FEATURES, HIDDEN = 13, 11, 6, 8
CONTEXTS = ("hidden", "slice:3", "slice:6", "embedding", "embedding+slice:5", "embedding+hidden")


@dataclass
class Batch:
    """Ragged source and target sentences; tokens as the models take them."""

    source: Tensor
    source_lengths: Sequence[int]
    tokens: Tensor
    targets: Tensor
    target_lengths: Sequence[int]


def batch(
    source_lengths: Sequence[int] = (5, 2, 7, 1),
    target_lengths: Sequence[int] = (3, 6, 1, 4),
    batch_first: bool = False,
    seed: int = 0,
) -> Batch:
    """Random tokens that depend on nothing but the arguments; one more step of padding."""
    generator = torch.Generator().manual_seed(seed)
    steps, target_steps = max(source_lengths) + 1, max(target_lengths) + 1
    source = torch.randint(SOURCE_WORDS, (len(source_lengths), steps), generator=generator)
    shape = (2, len(target_lengths), target_steps)
    tokens, targets = torch.randint(TARGET_WORDS, shape, generator=generator)
    if not batch_first:
        source, tokens, targets = source.t(), tokens.t(), targets.t()
    return Batch(source, source_lengths, tokens, targets, target_lengths)


class Seq2Seq(nn.Module):
    """Encoder and decoder: source and target in, loss and final state out."""

    def __init__(self, encoder: RevEncoder, decoder: RevDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, batch: Batch, state: Any = None) -> tuple[Tensor, Any]:
        source, state = self.encoder(batch.source, batch.source_lengths, state)
        result: tuple[Tensor, Any] = self.decoder(
            batch.tokens, batch.targets, source, state, batch.target_lengths
        )
        return result


def translator(
    cell: type[Any] = RevLSTM,
    context: str = "embedding+slice:3",
    num_layers: int = 1,
    batch_first: bool = False,
    *,
    embedding_dropout: nn.Module | None = None,
    dropout: nn.Module | None = None,
    max_forget_bits: float | None = 3.0,
    chunk_steps: int | None = 3,
    read_out_steps: int | None = 2,
    dtype: torch.dtype = torch.float64,
) -> Seq2Seq:
    """A small model whose parameters depend on nothing but the arguments."""

    def rnn() -> Any:
        return cell(
            FEATURES, HIDDEN, num_layers, batch_first=batch_first, max_forget_bits=max_forget_bits
        )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        source = nn.Embedding(SOURCE_WORDS, FEATURES)
        encoder = RevEncoder(
            source if embedding_dropout is None else nn.Sequential(source, embedding_dropout),
            rnn(),
            context,
            chunk_steps=chunk_steps,
        )
        decoder = RevDecoder(
            nn.Embedding(TARGET_WORDS, FEATURES),
            rnn(),
            LuongAttention(HIDDEN, encoder.context_size),
            LinearCrossEntropy(HIDDEN, TARGET_WORDS),
            dropout=dropout,
            chunk_steps=chunk_steps,
            read_out_steps=read_out_steps,
        )
    return Seq2Seq(encoder, decoder).to(dtype)


class Plain(nn.Module):
    """The same parameters, every step in the graph: embed, recur, pad, attend, compare."""

    def __init__(self, model: Seq2Seq) -> None:
        super().__init__()
        self.model = model

    def context(
        self, batch: Batch, initial: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What is attended to, (batch, steps, D), which steps are real, and final states."""
        encoder, rnn = self.model.encoder, self.model.encoder.rnn
        embedded = encoder.sequence.read_in(_time_major(batch.source, rnn))
        spec = encoder.context
        units = rnn.hidden_size if spec.units is None else spec.units
        weights = dict(rnn.named_parameters())
        reference = ReferenceRNN.of(rnn, sliced=units)
        output, finals = reference(weights, embedded, initial, batch.source_lengths)
        seen = [embedded] * spec.embedding + [output[..., :units]]
        return torch.cat(seen, 2).transpose(0, 1), _real(batch.source_lengths, len(output)), finals

    def attended(
        self, batch: Batch, context: Tensor, mask: Tensor, initial: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Attentional states, (steps, batch, H), and final states."""
        decoder, rnn = self.model.decoder, self.model.decoder.rnn
        embedded = decoder.sequence.read_in(_time_major(batch.tokens, rnn))
        weights = dict(rnn.named_parameters())
        output, finals = ReferenceRNN.of(rnn)(weights, embedded, initial, batch.target_lengths)
        return decoder.read_out.attention(output, context, mask)[0], finals

    def forward(self, batch: Batch, state: Any = None) -> tuple[Tensor, Any]:
        """As `Seq2Seq`, with a list of states."""
        context, mask, finals = self.context(batch, state or ())
        attended, finals = self.attended(batch, context, mask, finals)
        generator = self.model.decoder.read_out.generator
        logits = F.linear(attended, generator.weight, generator.bias)
        real = _real(batch.target_lengths, len(logits)).t()
        targets = _time_major(batch.targets, self.model.decoder.rnn)
        loss = F.cross_entropy(logits[real], targets[real], reduction="sum")
        return loss, finals


def states_of(model: Seq2Seq, batch: int) -> tuple[list[Tensor], Any]:
    """Initial states of the encoder that require gradients: as a list, and as a layer takes it."""
    states = initial_states(model.encoder.rnn, batch)
    return states, as_state(states)


def _time_major(tokens: Tensor, rnn: nn.RNNBase) -> Tensor:
    return tokens.t() if rnn.batch_first else tokens


def _real(lengths: Sequence[int], steps: int) -> Tensor:
    """(batch, steps)."""
    return torch.arange(steps) < torch.tensor(lengths)[:, None]
