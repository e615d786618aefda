"""`DistilledPosterior`: a generator of codes and their codec, in the place of samples."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from typing_extensions import Self

from lightning_revflip.apd.codec import Codec, ParameterCodec
from lightning_revflip.apd.networks import Generator, standardized
from lightning_revflip.posterior.files import write_file
from lightning_revflip.posterior.fitted import FittedPosterior
from lightning_revflip.posterior.layout import Parameters
from lightning_revflip.posterior.tensor_folder import load_tensors

_FORMAT = "lightning_revflip.distilled"
_VERSION = "1"


class DistilledPosterior(FittedPosterior):
    """Samples of all weights from a generator that was trained on samples, instead of the samples.

    theta = codec.decode(generator(z)),    z ~ N(0, 1)             (Wang et al., 2018, 1806.10317)

    It is complete: loading it takes neither the samples nor the code or settings of its training.

    Args:
        codec: makes weights of codes.
        generator: makes codes; a copy is kept, float32 and on the CPU.
        num_samples: how many samples it was fitted to.

    Raises:
        ValueError: if the generator makes codes of another size than the codec's.

    Examples:
        >>> posterior = DistilledPosterior.load("runs/mnist/apd.safetensors")  # doctest: +SKIP
        >>> posterior.predict(network, images, n=50).shape  # doctest: +SKIP
        torch.Size([50, 128, 10])
    """

    def __init__(self, codec: Codec, generator: Generator, *, num_samples: int) -> None:
        if generator.code_size != codec.size:
            raise ValueError(
                f"the generator makes codes of {generator.code_size} numbers, and the codec takes "
                f"{codec.size}. Make it by Generator(latent_size, code_size={codec.size})."
            )
        self.codec = codec
        self.generator = copy.deepcopy(generator).to("cpu", torch.float32).requires_grad_(False)
        self.layout = codec.layout
        self.num_samples = num_samples

    @classmethod
    def of_trained(cls, codec: Codec, generator: Generator) -> Self:
        """The result of a training.

        Whitened codes of the samples have mean 0 and covariance 1. Those of a generator that was
        trained for a short time vary too little, which is repaired, see `standardized`.

        Args:
            codec: whose codes the generator was trained on.
            generator: the trained one, which stays as it is.
        """
        if isinstance(codec, ParameterCodec):
            generator = standardized(generator, torch.Generator().manual_seed(0))
        return cls(codec, generator, num_samples=codec.num_samples)

    def draw_chunks(
        self, n: int, chunk_size: int, generator: torch.Generator | None
    ) -> Iterator[Parameters]:
        # All latent vectors first: samples do not depend on the size of chunks then.
        for latents in torch.split(self.generator.draw_latents(n, generator), chunk_size):
            codes = self.generator(latents)
            yield self.layout.unflatten(self.codec.decode(codes, generator))

    def __repr__(self) -> str:
        return (
            f"DistilledPosterior({self.layout.numel:,} parameters, codes of {self.codec.size:,} "
            f"numbers, of {len(self):,} samples)"
        )

    # --- storage -----------------------------------------------------------------------------

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors of the codec and of the generator, by name."""
        parts = {"codec": self.codec.to_tensors(), "generator": self.generator.state_dict()}
        return {
            f"{part}.{name}": tensor.contiguous()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    def settings(self) -> dict[str, Any]:
        """The settings of both, and the number of samples, as plain values."""
        return {
            "codec": self.codec.settings(),
            "generator": self.generator.settings(),
            "num_samples": self.num_samples,
        }

    def export(self, path: str | PathLike[str]) -> None:
        """Write it into one safetensors file, which `load` reads.

        Args:
            path: the file; is replaced if it is there, at once and only if all could be written.

        Raises:
            OSError: if writing fails; a file that was there stays as it was then.
        """
        values, tensors = json.dumps(self.settings()), self.to_tensors()
        metadata = {"format": _FORMAT, "version": _VERSION, "values": values}
        metadata["crc32"] = _checksum(safetensors.torch.save(tensors), values)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, safetensors.torch.save(tensors, metadata))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read the folder that `save` wrote, or the file that `export` wrote.

        Args:
            path: the folder or the file.

        Raises:
            FileNotFoundError: if there is nothing.
            ValueError: for folders and files of something else, and damaged ones.
        """
        path = Path(path)
        if path.is_file():
            values, tensors = _read_file(path)
        else:
            values, tensors = load_tensors(path, cls.__name__)
        codec = Codec.from_tensors(values["codec"], _part(tensors, "codec"))
        generator = Generator(**values["generator"])
        generator.load_state_dict(_part(tensors, "generator"))
        return cls(codec, generator, num_samples=values["num_samples"])


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of which the name starts with that of a part, by the rest of the name."""
    start = f"{part}."
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The values and the tensors of an exported file."""
    data = path.read_bytes()
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is damaged, or no safetensors file ({error}). Copy it again."
        ) from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} was not written by export() of a DistilledPosterior.")
    if metadata["version"] != _VERSION:
        raise ValueError(
            f"{path} has version {metadata['version']} of the format, and this package reads "
            f"{_VERSION}. Use the version of the package that wrote it, or a newer one."
        )
    if (found := _checksum(data, metadata["values"])) != metadata["crc32"]:
        raise ValueError(
            f"{path} is damaged: its checksum (CRC-32) is {found}, expected {metadata['crc32']}. "
            "Copy it again."
        )
    return json.loads(metadata["values"]), tensors


def _checksum(data: bytes, values: str) -> str:
    """Of the numbers in a safetensors file, which follow its header, and of the values."""
    start = 8 + int.from_bytes(data[:8], "little")
    return f"{zlib.crc32(values.encode(), zlib.crc32(data[start:])):08x}"
