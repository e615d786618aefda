"""`RNGState`: a resumed run draws the random numbers that it would have drawn without a stop."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, distributed

from lightning_revflip._generators import State, get_generators, seed_generators, set_generators
from lightning_revflip.callbacks._noise import stream_seed


class RNGState(Callback):
    """Saves the global random number generators in checkpoints, and restores them on resuming.

    These are the generators of Python's `random`, of NumPy where it is installed, of torch on the
    CPU and of torch on the current CUDA device. They shuffle data and draw dropout; Lightning does
    not save them. Each process has its own, and a checkpoint holds those of all.

    **At the end of an epoch.** Resumed from a checkpoint that was written there, or after fitting
    had ended, a run goes on bit for bit as if it had not stopped, as far as its other state is in
    the checkpoint too.

    **Within an epoch.** A `DataLoader` cannot go on in the middle: it shuffles again and gives as
    many batches as were left, of which Lightning warns. So the run is another one than without the
    stop, though the same each time it is resumed. With a loader that has `state_dict` and
    `load_state_dict` and draws nothing from these generators, it is the same bit for bit.

    **Limits.** Private generators, such as that of `DataLoader(generator=...)`, are their owner's
    to save. Worker processes of a loader get new seeds from these generators in every epoch, but
    those of `persistent_workers` only once, and these are not restored. What draws before fitting
    starts (a data module that splits data in `setup`) needs a seed of its own.

    With another number of processes than before, each process takes the state that the one of its
    number had; further ones begin streams of their own that follow from the state of the first.
    This is warned of, and so is a generator that the checkpoint lacks, or that only it has.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RNGState()], logger=False)
        >>> # trainer.fit(model, data, ckpt_path="last")
    """

    def __init__(self) -> None:
        super().__init__()
        self._processes = 1
        self._saved: list[State] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._processes = trainer.world_size
        self._saved = None

    # Not a later hook: next, the loader for training draws the seed of its first epoch.
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        saved, self._saved = self._saved, None
        if saved is None:
            return
        # A module that asks for `trainer.estimated_stepping_batches` has made the iterator already,
        # with a draw that the uninterrupted run takes from here on.
        trainer.fit_loop._combined_loader = None
        if len(saved) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint has the random numbers of {len(saved)} processes, but now there "
                f"are {trainer.world_size}. The run goes on with others than it would have had."
            )
        rank = trainer.global_rank
        if rank >= len(saved):
            seed_generators(_stream_seed(saved[0]["torch"], rank))
            return
        for name in set_generators(saved[rank]):
            rank_zero_warn(
                f"The random numbers of {name} are not those that the run would have had: it was "
                "in use only before the checkpoint was written, or only now."
            )

    def state_dict(self) -> dict[str, Any]:
        own = get_generators()
        if self._processes == 1:
            return {"processes": [own]}
        # Lightning asks all processes for their state, though it writes that of the first alone.
        found: list[Any] = [None] * self._processes
        distributed.all_gather_object(found, own)
        return {"processes": found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["processes"]


def _stream_seed(state: Tensor, rank: int) -> int:
    """A seed for a process that follows from the saved state of another one."""
    generator = torch.Generator()
    generator.set_state(state.cpu())
    seed = int(torch.randint(2**62, (), generator=generator))
    return stream_seed(seed, rank) % 2**32
