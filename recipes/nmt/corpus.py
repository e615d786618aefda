"""Where the sentence pairs come from: your files, Multi30k, or generated number words.

Multi30k (Elliott et al., 2016, arXiv 1605.00459) is for research use and not part of this project.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from recipes.common.folders import candidates
from recipes.nmt.numbers import read_numbers
from recipes.nmt.tokenization import Level

Source = Literal["auto", "multi30k", "files", "numbers"]
TestSet = Literal["test_2016_flickr", "test_2017_flickr", "test_2018_flickr"]

SPLITS = ("train", "val", "test")
TEST_SETS = ("test_2016_flickr", "test_2017_flickr", "test_2018_flickr")
LANGUAGES = ("de", "en", "fr")  # of Multi30k and of the number words
URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/{name}.gz"
SHA256 = {
    "train.de": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "train.fr": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
    "val.de": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "val.fr": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
    "test_2016_flickr.de": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "test_2016_flickr.fr": "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90",
    "test_2017_flickr.de": "a2c89666db00c495cd8513b9d708d5a3acc205d7de312ef2bf5fb7ebc1540aee",
    "test_2017_flickr.en": "76a444ee25172e72695cddb13ae4a3bda59430617be88e0bb46b60504f054074",
    "test_2017_flickr.fr": "3ba671ceb2299f3304ffafefea7a833d08632fbaf0ba18546f8a2ec2391af496",
    "test_2018_flickr.de": "ddd0130c7d97482dc5197a02141dae8dd79f20f03586c480d675c09a32daf608",
    "test_2018_flickr.en": "ef4f4844037d4c5dea75c9a8ed5fd78905967a26f67c255e230cc9780032654d",
    "test_2018_flickr.fr": "fb2b83fcceb937a4f7e3e93c1c51c22aba92f1e342391e6b5ba392b16a920501",
}

HOW_TO_GET_IT = (
    "Give the folder that holds the files of Multi30k, such as train.de.gz (or has them in "
    "multi30k/), as --data.root or in the environment variable REVFLIP_DATA; or let the recipe "
    "fetch them with --data.download true; or translate number words with --data.source numbers."
)

Lines = tuple[list[str], list[str]]
"""Lines of the source language and those of the target language, equally many."""


class ParallelCorpus(NamedTuple):
    """Sentence pairs and what to tell the user about them.

    Attributes:
        description: what was found and where, for the log.
        source_lang: code of the language to translate from, such as `de`.
        target_lang: code of the language to translate to.
        read: gives the lines of `train`, `val` or `test`, without line breaks.
        target_level: whether words or characters are the better tokens of the target language.
    """

    description: str
    source_lang: str
    target_lang: str
    read: Callable[[str], Lines]
    target_level: Level = "word"


# --- choosing --------------------------------------------------------------------------------


def check_source(
    source: Source,
    files: Mapping[str, str | None],
    root: str | None,
    download: bool,
    test_set: TestSet,
) -> Source:
    """The source that the other arguments leave; `auto` only if they do not decide it.

    Args:
        source: what the user asked for.
        files: path or None for each of `train_source`, `train_target`, `val_source` and so on.
        root: folder of Multi30k.
        download: whether Multi30k may be fetched.
        test_set: of Multi30k.

    Raises:
        ValueError: if a name is unknown, arguments contradict each other, or a file lacks its pair.
    """
    if source not in ("auto", "multi30k", "files", "numbers"):
        raise ValueError(
            f"source must be 'auto', 'multi30k', 'files' or 'numbers', got {source!r}."
        )
    if test_set not in TEST_SETS:
        raise ValueError(f"test_set must be one of {', '.join(TEST_SETS)}, got {test_set!r}.")
    given = [name for name, path in files.items() if path is not None]
    if given and source == "auto":
        source = "files"
    if given and source != "files":
        raise ValueError(
            f"source is {source!r}, but {', '.join(given)} name files of your own. Leave them out, "
            "or set --data.source files."
        )
    if source == "files" and not given:
        raise ValueError(
            "source is 'files', but no file is given. Set --data.train_source, --data.train_target "
            "and likewise val_source, val_target, test_source, test_target."
        )
    of_multi30k = {"root": root, "download": download, "test_set": test_set != TEST_SETS[0]}
    unused = [name for name, value in of_multi30k.items() if value]
    if unused and source in ("files", "numbers"):
        raise ValueError(
            f"{', '.join(unused)} would have no effect: Multi30k alone has such a choice, but the "
            f"source is {source!r}. Leave out the one or the other."
        )
    for split in SPLITS:
        sides = [f"{split}_source", f"{split}_target"]
        if len(set(sides) & set(given)) == 1:
            missing = next(side for side in sides if side not in given)
            raise ValueError(f"{split} needs two files of sentences, but {missing} is missing.")
    return source


def find_corpus(
    source: Source,
    pair: str | None = None,
    root: str | os.PathLike[str] | None = None,
    files: Mapping[str, str | None] | None = None,
    test_set: TestSet = "test_2016_flickr",
    verify: bool = True,
) -> ParallelCorpus:
    """Choose the sentence pairs, under `auto`: Multi30k if it is found, else number words.

    Args:
        source: as `check_source` returns it.
        pair: source and target language, such as `de-en`. None: `de-en` of Multi30k, `en-de` of
            number words.
        root: a folder with the files of Multi30k, or whose subfolder `multi30k` has them. Searched
            alone, and never replaced by number words.
        files: paths of your own text files, see `check_source`.
        test_set: the test set of Multi30k.
        verify: compare the files of Multi30k with the published ones.

    Raises:
        FileNotFoundError: if files that were asked for are missing.
        ValueError: if the source lacks the languages, or `verify` is true and a file is altered.
    """
    if source == "files":
        return own_files(pair, files or {})
    if source != "numbers":
        wanted = known_languages(pair or "de-en", "Multi30k")
        stems = {"train": "train", "val": "val", "test": test_set}
        for folder in candidates("multi30k", root):
            found = {
                split: (folder / f"{stem}.{wanted[0]}.gz", folder / f"{stem}.{wanted[1]}.gz")
                for split, stem in stems.items()
            }
            paths = [path for both in found.values() for path in both]
            if any(path.exists() for path in paths):
                check_files(paths, verify)
                name = "Multi30k" if verify else "Multi30k (not verified)"
                description = f"{name} {'-'.join(wanted)} in {folder}"
                return ParallelCorpus(description, *wanted, partial(read_pair, found))
        if source == "multi30k" or root is not None or test_set != TEST_SETS[0]:
            searched = ", ".join(str(folder) for folder in candidates("multi30k", root))
            raise FileNotFoundError(f"No file of Multi30k in any of: {searched}. {HOW_TO_GET_IT}")
    wanted = known_languages(pair or "en-de", "The number task")
    description = f"number words {'-'.join(wanted)}, generated (scores do not compare with others)"
    return ParallelCorpus(description, *wanted, partial(read_numbers, *wanted), "char")


def languages(pair: str) -> tuple[str, str]:
    """Source and target language of a pair such as `de-en`.

    Raises:
        ValueError: if it is not made of two codes with a hyphen between them.

    >>> languages("de-en")
    ('de', 'en')
    """
    codes = pair.split("-")
    if len(codes) != 2 or not all(codes):
        raise ValueError(
            "pair must be the codes of source and target language with a hyphen between them, "
            f"such as 'de-en', got {pair!r}."
        )
    return codes[0], codes[1]


def known_languages(pair: str, corpus: str) -> tuple[str, str]:
    """The languages of a pair, if they are two different ones of en, de and fr."""
    both = languages(pair)
    if both[0] == both[1] or not set(both) <= set(LANGUAGES):
        raise ValueError(
            f"{corpus} has pairs of two of {', '.join(LANGUAGES)}, got {pair!r}. For other "
            "languages give files of your own as --data.train_source, --data.train_target and so "
            "on."
        )
    return both


# --- files of your own -----------------------------------------------------------------------


def own_files(pair: str | None, files: Mapping[str, str | None]) -> ParallelCorpus:
    """The corpus of parallel text files; a split without files cannot be read."""
    if pair is None:
        raise ValueError(
            "The languages of your files are not known. Give source and target as --data.pair, "
            "for example de-en."
        )
    paths: dict[str, Path] = {}
    for name, path in files.items():
        if path is not None:
            paths[name] = Path(path).expanduser()
            if not paths[name].is_file():
                raise FileNotFoundError(f"There is no file {path}, given as {name}.")
    pairs = {
        split: (paths[f"{split}_source"], paths[f"{split}_target"])
        for split in SPLITS
        if f"{split}_source" in paths
    }
    named = ", ".join(str(path) for path in paths.values())
    return ParallelCorpus(f"{pair} files {named}", *languages(pair), partial(read_pair, pairs))


def read_pair(files: Mapping[str, tuple[Path, Path]], split: str) -> Lines:
    """The lines of the two files of a split.

    Raises:
        ValueError: if there are none, or they have different numbers of lines.
    """
    if split not in files:
        raise ValueError(
            f"There is no {split} text. Give it as --data.{split}_source and --data.{split}_target."
        )
    source, target = (read_lines(path) for path in files[split])
    if len(source) != len(target):
        raise ValueError(
            f"{files[split][0]} has {len(source):,} lines, but {files[split][1]} has "
            f"{len(target):,}. Line n of the one must be the translation of line n of the other: "
            "find the line that is missing or broken in two."
        )
    return source, target


def read_lines(path: Path) -> list[str]:
    r"""The lines of a UTF-8 file, unpacked if its name ends with `.gz`.

    Lines end with `\n` or `\r\n` and nothing else: other line separators of Unicode, at which
    `str.splitlines` cuts, occur within sentences.

    Raises:
        ValueError: naming the line that is not UTF-8, or if a `.gz` file cannot be unpacked.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{path} is not a whole gzip file ({error}). Copy it again, or rename it if it is "
                "not compressed."
            ) from error
    content = content.removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. Convert the "
            "file, for example with: iconv -f latin1 -t utf-8."
        ) from error
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()  # a final line break ends the last line, it begins no other
    return [line.removesuffix("\r") for line in lines]


