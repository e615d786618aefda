"""Exact reversible recurrences: GRU and LSTM training that stores only what was forgotten."""

from lightning_revflip.reversible.attention import LuongAttention
from lightning_revflip.reversible.cross_entropy import LinearCrossEntropy
from lightning_revflip.reversible.errors import ReversalError
from lightning_revflip.reversible.perturbation import RecurrentPerturbation
from lightning_revflip.reversible.replay import LockedDropout, SequenceNoise
from lightning_revflip.reversible.report import MemoryReport, memory_report
from lightning_revflip.reversible.rnn import RevGRU, RevLSTM
from lightning_revflip.reversible.seq2seq import RevDecoder, RevEncoder
from lightning_revflip.reversible.sequence import ReversibleSequence
from lightning_revflip.reversible.slices import HiddenSlice

__all__ = [
    "HiddenSlice",
    "LinearCrossEntropy",
    "LockedDropout",
    "LuongAttention",
    "MemoryReport",
    "RecurrentPerturbation",
    "RevDecoder",
    "RevEncoder",
    "RevGRU",
    "RevLSTM",
    "ReversalError",
    "ReversibleSequence",
    "SequenceNoise",
    "memory_report",
]
