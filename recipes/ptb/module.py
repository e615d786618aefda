"""A recurrent language model of ordinary layers, which `ReversibleRNN` may have replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Optimizer

from lightning_revflip.reversible import LinearCrossEntropy, LockedDropout
from recipes.common.perplexity import Perplexity
from recipes.ptb.data import Prompt
from recipes.ptb.decay import NonMonotonicDecay
from recipes.ptb.dropout import EmbeddingWithDropout, drop_weights
from recipes.ptb.sequence import SequenceReader
from recipes.ptb.streams import IGNORED, Window

State = Tensor | tuple[Tensor, Tensor]
"""State of one recurrent layer: `h` of a GRU, `(h, c)` of an LSTM, each (1, batch, units)."""


class Continuation(NamedTuple):
    """What `predict_step` returns.

    Attributes:
        tokens: int64, shape (prompt + new tokens,).
        log_probs: float32, one less than `tokens`: of each token after the first, given those
            before it, in nats.
    """

    tokens: Tensor
    log_probs: Tensor


class LanguageModel(LightningModule):
    """Predicts the next token: embedding, one or more recurrent layers, softmax tied to the former.

    The regularisation and the training schedule are those of the AWD-LSTM (Merity et al., 2018),
    as the language models of the reversible-RNN paper use them (MacKay et al., 2018): SGD with a
    large learning rate, clipping, and a rate that falls when validation stops improving. The state
    of a window is the initial state of the next one.

    Logs `train/loss`, and `perplexity` per token under `train/`, `val/` and `test/`.

    Checkpoint: the state after the last training window, so that a run stopped within an epoch
    goes on in the middle of the text. A run on several processes starts again from a zero state
    there, since each process has the state of its own columns. `train/perplexity` of a resumed
    epoch is that of the windows since.

    Args:
        vocab_size: number of tokens. None: the size of the data module's `vocabulary`.
        cell: `lstm` or `gru`.
        embedding_size: size of an embedding.
        hidden_sizes: units of each recurrent layer; the last must be `embedding_size`, since the
            softmax shares its weights with the embedding.
        output_dropout: dropout before the softmax.
        hidden_dropout: dropout between recurrent layers.
        input_dropout: dropout after the embedding.
        embedding_dropout: probability with which a word is left out wherever it occurs.
        weight_drop: dropout of hidden-to-hidden weights, one mask for all steps of a window.
        lr: learning rate of a window of nominal length.
        divide_lr_by: divisor of `NonMonotonicDecay`.
        patience: of `NonMonotonicDecay`, which is asked after every validation.
        weight_decay: of all parameters.
        clip_norm: largest norm of a gradient, unless the Trainer has a `gradient_clip_val`.
        memory: `plain` computes a window layer by layer, and autograd keeps embeddings, outputs and
            logits of all its steps. `sequence` computes it from the tokens to the loss in chunks of
            steps, backwards too, and keeps nothing that grows with the window but what the
            recurrent layers forget. These must be reversible: add the callback `ReversibleRNN`.
            Parameters, checkpoints, loss and gradients are the same; `predict` is always plain.
        chunk_steps: steps in a chunk of `sequence`; None chooses.

    Raises:
        ValueError: for sizes that do not fit together, an unknown cell or memory mode, a dropout
            outside [0, 1), `chunk_steps` below 1 or without `sequence`, and, when the first window
            is read by `sequence`, for recurrent layers that are not reversible.
    """

    def __init__(
        self,
        vocab_size: int | None = None,
        cell: Literal["lstm", "gru"] = "lstm",
        embedding_size: int = 650,
        hidden_sizes: Sequence[int] = (650,),
        output_dropout: float = 0.4,
        hidden_dropout: float = 0.3,
        input_dropout: float = 0.4,
        embedding_dropout: float = 0.1,
        weight_drop: float = 0.5,
        lr: float = 20.0,
        divide_lr_by: float = 4.0,
        patience: int = 5,
        weight_decay: float = 1.2e-6,
        clip_norm: float = 0.1,
        memory: Literal["plain", "sequence"] = "plain",
        chunk_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if cell not in ("lstm", "gru"):
            raise ValueError(f"cell must be 'lstm' or 'gru', got {cell!r}.")
        if not hidden_sizes or hidden_sizes[-1] != embedding_size:
            raise ValueError(
                f"The last of hidden_sizes must be embedding_size ({embedding_size}), because the "
                f"softmax shares the weights of the embedding; got {list(hidden_sizes)}."
            )
        dropouts = {
            "output_dropout": output_dropout,
            "hidden_dropout": hidden_dropout,
            "input_dropout": input_dropout,
            "embedding_dropout": embedding_dropout,
            "weight_drop": weight_drop,
        }
        for name, p in dropouts.items():
            if not 0 <= p < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {p}.")
        if memory not in ("plain", "sequence"):
            raise ValueError(f"memory must be 'plain' or 'sequence', got {memory!r}.")
        if chunk_steps is not None and (memory == "plain" or chunk_steps < 1):
            raise ValueError(
                "chunk_steps must be at least 1, or None to choose, and needs memory='sequence'; "
                f"got {chunk_steps} with memory={memory!r}."
            )
        self.dropouts = dropouts
        self.lr = lr
        self.divide_lr_by = divide_lr_by
        self.patience = patience
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self.memory = memory
        self.chunk_steps = chunk_steps

        # Layers. Those that need the size of the vocabulary are made in configure_model.
        layer = nn.LSTM if cell == "lstm" else nn.GRU
        sizes = [embedding_size, *hidden_sizes]
        self.rnns = nn.ModuleList(map(layer, sizes[:-1], sizes[1:]))
        self.input_dropout = LockedDropout(embedding_size, input_dropout)
        self.hidden_dropouts = nn.ModuleList(
            LockedDropout(size, hidden_dropout) for size in hidden_sizes[:-1]
        )
        self.output_dropout = LockedDropout(embedding_size, output_dropout)
        self.embedding_size = embedding_size
        self.embedding: nn.Embedding | None = None
        self.softmax: nn.Linear | None = None
        if vocab_size is not None:
            self._make_tied_layers(vocab_size)
        self._reader: SequenceReader | None = None

        self.train_perplexity = Perplexity()
        self.val_perplexity = Perplexity()
        self.test_perplexity = Perplexity()

        # State of the recurrent layers after the last window, of training and of evaluation.
        self._carried: dict[str, list[State]] = {}
        self._lr_scale = 1.0

    # --- layers ------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Make the embedding and the softmax once the size of the vocabulary is known."""
        if self.embedding is None:
            vocabulary = getattr(self.trainer.datamodule, "vocabulary", None)  # type: ignore[attr-defined]
            if vocabulary is None:
                raise ValueError(
                    "The size of the vocabulary is not known: the data module has no `vocabulary`. "
                    "Give LanguageModel(vocab_size=...)."
                )
            self.save_hyperparameters({"vocab_size": len(vocabulary)})
            self._make_tied_layers(len(vocabulary))

    def _make_tied_layers(self, vocab_size: int) -> None:
        size, p = self.embedding_size, self.dropouts["embedding_dropout"]
        self.embedding = EmbeddingWithDropout(vocab_size, size, p)
        if self.memory == "sequence":
            self.softmax = LinearCrossEntropy(size, vocab_size, ignore_index=IGNORED)
        else:
            self.softmax = nn.Linear(size, vocab_size)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.softmax.bias)
        self.softmax.weight = self.embedding.weight

    def _tied_layers(self) -> tuple[nn.Embedding, nn.Linear]:
        if self.embedding is None or self.softmax is None:
            raise RuntimeError(
                "The layers do not exist yet. Give LanguageModel(vocab_size=...), or let a Trainer "
                "with a data module that has a `vocabulary` run the model."
            )
        return self.embedding, self.softmax

    def _sequence_reader(self) -> SequenceReader:
        """Made when it is needed: `ReversibleRNN` replaces recurrent layers before that."""
        if self._reader is None:
            embedding, softmax = self._tied_layers()
            self._reader = SequenceReader(
                [embedding, self.input_dropout],
                list(self.rnns),
                list(self.hidden_dropouts),
                self.output_dropout,
                cast(LinearCrossEntropy, softmax),
                self.chunk_steps,
            )
        return self._reader

    # --- forward and loss --------------------------------------------------------------------

    def forward(
        self, inputs: Tensor, states: list[State] | None = None
    ) -> tuple[Tensor, list[State]]:
        """Read a window.

        Args:
            inputs: int64, shape (steps, batch).
            states: of the recurrent layers, after the window before; None for zeros.

        Returns:
            Logits of the next token, shape (steps, batch, vocabulary), and the states.
        """
        embedding, softmax = self._tied_layers()
        weights = self._drop_weights()
        hidden = self.input_dropout(embedding(inputs))
        new_states = []
        for number, rnn in enumerate(self.rnns):
            if number > 0:
                hidden = self.hidden_dropouts[number - 1](hidden)
            state = None if states is None else states[number]
            hidden, state = functional_call(rnn, weights[number], (hidden, state))
            new_states.append(state)
        hidden = self.output_dropout(hidden)
        return F.linear(hidden, softmax.weight, softmax.bias), new_states

    def negative_log_likelihood(
        self, inputs: Tensor, targets: Tensor, states: list[State] | None = None
    ) -> tuple[Tensor, list[State]]:
        """Read a window with known targets, in either memory mode.

        Args:
            inputs: int64, shape (steps, batch).
            targets: int64, shape (steps, batch): the token after each input, or `IGNORED`.
            states: of the recurrent layers, after the window before; None for zeros.

        Returns:
            The sum over all targets, in nats, and the states.
        """
        if self.memory == "sequence":
            reader, weights = self._sequence_reader(), self._drop_weights()
            return reader(inputs, targets, states, weights, self.training)
        logits, states = self(inputs, states)
        nll = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return nll, states

    def _drop_weights(self) -> list[dict[str, Tensor]]:
        """For each recurrent layer, what takes the place of its weights in this window."""
        p = self.dropouts["weight_drop"] if self.training else 0.0
        return [drop_weights(rnn, p) for rnn in self.rnns]

    def _read(self, window: Window, part: str, perplexity: Perplexity) -> Tensor:
        """Mean negative log-likelihood of a window, which goes on where the one before ended."""
        states = None if window.starts_stream else self._carried.get(part)
        nll, states = self.negative_log_likelihood(window.inputs, window.targets, states)
        self._carried[part] = [_detach(state) for state in states]
        tokens = (window.targets != IGNORED).sum()
        perplexity.update(nll, tokens)
        on_bar = part != "train"
        self.log(f"{part}/perplexity", perplexity, on_step=False, on_epoch=True, prog_bar=on_bar)
        return nll / tokens

    # --- steps -------------------------------------------------------------------------------

    def training_step(self, window: Window, batch_idx: int) -> Tensor:
        loss = self._read(window, "train", self.train_perplexity)
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        return loss

    def validation_step(self, window: Window, batch_idx: int) -> None:
        self._read(window, "val", self.val_perplexity)

    def test_step(self, window: Window, batch_idx: int) -> None:
        self._read(window, "test", self.test_perplexity)

    def predict_step(self, prompt: Prompt, batch_idx: int) -> Continuation:
        """Continue a text, token by token, and tell how likely each token was."""
        logits, states = self(prompt.tokens)
        logits = logits[:, 0]
        tokens = prompt.tokens[:, 0]
        log_probs = [logits[:-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]]
        chosen = [tokens]
        for _ in range(prompt.new_tokens):
            token = _choose(logits[-1], prompt.temperature)
            chosen.append(token)
            log_probs.append(logits[-1].log_softmax(-1)[token])
            logits, states = self(token[:, None], states)
            logits = logits[:, 0]
        return Continuation(torch.cat(chosen), torch.cat(log_probs).float())

    # --- optimization ------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        decay = NonMonotonicDecay(optimizer, self.divide_lr_by, self.patience)
        return {"optimizer": optimizer, "lr_scheduler": decay}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Nothing: the rule counts validations, not epochs, see `on_validation_epoch_end`."""

    def on_validation_epoch_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            decay: Any = self.lr_schedulers()
            decay.step(self.val_perplexity.compute())

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        self.clip_gradients(
            optimizer,
            self.clip_norm if gradient_clip_val is None else gradient_clip_val,
            gradient_clip_algorithm or "norm",
        )

    def on_train_epoch_start(self) -> None:
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_start(self, batch: Window, batch_idx: int) -> None:
        self._lr_scale = batch.lr_scale

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Take a step whose size follows the length of the window."""
        with _scaled_lr(optimizer, self._lr_scale):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    # --- checkpoint --------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "train" in self._carried and self.trainer.world_size == 1:
            checkpoint["carried_state"] = self._carried["train"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "carried_state" in checkpoint:
            self._carried["train"] = checkpoint["carried_state"]

    def on_train_start(self) -> None:
        self._carried = move_data_to_device(self._carried, self.device)


def _detach(state: State) -> State:
    return state.detach() if isinstance(state, Tensor) else (state[0].detach(), state[1].detach())


def _choose(logits: Tensor, temperature: float) -> Tensor:
    """A token, shape (1,), drawn from logits of shape (vocabulary,), or the likeliest one."""
    if temperature == 0:
        return logits.argmax().unsqueeze(0)
    return torch.multinomial((logits / temperature).softmax(-1), 1)


@contextmanager
def _scaled_lr(optimizer: Optimizer | LightningOptimizer, scale: float) -> Iterator[None]:
    """Learning rates times `scale` within the context."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= scale
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