# --- Multi30k --------------------------------------------------------------------------------


def check_files(paths: list[Path], verify: bool) -> None:
    """Raise unless all files are there and, if `verify`, are the published ones byte for byte."""
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{paths[0].parent} lacks {', '.join(missing)}. {HOW_TO_GET_IT}")
    if not verify:
        return
    for path in paths:
        content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        expected = SHA256[path.name.removesuffix(".gz")]
        if found != expected:
            raise ValueError(
                f"{path} is not the published file of Multi30k, it is truncated or altered: it has "
                f"{len(content):,} bytes and sha256 {found}, expected {expected}. Copy or download "
                "it again, or set --data.verify false to use it as it is."
            )


def download_corpus(folder: Path, pair: str | None, test_set: TestSet) -> None:
    """Fetch the six files of a language pair into a folder; every hash is checked.

    Raises:
        ModuleNotFoundError: without the extra `recipes`.
        RuntimeError: if a file cannot be fetched or its hash differs.
    """
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A download needs pooch and tqdm: pip install 'lightning-revflip[recipes]'."
        ) from error
    for stem in ("train", "val", test_set):
        for language in known_languages(pair or "de-en", "Multi30k"):
            name = f"{stem}.{language}"
            url = URL.format(name=name)
            try:
                pooch.retrieve(
                    url,
                    known_hash=f"sha256:{SHA256[name]}",
                    fname=f"{name}.gz",
                    path=folder,
                    progressbar=True,
                )
            except (OSError, ValueError) as error:  # no network; another file at the address
                raise RuntimeError(
                    f"Could not fetch {url} ({error}). Copy {name}.gz to {folder} by hand, or "
                    "translate number words with --data.source numbers."
                ) from error
