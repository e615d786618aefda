"""Where recipes look for data sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def candidates(name: str, root: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The folders to search for a data set, best first.

    Args:
        name: of the data set's own folder, such as `ptb`.
        root: that folder or the one around it; by default that of REVFLIP_DATA, then the cache.
    """
    folder = root if root is not None else os.environ.get("REVFLIP_DATA")
    if folder:
        yield Path(folder).expanduser()
        yield Path(folder).expanduser() / name
    if root is None:
        yield cache_folder(name)


def cache_folder(name: str) -> Path:
    """Where downloads go: `$XDG_CACHE_HOME/lightning_revflip/<name>`, by default in `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "lightning_revflip" / name
