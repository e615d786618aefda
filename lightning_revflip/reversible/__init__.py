"""Exact reversible recurrences: GRU and LSTM training that stores only what was forgotten."""

from lightning_revflip.reversible.report import MemoryReport, memory_report
from lightning_revflip.reversible.rnn import RevGRU, RevLSTM
from lightning_revflip.reversible.sweep import ReversalError

__all__ = ["MemoryReport", "RevGRU", "RevLSTM", "ReversalError", "memory_report"]
