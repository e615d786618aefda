"""A translator of ordinary layers: recurrent encoder and decoder with attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_revflip.reversible import LinearCrossEntropy, LuongAttention
from lightning_revflip.reversible.attention import ContextSpec
from recipes.common.perplexity import Perplexity
from recipes.nmt.batches import Batch, parts
from recipes.nmt.data import ParallelText
from recipes.nmt.scores import Scores
from recipes.nmt.search import Translation, beam_search, greedy_search
from recipes.nmt.stepwise import Context, Stepwise
from recipes.nmt.twin import ReversibleTwin
from recipes.nmt.unknown import copy_unknown
from recipes.nmt.vocabulary import BEGIN, END, PAD
from recipes.nmt.writer import Translated

State = Any
"""State of a recurrent layer: `h` of a GRU, `(h, c)` of an LSTM, each (layers, batch, units)."""


PAPER_RATES = {"LSTM": 1.0, "RevLSTM": 0.5, "GRU": 0.2, "RevGRU": 0.2}
"""Learning rates of SGD by recurrent layer."""

PADDED_TOKENS = 10_000
"""Source tokens, padding included, that `predict` translates together."""

CHOICES = {"cell": ("lstm", "gru"), "optimizer": ("sgd", "adam"), "memory": ("plain", "sequence")}
LEAST = {
    **dict.fromkeys(["embedding_size", "hidden_size", "num_layers", "beam_size"], 1),
    **{"length_penalty": 0, "max_length_ratio": 0, "max_extra_length": 1},
}


class Translator(LightningModule):
    """Encoder, decoder with Luong's general attention, generator.

    The models of the reversible-RNN paper (MacKay et al., 2018, section 5.2): the encoder reads in
    one direction, its final state starts the decoder, nothing is fed back but the last word.

    Logs `train/loss` (nats per target token), `perplexity` under `train/`, `val/`, `test/`, and
    under the last two of translations (greedy in validation): `bleu` (detokenised text, sacrebleu's
    tokenisation, upper and lower case alike), `bleu_tokenized` (as the paper counts: the corpus as
    it was tokenised for training) and `exact_match`, the share of sentences that are the reference,
    token by token.

    Args:
        source_vocab_size: tokens of the source. None: the size of the data module's vocabulary.
        target_vocab_size: likewise of the target.
        cell: `lstm` or `gru`.
        embedding_size: of both languages.
        hidden_size: units of encoder and decoder, per layer.
        num_layers: of encoder and decoder.
        context: what attention sees of a source step: `hidden` (all units of the top layer),
            `slice:k` (the first k), `embedding`, or both, as `embedding+slice:k`.
        dropout: of both embeddings, between layers, and before the generator.
        optimizer: `sgd` or `adam`.
        lr: learning rate, for a loss that is summed over tokens and averaged over sentences. None:
            `PAPER_RATES` for `sgd`, 0.002 for `adam`.
        divide_lr_by: what the learning rate is divided by after a validation whose perplexity is
            no better than the best so far.
        clip_norm: largest norm of a gradient, unless the Trainer has a `gradient_clip_val`.
        beam_size: of the search in `predict` and `test`; 1 is greedy.
        length_penalty: alpha of the search with more than one beam.
        max_length_ratio: a translation has at most this many tokens per source token ...
        max_extra_length: ... and so many more.
        memory: `plain` computes a batch layer by layer, and autograd keeps all of it. `sequence`
            computes encoder and decoder in a reversible pass each. Recurrent layers must be
            reversible: add the callback `ReversibleRNN`. Parameters, checkpoints, loss and
            gradients are the same; the search is always plain.
        chunk_steps: steps in a chunk of `sequence`; None chooses.

    Raises:
        ValueError: for an unknown cell, context, optimizer or memory mode, numbers out of range,
            and, at the first batch of `sequence`, for recurrent layers that are not reversible.
    """

    def __init__(
        self,
        source_vocab_size: int | None = None,
        target_vocab_size: int | None = None,
        cell: Literal["lstm", "gru"] = "lstm",
        embedding_size: int = 300,
        hidden_size: int = 300,
        num_layers: int = 1,
        context: str = "hidden",
        dropout: float = 0.4,
        optimizer: Literal["sgd", "adam"] = "sgd",
        lr: float | None = None,
        divide_lr_by: float = 2.0,
        clip_norm: float = 5.0,
        beam_size: int = 5,
        length_penalty: float = 1.0,
        max_length_ratio: float = 2.0,
        max_extra_length: int = 50,
        memory: Literal["plain", "sequence"] = "plain",
        chunk_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name, (one, other) in CHOICES.items():
            if self.hparams[name] not in (one, other):
                raise ValueError(
                    f"{name} must be {one!r} or {other!r}, got {self.hparams[name]!r}."
                )
        for name, least in LEAST.items():
            if self.hparams[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {self.hparams[name]}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}.")
        if divide_lr_by <= 1:
            raise ValueError(f"divide_lr_by must be above 1 for rates to fall, got {divide_lr_by}.")
        if chunk_steps is not None and (memory == "plain" or chunk_steps < 1):
            raise ValueError(
                "chunk_steps must be at least 1, or None to choose, and needs memory='sequence'; "
                f"got {chunk_steps} with memory={memory!r}."
            )
        self.context = ContextSpec.parse(context)
        context_size = self.context.size(embedding_size, hidden_size)

        # Layers. Those that need the size of a vocabulary are made in configure_model.
        layer = nn.LSTM if cell == "lstm" else nn.GRU
        between = dropout if num_layers > 1 else 0.0
        self.encoder = layer(embedding_size, hidden_size, num_layers, dropout=between)
        self.decoder = layer(embedding_size, hidden_size, num_layers, dropout=between)
        self.attention = LuongAttention(hidden_size, context_size)
        self.source_dropout = nn.Dropout(dropout)
        self.target_dropout = nn.Dropout(dropout)
        self.output_dropout = nn.Dropout(dropout)
        self.source_embedding: nn.Embedding | None = None
        self.target_embedding: nn.Embedding | None = None
        self.generator: nn.Linear | None = None
        for parameter in self.attention.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)
        if source_vocab_size is not None and target_vocab_size is not None:
            self._make_vocabulary_layers(source_vocab_size, target_vocab_size)
        self._twin: ReversibleTwin | None = None

        self.train_perplexity = Perplexity()
        self.val_scores = Scores()
        self.test_scores = Scores()

    # --- layers ------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Make embeddings and generator once the sizes of the vocabularies are known."""
        if self.source_embedding is None:
            data = getattr(self.trainer, "datamodule", None)
            if not isinstance(data, ParallelText):
                raise ValueError(
                    "The sizes of the vocabularies are not known: the data module is not a "
                    "ParallelText. Give Translator(source_vocab_size=..., target_vocab_size=...)."
                )
            sizes = len(data.source_vocabulary), len(data.target_vocabulary)
            names = ("source_vocab_size", "target_vocab_size")
            self.save_hyperparameters(dict(zip(names, sizes, strict=True)))
            self._make_vocabulary_layers(*sizes)

    def _make_vocabulary_layers(self, source: int, target: int) -> None:
        embedding, hidden = self.hparams["embedding_size"], self.hparams["hidden_size"]
        self.source_embedding = nn.Embedding(source, embedding)
        self.target_embedding = nn.Embedding(target, embedding)
        if self.hparams["memory"] == "sequence":
            self.generator = LinearCrossEntropy(hidden, target, ignore_index=PAD)
        else:
            self.generator = nn.Linear(hidden, target)
        for layer in (self.source_embedding, self.target_embedding, self.generator):
            nn.init.uniform_(layer.weight, -0.1, 0.1)
        nn.init.zeros_(self.generator.bias)

    def _vocabulary_layers(self) -> tuple[nn.Embedding, nn.Embedding, nn.Linear]:
        layers = (self.source_embedding, self.target_embedding, self.generator)
        if None in layers:
            raise RuntimeError(
                "The layers do not exist yet. Give Translator(source_vocab_size=..., "
                "target_vocab_size=...), or let a Trainer with a ParallelText run the model."
            )
        return layers  # type: ignore[return-value]

    @property
    def twin(self) -> ReversibleTwin:
        """This model in reversible passes; made when it is needed, after `ReversibleRNN` acted."""
        if self._twin is None:
            self._vocabulary_layers()
            self._twin = ReversibleTwin(self)
        return self._twin

    # --- forward and loss --------------------------------------------------------------------

    def encode(self, source: Tensor, lengths: Sequence[int]) -> tuple[Context, State]:
        """Read source sentences.

        Args:
            source: int64, (source steps, batch).
            lengths: of each sentence.

        Returns:
            What to attend to, and the final state.
        """
        embedding, _, _ = self._vocabulary_layers()
        embedded = self.source_dropout(embedding(source))
        steps = torch.tensor(lengths)
        packed = pack_padded_sequence(embedded, steps, enforce_sorted=False)
        output, state = self.encoder(packed)
        hidden, _ = pad_packed_sequence(output, total_length=len(source))
        units = self.context.hidden_units(hidden.shape[-1])
        parts = [embedded] if self.context.embedding else []
        if units:
            parts.append(hidden[..., :units])
        mask = torch.arange(len(source)) < steps.unsqueeze(1)
        context = torch.cat(parts, dim=-1).transpose(0, 1)
        return Context(context, mask.to(source.device)), state

    def decode(
        self, tokens: Tensor, lengths: Sequence[int] | None, context: Context, state: State
    ) -> tuple[Tensor, Tensor, State]:
        """Read target tokens, each with the right word before it.

        Args:
            tokens: int64, (target steps, batch).
            lengths: of each target; None: all have all steps.
            context: of each sentence.
            state: of the decoder.

        Returns:
            Attentional states, (target steps, batch, H), for `logits`; attention weights,
            (target steps, batch, source steps); and the state.
        """
        _, embedding, _ = self._vocabulary_layers()
        x: Any = self.target_dropout(embedding(tokens))
        if lengths is not None:
            x = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        hidden, state = self.decoder(x, state)
        if lengths is not None:
            hidden, _ = pad_packed_sequence(hidden, total_length=len(tokens))
        attended, weights = self.attention(hidden, context.steps, context.mask)
        return attended, weights, state

    def logits(self, attended: Tensor) -> Tensor:
        """Of the next token, (..., V), from attentional states, (..., H)."""
        _, _, generator = self._vocabulary_layers()
        return F.linear(self.output_dropout(attended), generator.weight, generator.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Logits of a batch, (target steps, batch, V), by the plain path."""
        context, state = self.encode(batch.source, batch.source_lengths)
        attended, _, _ = self.decode(batch.target_inputs, batch.target_lengths, context, state)
        return self.logits(attended)

    def negative_log_likelihood(self, batch: Batch) -> Tensor:
        """Of all target tokens of a batch, summed, in nats, in either memory mode."""
        if self.hparams["memory"] == "sequence":
            return self.twin.negative_log_likelihood(batch, self.training)
        logits, targets = self(batch).flatten(0, 1), batch.targets.flatten()
        return F.cross_entropy(logits, targets, ignore_index=PAD, reduction="sum")

    # --- search ------------------------------------------------------------------------------

    @torch.no_grad()
    def translate(self, batch: Batch, beam_size: int = 1) -> list[Translation]:
        """Translate source sentences, greedily or by beam search; call `eval()` before."""
        context, state = self.encode(batch.source, batch.source_lengths)
        ratio, extra = self.hparams["max_length_ratio"], self.hparams["max_extra_length"]
        limits = [int(ratio * length) + extra for length in batch.source_lengths]
        arguments = (Stepwise(self), (context, state), len(limits), BEGIN, END, limits)
        options: dict[str, Any] = {"forbidden": (PAD, BEGIN), "device": self.device}
        if beam_size == 1:
            return greedy_search(*arguments, **options)
        alpha = self.hparams["length_penalty"]
        found = beam_search(*arguments, beam_size, alpha, **options)
        return [translations[0] for translations in found]

    @torch.no_grad()
    def attention_weights(
        self, batch: Batch, translations: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """What each token of some translations attended to: (its tokens, source steps) each."""
        context, state = self.encode(batch.source, batch.source_lengths)
        lengths = [len(tokens) + 1 for tokens in translations]
        read = torch.full((max(lengths), len(lengths)), PAD)
        for column, tokens in enumerate(translations):
            read[: len(tokens) + 1, column] = torch.tensor([BEGIN, *tokens])
        _, weights, _ = self.decode(read.to(batch.source.device), lengths, context, state)
        sizes = zip(lengths, batch.source_lengths, strict=True)
        return [weights[: n - 1, i, :m].float().cpu() for i, (n, m) in enumerate(sizes)]

    # --- steps -------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        nll = self.negative_log_likelihood(batch)
        tokens, size = sum(batch.target_lengths), len(batch.lines)
        perplexity = self.train_perplexity
        perplexity.update(nll, tokens)
        self.log("train/perplexity", perplexity, on_step=False, on_epoch=True, batch_size=size)
        self.log("train/loss", nll / tokens, prog_bar=True, batch_size=size)
        return nll / size

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", self.val_scores, batch, beam_size=1)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Evaluate, and return the fields of `Translated`."""
        texts = self._evaluate("test", self.test_scores, batch, self.hparams["beam_size"])
        return Translated(batch.lines, texts)._asdict()

    def predict_step(self, batch: Batch, batch_idx: int) -> Translated:
        """Translate lines; an unknown word becomes the source word that it attended to most."""
        lines: tuple[int, ...] = ()
        texts: list[str] = []
        for part in parts(batch, PADDED_TOKENS):
            lines += part.lines
            texts += self._texts(part)
        return Translated(lines, texts)

    def _texts(self, batch: Batch) -> list[str]:
        data = self._data()
        found = [t.tokens for t in self.translate(batch, self.hparams["beam_size"])]
        words = [data.target_vocabulary.decode(tokens) for tokens in found]
        sources = [data.source_tokenizer.tokenize(data.input_lines[line]) for line in batch.lines]
        copy_unknown(self, batch, found, words, sources)
        texts = [data.target_tokenizer.detokenize(tokens) for tokens in words]
        return [text if source else "" for text, source in zip(texts, sources, strict=True)]

    def _evaluate(self, split: str, scores: Scores, batch: Batch, beam_size: int) -> list[str]:
        """Update and log the scores, and return the translations."""
        data, size = self._data(), len(batch.lines)
        found = [data.target_vocabulary.decode(t.tokens) for t in self.translate(batch, beam_size)]
        references = [data.references(split)[line] for line in batch.lines]
        scores.perplexity.update(self.negative_log_likelihood(batch), sum(batch.target_lengths))
        texts = scores.compare(found, references, data.target_tokenizer)
        for name, score in scores.named_children():
            on_bar = name in ("perplexity", "bleu")
            self.log(f"{split}/{name}", score, on_epoch=True, prog_bar=on_bar, batch_size=size)  # type: ignore[arg-type]
        return texts

    def _data(self) -> ParallelText:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ParallelText):
            raise RuntimeError(
                "Translator needs a ParallelText as data module, which knows tokens and references."
            )
        return data

    # --- optimization ------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        lr = self.hparams["lr"]
        optimizer: Optimizer
        if self.hparams["optimizer"] == "sgd":
            rate = PAPER_RATES[type(self.encoder).__name__] if lr is None else lr
            optimizer = SGD(self.parameters(), rate)
        else:
            optimizer = Adam(self.parameters(), 0.002 if lr is None else lr)
        factor = 1.0 / self.hparams["divide_lr_by"]
        plateau = ReduceLROnPlateau(optimizer, factor=factor, patience=0, threshold=0.0)
        scheduler = {"scheduler": plateau, "monitor": "val/perplexity", "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Nothing: Lightning would step after checkpoints are saved, and not after every resume."""

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            plateau: Any = self.lr_schedulers()
            plateau.step(self.val_scores.perplexity.compute())

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        limit = self.hparams["clip_norm"] if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, limit, gradient_clip_algorithm or "norm")

    def on_train_epoch_start(self) -> None:
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
