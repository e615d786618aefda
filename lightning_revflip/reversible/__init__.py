"""Exact reversible recurrences (MacKay et al., 2018, arXiv 1810.10999).

Training of GRUs and LSTMs that stores only what was forgotten. Plain torch, without Lightning.
`fixed_point.py` and `buffer.py` are the arithmetic, `cells.py` has the equations, `sweep.py` runs
them over time in both directions, `rnn.py` are the layers, `sequence.py` whole models and
`seq2seq.py` pairs of them with attention, and `report.py` says what was stored.
"""

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
