"""`MemoryMonitor`: what a training step keeps for its backward pass, and what was saved."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_revflip.reversible import memory_report
from lightning_revflip.reversible.report import Recorded


class MemoryMonitor(Callback):
    """Logs the memory of training steps, and what reversible layers saved, to any logger.

    Measures the training batches at whose end Lightning logs (`Trainer(log_every_n_steps=...)`):

    - `memory/peak_bytes` on CUDA: the allocator's peak during the batch, parameters included (the
      callback resets the allocator's peak statistics);
    - `memory/saved_for_backward_bytes` elsewhere: bytes that autograd keeps for the backward pass,
      without parameters and buffers; each storage counts once. Reversible layers keep their
      buffers that way, so these are included. Counted until the first backward pass of the batch.
      Not counted: the gradients that a ReversibleSequence has ready by then, which are those that
      any model has after the backward pass;
    - with reversible layers, of their last call: `reversible/bits_per_unit_step`,
      `reversible/stored_bits`, `reversible/kept_bytes`, `reversible/savings` (kept bytes against
      those of nn.GRU and nn.LSTM), and of each layer `reversible/bits_per_unit_step/<layer>` and
      `reversible/state_savings/<layer>` (bits of float states against stored ones and slices).

    Works with any LightningModule, reversible or not. Writes nothing to checkpoints. Measuring
    calls Python for every tensor that autograd saves, hence not at every step.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MemoryMonitor()], log_every_n_steps=10, logger=False)
    """

    def __init__(self) -> None:
        self._saved: _SavedBytes | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._stop()  # a batch that the module skipped has no end
        if not trainer._logger_connector.should_update_logs:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._saved = _SavedBytes(pl_module)
        self._saved.__enter__()

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        self._stop()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self._saved is None:
            return
        self._stop()
        values: dict[str, float] = {}
        if pl_module.device.type == "cuda":
            values["memory/peak_bytes"] = torch.cuda.max_memory_allocated(pl_module.device)
        else:
            values["memory/saved_for_backward_bytes"] = self._saved.bytes
        self._saved = None
        pl_module.log_dict(values | _reversible_values(pl_module), batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._saved is not None and self._saved.active:
            self._saved.__exit__()


def _reversible_values(pl_module: LightningModule) -> dict[str, float]:
    ran = [part for part in pl_module.modules() if isinstance(part, Recorded) and part.last_passes]
    if not ran:
        return {}
    report = memory_report(pl_module)
    values = {
        "reversible/bits_per_unit_step": report.bits_per_unit_step,
        "reversible/stored_bits": float(report.stored_bits),
        "reversible/kept_bytes": float(report.kept_bytes),
        "reversible/savings": report.savings,
    }
    for layer in report.layers:
        values[f"reversible/bits_per_unit_step/{layer.name}"] = layer.bits_per_unit_step
        values[f"reversible/state_savings/{layer.name}"] = layer.state_savings
    return values


class _SavedBytes(saved_tensors_hooks):
    """Counts the bytes that autograd saves while it is active."""

    def __init__(self, pl_module: LightningModule) -> None:
        super().__init__(self._count, lambda tensor: tensor)
        self._known = {
            tensor.untyped_storage().data_ptr()
            for tensor in [*pl_module.parameters(), *pl_module.buffers()]
        }
        # Held as long as the count runs, so that no address is used twice.
        self._storages: dict[int, torch.UntypedStorage] = {}
        self.bytes = 0
        self.active = False

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in self._known and address not in self._storages:
            self._storages[address] = storage
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> None:
        self.active = True
        super().__enter__()

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self._storages = {}
        self.active = False
