"""A data module without data: a batch stands for a generation."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader


class Generations(LightningDataModule):
    """Numbers of generations.

    Args:
        per_epoch: generations between two validations.

    Raises:
        ValueError: for fewer than one.
    """

    def __init__(self, per_epoch: int = 5) -> None:
        super().__init__()
        if per_epoch < 1:
            raise ValueError(f"per_epoch must be at least 1, got {per_epoch}.")
        self.per_epoch = per_epoch

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(self.per_epoch), batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        """One batch: the evaluation of the policy."""
        return DataLoader(range(1), batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()
