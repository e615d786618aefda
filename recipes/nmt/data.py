"""The data module: which sentence pairs, which tokens, which process reads what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from recipes.common.folders import cache_folder
from recipes.nmt.batches import Batches, BucketSampler, Pair, warn_of_long_lines
from recipes.nmt.corpus import (
    Lines,
    ParallelCorpus,
    Source,
    TestSet,
    check_source,
    download_corpus,
    find_corpus,
    languages,
    read_lines,
)
from recipes.nmt.sentences import Sentences, usable
from recipes.nmt.tokenization import Level, Tokenizer
from recipes.nmt.vocabulary import Vocabulary


class ParallelText(LightningDataModule):
    """Sentence pairs in batches of similar length, from files, Multi30k or number words.

    Multi30k is looked for in `root`, in `$REVFLIP_DATA/multi30k`, in the cache and, with
    `download`, on the network; what was found is logged. Training sentences are shuffled anew in
    every epoch.

    Batch sizes are those of all processes together, also under the Trainer's default
    `use_distributed_sampler=True`: each process reads its own sentences, see `BucketSampler`.

    Checkpoint: vocabularies and tokenizers, so that `predict` and `test` need no training text.

    Args:
        pair: source and target language, such as `de-en`. None: `de-en` of Multi30k, `en-de` of
            number words; for your own files it must be given.
        source: `files`, `multi30k` (an error if it is not found), `numbers`, or `auto`: your own
            files if there are any, else Multi30k if it is found, else number words.
        root: folder with the files of Multi30k, such as `train.de.gz`, or with a folder
            `multi30k` that has them.
        train_source: text file, UTF-8, one sentence per line; or packed, with a name on `.gz`.
        train_target: its translation, line by line.
        val_source: as `train_source`, for validation.
        val_target: as `train_target`, for validation.
        test_source: as `train_source`, for testing.
        test_target: as `train_target`, for testing.
        test_set: the test set of Multi30k.
        download: fetch Multi30k into `root` or the cache if it is not found. Never done unasked.
        verify: compare the files of Multi30k with the published ones.
        batch_size: sentence pairs of a training batch.
        eval_batch_size: sentence pairs of a batch in validation, test and prediction.
        max_train_pairs: train on the first lines only.
        max_length: leave out training pairs with more tokens than this on either side.
        min_count: tokens that are rarer in the training text are unknown.
        max_vocabulary: number of tokens, with the four special ones, of either language.
        source_level: `word` or `char`. None: words.
        target_level: likewise. None: words, but characters of number words, which German and
            others write in one word.
        lower_case: whether tokens are in lower case. `references` are never changed.
        seed: of the shuffling.
        input: text file to translate in `predict`, one sentence per line, UTF-8, or packed.

    Raises:
        ValueError: for arguments that contradict each other and sizes below 1; in `setup`, for
            files that are not UTF-8, not parallel or not the published ones; with the loaders, if
            sentences cannot be divided over the processes.
        FileNotFoundError: in `setup`, if the text that was asked for is not there.
    """

    def __init__(
        self,
        pair: str | None = None,
        source: Source = "auto",
        root: str | None = None,
        train_source: str | None = None,
        train_target: str | None = None,
        val_source: str | None = None,
        val_target: str | None = None,
        test_source: str | None = None,
        test_target: str | None = None,
        test_set: TestSet = "test_2016_flickr",
        download: bool = False,
        verify: bool = True,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        max_train_pairs: int | None = None,
        max_length: int | None = None,
        min_count: int = 1,
        max_vocabulary: int | None = None,
        source_level: Level | None = None,
        target_level: Level | None = None,
        lower_case: bool = True,
        seed: int = 1111,
        input: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        sizes = {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "max_train_pairs": max_train_pairs,
            "max_length": max_length,
            "min_count": min_count,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        self.files = {
            "train_source": train_source,
            "train_target": train_target,
            "val_source": val_source,
            "val_target": val_target,
            "test_source": test_source,
            "test_target": test_target,
        }
        self.source = check_source(source, self.files, root, download, test_set)
        if pair is not None:
            languages(pair)  # raises if it is none
        self.pair = pair
        self.root = root
        self.test_set: TestSet = test_set
        self.download = download
        self.verify = verify
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_train_pairs = max_train_pairs
        self.max_length = max_length
        self.min_count = min_count
        self.max_vocabulary = max_vocabulary
        for name, level in (("source_level", source_level), ("target_level", target_level)):
            if level not in ("word", "char", None):
                raise ValueError(f"{name} must be 'word', 'char' or None, got {level!r}.")
        self.levels = (source_level, target_level)
        self.lower_case = lower_case
        self.seed = seed
        self.input = input
        # With fewer lines than processes some processes have nothing to translate.
        self.allow_zero_length_dataloader_with_multiple_devices = True

        self._corpus: ParallelCorpus | None = None
        self._lines: dict[str, Lines] = {}
        self._input_lines: list[str] | None = None
        self._tokenizers: tuple[Tokenizer, Tokenizer] | None = None
        self._vocabularies: tuple[Vocabulary, Vocabulary] | None = None
        self._pairs: dict[str, list[Pair]] = {}

    def prepare_data(self) -> None:
        if self.download:
            try:
                self._find("multi30k")
            except FileNotFoundError:
                folder = Path(self.root).expanduser() if self.root else cache_folder("multi30k")
                download_corpus(folder, self.pair, self.test_set)

    def setup(self, stage: str) -> None:
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
        for split in needed.get(stage, ()):
            self._read(split)
        if stage == "fit":
            self._encode("train")
        if stage == "predict":
            _ = self.input_lines  # whatever is wrong with the file is to be known now

    # --- text --------------------------------------------------------------------------------

    @property
    def corpus(self) -> ParallelCorpus:
        """The sentence pairs, searched for at first use."""
        if self._corpus is None:
            self._corpus = self._find(self.source)
            rank_zero_info(f"Text: {self._corpus.description}")
        return self._corpus

    def sources(self, split: str) -> list[str]:
        """The source lines of `val` or `test` as they stand in the file, in its order."""
        return self._read(split)[0]

    def references(self, split: str) -> list[str]:
        """The target lines, likewise."""
        return self._read(split)[1]

    @property
    def input_lines(self) -> list[str]:
        """The lines that `predict` translates, as they stand in the file.

        Raises:
            ValueError: if no file is given, or it is not UTF-8.
            FileNotFoundError: if the file is not there.
        """
        if self._input_lines is None:
            if self.input is None:
                raise ValueError(
                    "There is nothing to translate. Give a text file, one sentence per line, as "
                    "--data.input."
                )
            path = Path(self.input).expanduser()
            if not path.is_file():
                raise FileNotFoundError(f"There is no file {self.input}, given as input.")
            self._input_lines = read_lines(path)
        return self._input_lines

    def _find(self, source: Source) -> ParallelCorpus:
        return find_corpus(source, self.pair, self.root, self.files, self.test_set, self.verify)

    def _read(self, split: str) -> Lines:
        if split not in self._lines:
            self._lines[split] = self.corpus.read(split)
        return self._lines[split]

    # --- tokens ------------------------------------------------------------------------------

    @property
    def source_tokenizer(self) -> Tokenizer:
        """Of the source language, by the arguments or from a checkpoint."""
        return self._both_tokenizers()[0]

    @property
    def target_tokenizer(self) -> Tokenizer:
        """Of the target language, by the arguments or from a checkpoint."""
        return self._both_tokenizers()[1]

    @property
    def source_vocabulary(self) -> Vocabulary:
        """The source tokens of the training text, or those that a checkpoint brought."""
        return self._both_vocabularies()[0]

    @property
    def target_vocabulary(self) -> Vocabulary:
        """The target tokens of the training text, or those that a checkpoint brought."""
        return self._both_vocabularies()[1]

    def _both_tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        if self._tokenizers is None:
            corpus, (source, target) = self.corpus, self.levels
            self._tokenizers = (
                Tokenizer(corpus.source_lang, source or "word", self.lower_case),
                Tokenizer(corpus.target_lang, target or corpus.target_level, self.lower_case),
            )
        return self._tokenizers

    def _both_vocabularies(self) -> tuple[Vocabulary, Vocabulary]:
        if self._vocabularies is None:
            self._encode("train")
        assert self._vocabularies is not None
        return self._vocabularies

    def _encode(self, split: str) -> list[Pair]:
        """The encoded pairs of a split; those of `train` make the vocabularies if need be."""
        if split not in self._pairs:
            sentences = self._tokenize(split)
            if self._vocabularies is None and split == "train":
                sizes = self.min_count, self.max_vocabulary
                self._vocabularies = (
                    Vocabulary.of((pair.source for pair in sentences), *sizes),
                    Vocabulary.of((pair.target for pair in sentences), *sizes),
                )
            source, target = self._both_vocabularies()
            self._pairs[split] = [
                Pair(pair.line, source.encode(pair.source), target.encode(pair.target))
                for pair in sentences
            ]
        return self._pairs[split]

    def _tokenize(self, split: str) -> list[Sentences]:
        source, target = self._both_tokenizers()
        lines = list(zip(*self._read(split), strict=True))
        if split == "train":
            lines = lines[: self.max_train_pairs]
        sentences = [
            Sentences(number, source.tokenize(left), target.tokenize(right))
            for number, (left, right) in enumerate(lines)
        ]
        if split != "train":
            return sentences
        return usable(sentences, self.max_length, self.corpus.description)

    # --- loaders -----------------------------------------------------------------------------

    def train_dataloader(self) -> Batches:
        return self._batches(self._encode("train"), train=True)

    def val_dataloader(self) -> Batches:
        return self._evaluation("val")

    def test_dataloader(self) -> Batches:
        return self._evaluation("test")

    def predict_dataloader(self) -> Batches:
        source, _ = self._both_vocabularies()
        tokenizer, _ = self._both_tokenizers()
        lines = enumerate(self.input_lines)
        pairs = [
            Pair(number, source.encode(tokenizer.tokenize(line)), []) for number, line in lines
        ]
        warn_of_long_lines(pairs)
        return self._batches(pairs, train=False)

    def _evaluation(self, split: str) -> Batches:
        pairs = self._encode(split)
        world_size = 1 if self.trainer is None else self.trainer.world_size
        if 0 < len(pairs) < world_size:
            # A process without a batch skips the whole evaluation, and the others wait for it.
            raise ValueError(
                f"The {len(pairs)} sentence pairs of {split} cannot be divided over {world_size} "
                "processes, each needs at least one. Use fewer processes."
            )
        return self._batches(pairs, train=False)

    def _batches(self, pairs: list[Pair], train: bool) -> Batches:
        rank, world_size, overfit = 0, 1, False
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            overfit = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        sampler = BucketSampler(
            [(len(pair.source), len(pair.target)) for pair in pairs],
            self.batch_size if train else self.eval_batch_size,
            train=train,
            seed=self.seed,
            reshuffle=not overfit,  # overfit_batches means the same batches again and again
            rank=rank,
            world_size=world_size,
        )
        return Batches(pairs, sampler)

    # --- checkpoint --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "source_tokenizer": self.source_tokenizer.state_dict(),
            "target_tokenizer": self.target_tokenizer.state_dict(),
            "source_vocabulary": self.source_vocabulary.state_dict(),
            "target_vocabulary": self.target_vocabulary.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        tokenizers = (
            Tokenizer(**state_dict["source_tokenizer"]),
            Tokenizer(**state_dict["target_tokenizer"]),
        )
        vocabularies = (
            Vocabulary(**state_dict["source_vocabulary"]),
            Vocabulary(**state_dict["target_vocabulary"]),
        )
        self._check_languages(tokenizers)
        if self._vocabularies is not None:
            own = self._both_tokenizers(), self._vocabularies
            if own != (tokenizers, vocabularies):
                raise ValueError(
                    f"The checkpoint was trained with {summary(tokenizers, vocabularies)}; the "
                    f"text has other ones: {summary(*own)}. Use the text and the arguments that "
                    "it was trained with."
                )
        self._tokenizers, self._vocabularies = tokenizers, vocabularies

    def _check_languages(self, saved: tuple[Tokenizer, Tokenizer]) -> None:
        """Raise if a checkpoint translates other languages than those asked for or read."""
        trained = tuple(tokenizer.lang for tokenizer in saved)
        asked = None if self.pair is None else languages(self.pair)
        if self._lines and self._corpus is not None:
            asked = self._corpus.source_lang, self._corpus.target_lang
        if asked not in (None, trained):
            raise ValueError(
                f"The checkpoint translates {'-'.join(trained)}, but the data module is set to "
                f"{'-'.join(asked)}. Leave out --data.pair, or use a checkpoint of this pair."
            )


def summary(tokenizers: tuple[Tokenizer, ...], vocabularies: tuple[Vocabulary, ...]) -> str:
    """What an error says about the two languages."""
    sides = zip(vocabularies, tokenizers, strict=True)
    return " and ".join(f"{len(known):,} tokens by {tokenizer}" for known, tokenizer in sides)
