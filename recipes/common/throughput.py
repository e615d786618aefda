"""How fast a run trains."""

from __future__ import annotations

from collections import deque
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class TokensPerSecond(Callback):
    """Logs `train/tokens_per_second`: targets of all processes, over the last few batches.

    Time spent on validation does not count. The batch must have an attribute `targets`; where it
    has `target_lengths` as well, padding does not count.

    Args:
        batches: number of batches over which the rate is taken.
    """

    def __init__(self, batches: int = 20) -> None:
        self._ends: deque[tuple[float, int]] = deque(maxlen=batches + 1)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ends.clear()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ends.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        lengths = getattr(batch, "target_lengths", None)
        targets = batch.targets.numel() if lengths is None else sum(lengths)
        self._ends.append((perf_counter(), targets * trainer.world_size))
        if len(self._ends) > 1:
            (start, _), *_, (end, _) = self._ends
            tokens = sum(count for _, count in list(self._ends)[1:])
            rate = tokens / (end - start)
            pl_module.log("train/tokens_per_second", rate, prog_bar=True, batch_size=1)
