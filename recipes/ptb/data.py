"""The data module: which text, which windows, which process reads what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from recipes.common.folders import cache_folder
from recipes.ptb.corpus import Corpus, Source, download_corpus, find_corpus
from recipes.ptb.streams import (
    Windows,
    columns_of_rank,
    fixed_lengths,
    parallel_streams,
    variable_lengths,
)
from recipes.ptb.vocabulary import Level, Vocabulary


class Prompt(NamedTuple):
    """What a prediction step gets: a text to continue.

    Attributes:
        tokens: int64, shape (steps, 1); the first one is `<eos>`, after which a line begins.
        new_tokens: how many tokens to add.
        temperature: of the softmax from which they are drawn; 0 takes the likeliest token.
    """

    tokens: Tensor
    new_tokens: int
    temperature: float


class PennTreebank(LightningDataModule):
    """Windows of the Penn Treebank, or of the embedded excerpt where there is no Treebank.

    The text is looked for in `root`, in `$REVFLIP_DATA/ptb`, in the cache and, with `download`, on
    the network; what was found is logged. Training windows vary in length and are drawn anew in
    every epoch if the Trainer has `reload_dataloaders_every_n_epochs=1`.

    Batch sizes are those of all processes together: each process reads its own columns.

    Checkpoint: the vocabulary, so that `predict` needs no data; and which window comes next, so
    that a run stopped within an epoch can go on there.

    Args:
        source: `auto`, `ptb` (an error if it is not found) or `embedded`.
        root: folder with `ptb.train.txt`, `ptb.valid.txt`, `ptb.test.txt`, or with these in `ptb/`.
        level: `word` or `char`.
        batch_size: columns of the training text.
        eval_batch_size: columns of the validation text.
        test_batch_size: columns of the test text; with 1 every token is read in its full context.
        bptt: steps of a window, for training the mean (nearly, see `variable_lengths`).
        variable_length: whether the length of training windows varies.
        seed: of the lengths of training windows.
        download: fetch the Penn Treebank into `root` or the cache if it is not found. Never done
            unasked.
        verify: compare the files with the published ones; false accepts your own three files.
        prompts: texts that `predict` continues, preprocessed as the training text is (for words:
            lower case, no punctuation, blanks between words). None: the beginning of a line.
        new_tokens: number of tokens that `predict` adds to each.
        temperature: of the sampling in `predict`; 0 takes the likeliest token.

    Raises:
        ValueError: for sizes below 1 or a negative temperature; in `setup`, if the batch cannot be
            divided over the processes or a file differs from the published one.
        FileNotFoundError: in `setup`, if the text that was asked for is not there.
    """

    def __init__(
        self,
        source: Source = "auto",
        root: str | None = None,
        level: Level = "word",
        batch_size: int = 20,
        eval_batch_size: int = 10,
        test_batch_size: int = 1,
        bptt: int = 70,
        variable_length: bool = True,
        seed: int = 1111,
        download: bool = False,
        verify: bool = True,
        prompts: Sequence[str] | None = None,
        new_tokens: int = 50,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "test_batch_size": test_batch_size,
            "bptt": bptt,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        if temperature < 0:
            raise ValueError(
                f"temperature must be 0 (take the likeliest token) or more, got {temperature}."
            )
        self.source: Source = source
        self.root = root
        self.level: Level = level
        self.batch_sizes = {"train": batch_size, "valid": eval_batch_size, "test": test_batch_size}
        self.bptt = bptt
        self.variable_length = variable_length
        self.seed = seed
        self.download = download
        self.verify = verify
        self.prompts = [""] if prompts is None else list(prompts)
        self.new_tokens = new_tokens
        self.temperature = temperature

        self._corpus: Corpus | None = None
        self._vocabulary: Vocabulary | None = None
        self._texts: dict[str, Tensor] = {}

    def prepare_data(self) -> None:
        if self.download and self.source != "embedded":
            try:
                find_corpus("ptb", self.root, self.verify)
            except FileNotFoundError:
                download_corpus(Path(self.root) if self.root else cache_folder("ptb"))

    def setup(self, stage: str) -> None:
        needed = {"fit": ("train", "valid"), "validate": ("valid",), "test": ("test",)}
        for split in needed.get(stage, ()):
            if split not in self._texts:
                self._texts[split] = self.vocabulary.encode(self.corpus.read(split))

    @property
    def corpus(self) -> Corpus:
        """The text files, searched for at first use."""
        if self._corpus is None:
            self._corpus = find_corpus(self.source, self.root, self.verify)
            rank_zero_info(f"Text: {self._corpus.description}")
        return self._corpus

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the training text, or those that a checkpoint brought."""
        if self._vocabulary is None:
            self._vocabulary = Vocabulary.of(self.corpus.read("train"), self.level)
        return self._vocabulary

    def train_dataloader(self) -> Windows:
        if self.variable_length and self.trainer is not None and self.trainer.max_epochs != 1:
            reload_every = self.trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
            if reload_every != 1:
                rank_zero_warn(
                    "The training windows will be the same in every epoch. To draw their lengths "
                    "anew, set Trainer(reload_dataloaders_every_n_epochs=1)."
                )
        return self._windows("train")

    def val_dataloader(self) -> Windows:
        return self._windows("valid")

    def test_dataloader(self) -> Windows:
        return self._windows("test")

    def predict_dataloader(self) -> Prompts:
        return Prompts(
            Prompt(
                self.vocabulary.encode(f"\n{text}").unsqueeze(1), self.new_tokens, self.temperature
            )
            for text in self.prompts
        )

    def _windows(self, split: str) -> Windows:
        rank, world_size, epoch = 0, 1, 0
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            epoch = self.trainer.current_epoch
        batch = self.batch_sizes[split]
        streams = parallel_streams(self._texts[split], batch, keep_all=split != "train")
        steps = len(streams.inputs)
        if split == "train" and self.variable_length:
            lengths = variable_lengths(steps, self.bptt, self.seed, epoch)
        else:
            lengths = fixed_lengths(steps, self.bptt)
        own = streams.columns(columns_of_rank(batch, rank, world_size))
        return Windows(own, lengths, self.bptt)

    def state_dict(self) -> dict[str, Any]:
        return {"vocabulary": self.vocabulary.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = Vocabulary(**state_dict["vocabulary"])
        if self._texts and saved != self.vocabulary:
            raise ValueError(
                f"The checkpoint was trained with a vocabulary of {len(saved)} {saved.level} "
                f"tokens, the text has another one, of {len(self.vocabulary)} {self.level} tokens "
                f"({self.corpus.description}). Use the text and the level that it was trained on."
            )
        self._vocabulary = saved


class Prompts:
    """A loader that gives out prompts one by one, the same to every process."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        self._prompts = list(prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)
