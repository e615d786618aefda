"""Small translators, parallel text and batches."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revflip.convert import convert
from lightning_revflip.reversible import RevGRU, RevLSTM
from recipes.nmt.batches import Batch, Pair, collate
from recipes.nmt.module import Translator
from recipes.nmt.vocabulary import SPECIALS

SOURCE_SIZE, TARGET_SIZE = 13, 11
SOURCE_LENGTHS, TARGET_LENGTHS = (5, 1, 7, 0, 3), (3, 6, 0, 4, 9)
MODES = ("plain", "sequence")
CONTEXTS = ("hidden", "slice:4", "embedding", "embedding+slice:4", "embedding+hidden")
REVERSIBLE = {nn.GRU: RevGRU, nn.LSTM: RevLSTM}

GERMAN = ["eins", "zwei", "drei", "vier", "fünf", "sechs"]
ENGLISH = ["One", "two", "Three", "four", "five", "Six"]
SPLITS = {"train": 40, "val": 11, "test": 9}


def random_pairs(
    source_lengths: Sequence[int] = SOURCE_LENGTHS,
    target_lengths: Sequence[int] = TARGET_LENGTHS,
    seed: int = 0,
) -> list[Pair]:
    """Encoded sentence pairs of ordinary tokens of these lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int, size: int) -> list[int]:
        return torch.randint(len(SPECIALS), size, (length,), generator=generator).tolist()

    return [
        Pair(line, tokens(source, SOURCE_SIZE), tokens(target, TARGET_SIZE))
        for line, (source, target) in enumerate(zip(source_lengths, target_lengths, strict=True))
    ]


def random_batch(*args: Any, **kwargs: Any) -> Batch:
    """As `random_pairs`, put together."""
    return collate(random_pairs(*args, **kwargs))


def small_model(memory: str = "plain", **kwargs) -> Translator:
    """A model without dropout, not yet reversible."""
    defaults = {
        "source_vocab_size": SOURCE_SIZE,
        "target_vocab_size": TARGET_SIZE,
        "embedding_size": 6,
        "hidden_size": 8,
        "dropout": 0.0,
        "memory": memory,
        "chunk_steps": 3 if memory == "sequence" else None,
    }
    return Translator(**{**defaults, **kwargs})


def pair(**kwargs) -> list[Translator]:
    """A plain model and one in mode `sequence`, in float64, reversible and with equal weights."""
    torch.manual_seed(0)
    models = [small_model(memory, **kwargs) for memory in MODES]
    for model in models:
        convert(model, REVERSIBLE, max_forget_bits=3.0)
        model.double()
    models[1].load_state_dict(models[0].state_dict())
    return models


def far_from_uniform(model: Translator) -> Translator:
    """With large random weights, in evaluation mode: all sentences differ."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


def learn(model: Translator, batch: Batch, seed: int = 1) -> Tensor:
    """The loss; gradients are added up."""
    torch.manual_seed(seed)
    loss = model.negative_log_likelihood(batch)
    loss.backward()
    return loss.detach()


def gradients(model: Translator) -> Tensor:
    """Those of all parameters, one after the other."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Number words from one to six and, in English, the same from the end, with punctuation."""
    generator = random.Random(seed)
    pairs = []
    for _ in range(count):
        words = generator.choices(range(len(GERMAN)), k=generator.randint(1, 5))
        english = " ".join(ENGLISH[word] for word in reversed(words))
        pairs.append((" ".join(GERMAN[word] for word in words), f"{english}."))
    return pairs


def write_text(folder: Path, **contents: str) -> dict[str, str]:
    """Write parallel files and return the arguments of `ParallelText` that name them.

    Args:
        folder: where to.
        contents: of a file, by its argument, such as `val_source`, in place of `sentences`.
    """
    arguments = {"pair": "de-en"}
    for seed, (split, count) in enumerate(SPLITS.items()):
        pairs = sentences(count, seed)
        for side, name in enumerate(("source", "target")):
            text = "".join(f"{pair[side]}\n" for pair in pairs)
            path = folder / f"{split}.{name}"
            path.write_text(contents.get(f"{split}_{name}", text), encoding="utf-8", newline="\n")
            arguments[f"{split}_{name}"] = str(path)
    return arguments


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to an error relative to the norm."""
    assert (actual - expected).norm() <= tolerance * expected.norm()
