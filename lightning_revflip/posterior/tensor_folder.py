"""A folder of named tensors and plain values, which is replaced as a whole or not at all.

`config.json` names the file of tensors and its checksum. The tensors are written first and under a
name of their own, so that a folder that is there already stays valid until the new config is.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from lightning_revflip.posterior.files import remove_leftovers, write_file

_CONFIG = "config.json"
_TENSORS = "tensors-*.safetensors"
_FORMAT = "lightning_revflip.posterior"
_VERSION = 1


def save_tensors(
    path: str | PathLike[str], kind: str, values: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a folder, or replace what this function wrote there before.

    Args:
        path: the folder; is made if it does not exist.
        kind: what the folder holds; `load_tensors` asks for it.
        values: what JSON can hold.
        tensors: by name.

    Raises:
        FileExistsError: if the folder holds other files.
        OSError: if writing fails; what was saved before stays valid then.
    """
    folder = Path(path)
    if folder.exists() and any(folder.iterdir()) and not _is_ours(folder):
        raise FileExistsError(
            f"{folder} holds other files, and is left alone. Save into a new or empty folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
    checksum = zlib.crc32(data)
    file = f"tensors-{checksum:08x}.safetensors"
    config = {
        "format": _FORMAT,
        "version": _VERSION,
        "kind": kind,
        "file": file,
        "crc32": checksum,
        "values": dict(values),
    }
    write_file(folder / file, data)
    write_file(folder / _CONFIG, json.dumps(config, indent=2).encode())
    remove_leftovers(folder, _TENSORS, {file})


def load_tensors(path: str | PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save_tensors` wrote.

    Returns:
        The values and the tensors.

    Raises:
        FileNotFoundError: if there is no such folder, or no config in it.
        ValueError: for a folder of something else, and damaged files.
    """
    config_path = Path(path) / _CONFIG
    if not config_path.exists():
        raise FileNotFoundError(f"{config_path} does not exist, so there is no {kind} to load.")
    config = _read_config(config_path)
    if config["kind"] != kind:
        raise ValueError(f"{path} holds a {config['kind']}, not a {kind}: load it by that class.")
    file = config_path.with_name(config["file"])  # raises if that is a path
    if not file.exists():
        raise ValueError(f"{path} is damaged: {file.name} is missing. Copy the folder again.")
    data = file.read_bytes()
    if (found := zlib.crc32(data)) != config["crc32"]:
        raise ValueError(
            f"{file} is damaged: its checksum (CRC-32) is {found:08x}, expected "
            f"{config['crc32']:08x}. Copy the folder again, or fit it anew."
        )
    return config["values"], safetensors.torch.load(data)


def _is_ours(folder: Path) -> bool:
    """Whether `save_tensors` wrote the config of a folder."""
    try:
        _read_config(folder / _CONFIG)
    except (OSError, ValueError):
        return False
    return True


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}).") from None
    if not isinstance(config, dict) or config.get("format") != _FORMAT:
        raise ValueError(f"{path} was not written by save() of a fitted posterior.")
    if config["version"] != _VERSION:
        raise ValueError(
            f"{path} has version {config['version']} of the format, and this package reads "
            f"{_VERSION}. Use the version of the package that wrote it, or a newer one."
        )
    return config
