"""`SampleBankCodes`: the samples of a bank as code vectors, to train an `APDModule` on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_revflip.apd import Codec, IdentityCodec, ParameterCodec, encode_all
from lightning_revflip.modules.apd import APDModule
from lightning_revflip.modules.replicas import replica
from lightning_revflip.posterior import SampleBank

_BLOCKS = 4
"""Blocks that are held out of each chain."""


class SampleBankCodes(LightningDataModule):
    """Batches of codes of a bank's samples; some samples are held out for validation.

    Samples that follow one another in a chain are nearly equal, so that a random hold-out would be
    known from its neighbours. Held out are instead four blocks of each chain, at equal distances.

    An epoch is a fixed number of batches, drawn at random with replacement. A checkpoint holds how
    far they have come, so that a run resumes with the batch that would have come next. With several
    processes each gets its part of batches that are as many times larger.

    Args:
        bank: samples, or the folder of their bank.
        codec: makes codes of them; None: that of the `APDModule` which is trained.
        batch_size: codes of a batch, in each process: those of all critic steps of an `APDModule`.
        holdout: share of the samples to hold out, rounded to a whole number in each chain; 0 for
            none. Of a small bank two are held out where the share would be a single one.
        batches_per_epoch: number of batches, after which Lightning validates.
        seed: of the draws.

    Raises:
        ValueError: for settings out of range; in `setup`, without a codec, for one of another
            architecture than the bank, and without samples to train on.

    Examples:
        >>> bank = SampleBank("runs/mnist/bank")  # doctest: +SKIP
        >>> module = APDModule(fit_codec(bank, rank=20))  # doctest: +SKIP
        >>> trainer.fit(module, SampleBankCodes(bank))  # doctest: +SKIP
    """

    def __init__(
        self,
        bank: SampleBank | str | PathLike[str],
        codec: Codec | None = None,
        batch_size: int = 100,
        holdout: float = 0.1,
        batches_per_epoch: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout must be a share from 0 up to but not 1, got {holdout}.")
        for name, value in {
            "batch_size": batch_size,
            "batches_per_epoch": batches_per_epoch,
        }.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.bank = bank if isinstance(bank, SampleBank) else SampleBank(bank)
        self.codec = codec
        self.batch_size = batch_size
        self.holdout = holdout
        self.batches_per_epoch = batches_per_epoch
        self.seed = seed
        self.train_codes = self.val_codes = torch.empty(0, 0)
        self._loader: CodeBatches | None = None
        self._saved: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        """Encode the samples."""
        lengths = [len(steps) for steps in self.bank.steps.values()]
        train, held_out = split_by_time(lengths, self.holdout)
        if not train:
            raise ValueError(
                f"{self.bank!r} has no samples to train on: holdout={self.holdout} keeps "
                f"{len(held_out)} for validation. Collect more samples, or hold out fewer."
            )
        codes = encode_all(self._find_codec(), self.bank)
        self.train_codes, self.val_codes = codes[train], codes[held_out]

    def _find_codec(self) -> Codec:
        if self.codec is not None:
            return self.codec
        module = None if self.trainer is None else self.trainer.lightning_module
        if not isinstance(module, APDModule):
            raise ValueError(
                "SampleBankCodes has no codec, and is not used to train an APDModule, whose codec "
                "it would take. Give it one, such as ParameterCodec.fit(bank, rank=20)."
            )
        if not hasattr(module, "codec"):
            raise ValueError(
                "neither SampleBankCodes nor the APDModule has a codec. Give the module one: "
                "APDModule(fit_codec(bank, rank=20))."
            )
        return module.codec

    def train_dataloader(self) -> CodeBatches:
        rank, processes = 0, 1
        if self.trainer is not None:
            rank, processes = replica(self.trainer)
        self._loader = CodeBatches(
            self.train_codes, self.batch_size, self.batches_per_epoch, self.seed, rank, processes
        )
        if self._saved:
            self._loader.load_state_dict(self._saved)
            self._saved = {}
        return self._loader

    def val_dataloader(self) -> list[DataLoader[Tensor]]:
        if len(self.val_codes) == 0:
            return []
        return [DataLoader(self.val_codes, batch_size=self.batch_size)]  # type: ignore[arg-type]

    # Lightning saves the state of loaders as well, but restores it within an epoch only.
    def state_dict(self) -> dict[str, Any]:
        """Where the loader for training is."""
        return self._saved if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next loader for training go on from there."""
        self._saved = dict(state_dict)


def fit_codec(bank: SampleBank | str | PathLike[str], rank: int | None = 20) -> Codec:
    """The codec of a bank, in one call that a configuration file can make.

    Args:
        bank: samples, or the folder of their bank.
        rank: of a `ParameterCodec`; None: an `IdentityCodec`.

    Raises:
        ValueError: for a rank out of range, and samples that are not finite.
    """
    bank = bank if isinstance(bank, SampleBank) else SampleBank(bank)
    if rank is None:
        return IdentityCodec.fit(bank)
    return ParameterCodec.fit(bank, rank)


class CodeBatches:
    """A fixed number of batches in each pass, drawn with replacement; the next pass draws others.

    Args:
        codes: shape (n, size).
        batch_size: codes of a batch.
        num_batches: batches of a pass.
        seed: of the draws.
        rank: number of this process.
        processes: draw together: they have the parts of one batch of batch_size * processes.
    """

    def __init__(
        self,
        codes: Tensor,
        batch_size: int,
        num_batches: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.codes = codes
        self.batch_size = batch_size
        self.num_batches = num_batches
        self._share = slice(rank, None, processes)
        self._drawn = batch_size * processes
        self._generator = torch.Generator().manual_seed(seed)
        self._given = 0

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Tensor]:
        if self._given == self.num_batches:
            self._given = 0
        while self._given < self.num_batches:
            drawn = torch.randint(len(self.codes), (self._drawn,), generator=self._generator)
            self._given += 1
            yield self.codes[drawn[self._share]]

    def state_dict(self) -> dict[str, Any]:
        """Where it is; the same in all processes."""
        return {"given": self._given, "generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._given = state_dict["given"]
        self._generator.set_state(state_dict["generator"])


def split_by_time(lengths: Sequence[int], holdout: float) -> tuple[list[int], list[int]]:
    """Divide the samples of several chains into those to train on and those to hold out.

    Of each chain, the end of each of four equal parts is held out; fewer, if it has fewer.

    Args:
        lengths: samples of each chain.
        holdout: share of them to hold out, rounded to a whole number in each chain. Where that
            is one sample of all, it is two: held-out samples are compared with each other.

    Returns:
        Numbers of the samples to train on, and of those held out, each in order.

    Examples:
        >>> split_by_time([8, 8], holdout=0.5)
        ([0, 2, 4, 6, 8, 10, 12, 14], [1, 3, 5, 7, 9, 11, 13, 15])
        >>> split_by_time([40], holdout=0.2)[1]
        [8, 9, 18, 19, 28, 29, 38, 39]
        >>> split_by_time([10], holdout=0.1)[1]
        [4, 9]
    """
    counts = [round(holdout * length) for length in lengths]
    if sum(counts) == 1:
        counts = [min(2 * count, length) for count, length in zip(counts, lengths, strict=True)]
    held_out: set[int] = set()
    start = 0
    for length, count in zip(lengths, counts, strict=True):
        blocks = max(1, min(_BLOCKS, count))
        for i in range(blocks):
            end = start + length * (i + 1) // blocks
            size = count * (i + 1) // blocks - count * i // blocks
            held_out.update(range(end - size, end))
        start += length
    return [i for i in range(start) if i not in held_out], sorted(held_out)
