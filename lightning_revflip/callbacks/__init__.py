"""The Lightning face: callbacks to attach to a `Trainer`."""

from lightning_revflip.callbacks.memory import MemoryMonitor
from lightning_revflip.callbacks.reversible import ReversibleRNN

__all__ = ["MemoryMonitor", "ReversibleRNN"]
