"""The chains of one process, as a sampler's callback writes them into a bank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revflip.posterior import ChainWriter, Layout, SampleBank
from lightning_revflip.posterior.manifest import Manifest, chain_folder
from lightning_revflip.sgld import ParallelChains


class Collection:
    """Appends the weights of a model, or those of each of its parallel chains, to a bank.

    The names in the bank are those of the ordinary model, with or without parallel chains.

    Args:
        folder: of the bank.
        model: the sampled model.
        first_chain: number of its first chain in the bank.
        chains: path of the `ParallelChains` in the model; None if it has none.
        seen: number of samples that each chain offered before; None begins a new bank.
        settings: of `ChainWriter`.

    Raises:
        ValueError: for a new bank in the place of another; if the model has trainable parameters
            beside its parallel chains, which the chains would share; and as for `ChainWriter`.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        first_chain: int,
        chains: str | None,
        seen: Sequence[int] | None,
        **settings: Any,
    ) -> None:
        self._model = model
        self._chains = chains
        count = 1
        if chains is not None:
            stacked = model.get_submodule(chains)
            assert isinstance(stacked, ParallelChains)
            _check_alone(model, stacked)
            count = stacked.num_chains
        self.numbers = range(first_chain, first_chain + count)
        """Numbers of the chains in the bank."""
        if seen is None:
            _check_unused(folder, self.numbers)
        self._names = list(_trainable(model))
        self._buffer_names = Layout.of_buffers(model).names
        self.writers: list[ChainWriter] = []
        try:
            self._open(folder, seen, settings)
        except (ValueError, RuntimeError, OSError):
            self.close()
            raise

    def _open(self, folder: Path, seen: Sequence[int] | None, settings: dict[str, Any]) -> None:
        self.layout, buffer_layout = (_layout(tensors) for tensors in self._sample(0))
        """Names and shapes of the parameters of a chain, as in the bank."""
        settings["buffer_layout"] = buffer_layout
        for number in self.numbers:
            self.writers.append(ChainWriter(folder, self.layout, chain=number, **settings))
        for writer, offered in zip(self.writers, seen or (), strict=seen is not None):
            writer.rewind(offered)

    def _sample(self, chain: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and buffers of a chain by their names in the ordinary model."""
        parameters = _trainable(self._model)
        buffers = {name: self._model.get_buffer(name) for name in self._buffer_names}
        if self._chains is None:
            return parameters, buffers
        before, after = f"{self._chains}.{ParallelChains.STACKED}.", f"{self._chains}."

        def own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            found = {}
            for name, each in tensors.items():
                if name.startswith(before):
                    found[after + name.removeprefix(before)] = each[chain]
                else:
                    found[name] = each  # a buffer that all chains share
            return found

        return own(parameters), own(buffers)

    def __len__(self) -> int:
        """Number of samples kept."""
        return sum(len(writer) for writer in self.writers)

    @property
    def seen(self) -> list[int]:
        """Number of samples offered by each chain."""
        return [writer.seen for writer in self.writers]

    def append(self, step: int) -> None:
        """Offer the weights as they are now.

        Raises:
            ValueError: for weights that are not finite, and if other ones are trained than before.
            OSError: if earlier samples cannot be written; they wait in memory.
        """
        if list(_trainable(self._model)) != self._names:
            raise ValueError(
                f"at step {step} other parameters require gradients than when collecting began, "
                "so the samples would lack some. Freeze or unfreeze parameters before training."
            )
        with torch.no_grad():
            for chain, writer in enumerate(self.writers):
                parameters, buffers = self._sample(chain)
                if not writer.append(step, parameters, buffers or None):
                    _check_finite(step, parameters)  # the writer checks what it keeps

    def rows(self) -> Tensor:
        """The weights as they are now, shape (chains, P), float32, on the CPU."""
        parameters = [self._sample(chain)[0] for chain in range(len(self.numbers))]
        return torch.stack([self.layout.flatten(each) for each in parameters]).float().cpu()

    @torch.no_grad()
    def load(self, rows: Tensor) -> None:
        """Let each chain go on from other weights, shape (chains, P)."""
        for chain, row in enumerate(torch.split(rows, 1)):
            parameters, _ = self._sample(chain)
            for name, value in self.layout.unflatten(row).items():
                parameters[name].copy_(value[0])

    def flush(self) -> None:
        """Write what is in memory."""
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        """Write what is in memory, and let others write.

        Raises:
            OSError: if that fails; the chains concerned stay open, and can be closed later.
        """
        failed = None
        for writer in self.writers:
            try:
                writer.close()
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed


def finished_bank(folder: Path, first_step: int) -> SampleBank:
    """The samples of an earlier training, of which the first was due at some step.

    Raises:
        FileNotFoundError: if there is no bank.
        ValueError: if it has no samples.
    """
    way_out = (
        "Give SGLDSampler(dirpath=...) the folder of the bank, or ckpt_path a checkpoint of the "
        "training; eval_samples=0 evaluates the current weights."
    )
    if not folder.exists():
        raise FileNotFoundError(f"there is no sample bank at {folder}. {way_out}")
    bank = SampleBank(folder)
    if len(bank) == 0:
        raise ValueError(
            f"{folder} holds no sample yet: the first is taken at step {first_step}. Train longer, "
            f"or lower burn_in. {way_out}"
        )
    return bank


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def _layout(tensors: dict[str, Tensor]) -> Layout:
    return Layout(tuple(tensors), tuple(tuple(each.shape) for each in tensors.values()))


def _check_unused(folder: Path, numbers: Sequence[int]) -> None:
    for number in numbers:
        try:
            seen = Manifest.read(chain_folder(folder, number)).seen
        except FileNotFoundError:
            continue
        if seen > 0:
            raise ValueError(
                f"{folder} holds the samples of another run. Give another dirpath, delete the "
                "folder, or resume that run from its checkpoint (ckpt_path)."
            )


def _check_alone(model: nn.Module, stacked: ParallelChains) -> None:
    own = {id(each) for each in stacked.parameters()}
    shared = [name for name, each in _trainable(model).items() if id(each) not in own]
    if shared:
        raise ValueError(
            f"{', '.join(shared)} would be shared by all chains. Choose with `network` the part of "
            "the model that holds all trainable parameters, or freeze the others."
        )


def _check_finite(step: int, parameters: dict[str, Tensor]) -> None:
    for name, values in parameters.items():
        if not values.isfinite().all():
            raise ValueError(
                f"the sample of step {step} has NaN or infinite values in {name!r}, so the chain "
                "has diverged. Lower the learning rate; the samples before are kept."
            )
