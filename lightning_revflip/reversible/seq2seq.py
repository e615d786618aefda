"""`RevEncoder` and `RevDecoder`: sequence-to-sequence models with attention, reversibly.

Attention keeps every encoder state alive, so a reversible encoder alone saves nothing. It saves
once attention sees a small part of each source step (MacKay et al., 2018, section 5.2,
arXiv 1810.10999): the first k units of the state, which are kept as floats and then need no
information buffer; or the source embedding, which is looked up again; or both.

The encoder returns a `SourceContext`. The decoder runs embedding, recurrence, attention and
generator in one reversible pass, a few target steps at a time; each time it rebuilds the context of
the source from the kept units and the embeddings. It adds up the gradients of both, which the
encoder's backward pass then takes along.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_revflip.reversible.attention import ContextSpec, LuongAttention
from lightning_revflip.reversible.cross_entropy import LinearCrossEntropy
from lightning_revflip.reversible.replay import packed_rows
from lightning_revflip.reversible.rnn_base import ReversibleRNNBase
from lightning_revflip.reversible.sequence import ReversibleSequence
from lightning_revflip.reversible.sequence_arguments import check_rnns
from lightning_revflip.reversible.slices import HiddenSlice
from lightning_revflip.reversible.source_context import (
    PaddedContext,
    SourceContext,
    training_flags,
)

Lengths = Sequence[int] | Tensor
"""Steps of each sequence of a batch."""


class RevEncoder(nn.Module):
    """Encoder that keeps of its states what attention sees, and else only what was forgotten.

    Sequences may have different lengths: steps behind the end of a sequence are not visited, so
    that the final state is that after its last real step.

    Args:
        embedding: called with source tokens, returns the input of the recurrent layer; for example
            `nn.Sequential(nn.Embedding(...), nn.Dropout(...))`.
        rnn: a RevGRU or RevLSTM of one or more layers, not bidirectional.
        context: what attention sees of each step: `hidden` (all units of the top layer), `slice:k`
            (the first k), `embedding` (what `embedding` returned, dropout included), or both, as
            `embedding+slice:k` or `embedding+hidden`.
        chunk_steps: time steps in a chunk; None: as many as fit `memory_budget`.
        memory_budget: bytes, see `ReversibleSequence`.

    Raises:
        ValueError: for another context, and for what a ReversibleSequence does not accept; when
            called, for lengths that do not fit.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_revflip.reversible import RevLSTM
        >>> encoder = RevEncoder(nn.Embedding(50, 8), RevLSTM(8, 16), "embedding+slice:4")
        >>> source, state = encoder(torch.randint(50, (7, 3)), lengths=[7, 2, 5])
        >>> source.size, state[0].shape
        (12, torch.Size([1, 3, 16]))
    """

    def __init__(
        self,
        embedding: nn.Module,
        rnn: ReversibleRNNBase,
        context: str = "hidden",
        *,
        chunk_steps: int | None = None,
        memory_budget: int = 8_000_000,
    ) -> None:
        super().__init__()
        check_rnns([rnn])
        self.context = ContextSpec.parse(context)
        units = self.context.hidden_units(rnn.hidden_size)
        kept = HiddenSlice(units, with_inputs=self.context.embedding)
        self.sequence = ReversibleSequence(
            embedding,
            rnn,
            kept,
            chunk_steps=chunk_steps,
            memory_budget=memory_budget,
        )

    @property
    def rnn(self) -> ReversibleRNNBase:
        """The recurrent layer."""
        rnn: Any = self.sequence.rnns[0]
        return rnn  # type: ignore[no-any-return]

    @property
    def context_size(self) -> int:
        """D, features of the context of a source step."""
        return self.context.size(self.rnn.input_size, self.rnn.hidden_size)

    def forward(
        self, tokens: Tensor, lengths: Lengths | None = None, state: Any = None
    ) -> tuple[SourceContext, Any]:
        """Read a batch of source sequences.

        Args:
            tokens: (source steps, batch), or (batch, source steps) if the rnn is `batch_first`.
            lengths: of each sequence, in any order, at least 1; None: all have all steps.
            state: initial state as the rnn takes it; None for zero.

        Returns:
            What to attend to, and the final state, with gradients.
        """
        packed = packed_steps(tokens, lengths, self.rnn.batch_first)
        result, final, plan = self.sequence.run((packed,), state)
        kept, embedded = result if self.context.embedding else (result, None)
        layout, device = plan.stack.layout, packed.data.device
        place: Any = packed.unsorted_indices
        sizes = torch.tensor(layout.batch_sizes, device=device)
        mask = place.unsqueeze(1) < sizes
        index = (place.unsqueeze(1) + sizes.cumsum(0) - sizes).masked_fill_(~mask, 0)
        rows = None if embedded is None else embedded.data
        modes = training_flags(self.sequence.read_in)
        source = SourceContext(kept.data, rows, index, mask, plan.stack, packed.data, modes)
        return source, final


class RevDecoder(nn.Module):
    """Decoder with attention and generator inside the reversible pass.

    With targets it returns the summed loss of all target tokens: their gradients are computed in
    the forward pass, see `ReversibleSequence`. Without, it returns logits.

    Args:
        embedding: called with target tokens, returns the input of the recurrent layer.
        rnn: a RevGRU or RevLSTM of one or more layers, not bidirectional.
        attention: for the rnn's hidden_size and the encoder's `context_size`.
        generator: makes the summed loss of attentional states and targets, and their logits.
        dropout: between attention and generator; None: nothing.
        chunk_steps: time steps in a chunk; None: as many as fit `memory_budget`.
        read_out_steps: time steps that attention and generator get at a time; None: a chunk, or
            equal parts of it, with logits of at most twice the `memory_budget`. (Gradients of the
            encoder do not exist yet while the decoder runs, so this is seldom the peak.)
        memory_budget: bytes, see `ReversibleSequence`.

    Raises:
        ValueError: for what a ReversibleSequence does not accept; when called, for lengths that do
            not fit, and a source whose context has another size than the attention takes.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_revflip.reversible import LinearCrossEntropy, RevLSTM
        >>> encoder = RevEncoder(nn.Embedding(50, 8), RevLSTM(8, 16), "slice:4")
        >>> decoder = RevDecoder(
        ...     nn.Embedding(60, 8),
        ...     RevLSTM(8, 16),
        ...     LuongAttention(16, encoder.context_size),
        ...     LinearCrossEntropy(16, 60),
        ... )
        >>> source, state = encoder(torch.randint(50, (7, 3)), lengths=[7, 2, 5])
        >>> target = torch.randint(60, (9, 3))
        >>> loss, state = decoder(target[:-1], target[1:], source, state, lengths=[8, 3, 3])
        >>> loss.backward()
    """

    def __init__(
        self,
        embedding: nn.Module,
        rnn: ReversibleRNNBase,
        attention: LuongAttention,
        generator: LinearCrossEntropy,
        *,
        dropout: nn.Module | None = None,
        chunk_steps: int | None = None,
        read_out_steps: int | None = None,
        memory_budget: int = 8_000_000,
    ) -> None:
        super().__init__()
        check_rnns([rnn])
        for name, module, kind in (
            ("attention", attention, LuongAttention),
            ("generator", generator, LinearCrossEntropy),
        ):
            if not isinstance(module, kind):
                raise ValueError(
                    f"{name} must be a {kind.__name__} or a subclass, got {type(module).__name__}."
                )
        if attention.query.in_features != rnn.hidden_size:
            raise ValueError(
                f"the rnn has {rnn.hidden_size} hidden units, the attention takes "
                f"{attention.query.in_features}. Use LuongAttention(rnn.hidden_size, "
                "encoder.context_size)."
            )
        self.sequence = ReversibleSequence(
            embedding,
            rnn,
            _AttentiveReadOut(attention, dropout or nn.Identity(), generator),
            chunk_steps=chunk_steps,
            read_out_steps=read_out_steps,
            memory_budget=memory_budget,
        )
        self.read_out_steps = read_out_steps
        self.memory_budget = memory_budget

    @property
    def rnn(self) -> ReversibleRNNBase:
        """The recurrent layer."""
        rnn: Any = self.sequence.rnns[0]
        return rnn  # type: ignore[no-any-return]

    @property
    def read_out(self) -> _AttentiveReadOut:
        """Attention, dropout and generator."""
        read_out: Any = self.sequence.read_out
        return read_out  # type: ignore[no-any-return]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None,
        source: SourceContext | PaddedContext,
        state: Any = None,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, Any]:
        """Run over a batch of target sequences.

        Args:
            tokens: of each step, (target steps, batch), or (batch, target steps) if the rnn is
                `batch_first`.
            targets: the token to predict at each step, of the same shape; None for logits.
            source: what the encoder returned, or its `in_memory()`.
            state: initial state, usually the encoder's final state.
            lengths: of each target sequence, in any order, at least 1; None: all have all steps.

        Returns:
            The summed loss, a scalar; or logits in the layout of `tokens`, (..., V), 0 behind the
            end of a sequence. Then the final state.
        """
        attention = self.read_out.attention
        if not isinstance(source, SourceContext | PaddedContext):
            raise ValueError(
                f"source must be what an encoder returned first, got {type(source).__name__}. Call "
                "decoder(tokens, targets, source, state, lengths)."
            )
        if source.size != attention.context_size:
            raise ValueError(
                f"the source has a context of {source.size} features, the attention takes "
                f"{attention.context_size}. Use LuongAttention(hidden_size, encoder.context_size)."
            )
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(
                f"targets must have the shape of tokens, {tuple(tokens.shape)}, the next token for "
                f"each, got {tuple(targets.shape)}."
            )
        batch_first = self.rnn.batch_first
        packed = packed_steps(tokens, lengths, batch_first)
        sequences = len(source.mask)
        if int(packed.batch_sizes[0]) != sequences:
            raise ValueError(
                f"the source has {sequences} sequences, the target {int(packed.batch_sizes[0])}. "
                "Give one target for each source."
            )
        per_step = None if targets is None else packed_steps(targets, lengths, batch_first)
        self.sequence.read_out_steps = self.chosen_read_out_steps(sequences)
        result, final, _ = self.sequence.run(
            (packed,),
            state,
            per_step,
            slices=source.slices,
            embedded=source.embedded,
            source=source,
            order=packed.sorted_indices,
        )
        if targets is None:
            steps = tokens.shape[int(batch_first)]
            result, _ = pad_packed_sequence(result, batch_first, total_length=steps)
        return result, final

    def chosen_read_out_steps(self, batch: int) -> int:
        """Time steps that the read-out gets at a time, for a batch of that size."""
        if self.read_out_steps is not None:
            return self.read_out_steps
        logits = 4 * self.read_out.generator.out_features * max(1, batch)
        most = max(1, 2 * self.memory_budget // logits)
        chunk = self.sequence.chosen_chunk_steps(batch)
        return math.ceil(chunk / math.ceil(chunk / most))


class _AttentiveReadOut(nn.Module):
    """Attention, dropout and generator on the packed rows of some target steps."""

    def __init__(
        self, attention: LuongAttention, dropout: nn.Module, generator: LinearCrossEntropy
    ) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = dropout
        self.generator = generator

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None,
        *,
        slices: Tensor,
        embedded: Any,
        source: SourceContext | PaddedContext,
        order: Tensor,
    ) -> Tensor:
        """The summed loss, or logits (rows, V), of h after some steps, (rows, hidden_size)."""
        rows = packed_rows()
        assert rows is not None
        count = rows.sizes[0]
        context, mask = source.padded(slices, embedded, order, count)
        steps = len(rows.sizes)
        ragged = rows.sizes[-1] < count
        if ragged:
            step = (rows.sequences == 0).cumsum(0) - 1  # each begins with the first sequence
            place = step * count + rows.sequences
            full = hidden.new_zeros(steps * count, hidden.shape[1]).index_copy(0, place, hidden)
        else:
            full = hidden
        attended, _ = self.attention(full.view(steps, count, -1), context, mask)
        attended = attended.reshape(steps * count, -1)
        if ragged:
            attended = attended.index_select(0, place)
        attended = self.dropout(attended)
        if targets is None:
            return self.generator.logits(attended)
        loss: Tensor = self.generator(attended, targets)
        return loss


def packed_steps(tokens: Tensor, lengths: Lengths | None, batch_first: bool) -> PackedSequence:
    """Steps of a batch of sequences without padding.

    Args:
        tokens: (steps, batch) or (batch, steps), by `batch_first`.
        lengths: of each sequence; None: all have all steps.
        batch_first: which of the two.

    Raises:
        ValueError: for tokens of another dimension, or lengths that do not fit them.
    """
    if tokens.dim() != 2:
        order = "(batch, steps)" if batch_first else "(steps, batch)"
        raise ValueError(f"tokens must have shape {order}, got {tuple(tokens.shape)}.")
    batch, steps = tokens.shape if batch_first else tokens.shape[::-1]
    known = torch.full((batch,), steps) if lengths is None else torch.as_tensor(lengths).cpu()
    whole = not known.is_floating_point() and tuple(known.shape) == (batch,)
    if not whole or not batch or known.min() < 1 or known.max() > steps:
        raise ValueError(
            f"lengths must be {batch} whole numbers from 1 to {steps}, one per sequence of tokens "
            f"of shape {tuple(tokens.shape)} (batch_first={batch_first}), got {known.tolist()}."
        )
    return pack_padded_sequence(tokens, known, batch_first, enforce_sorted=False)
