"""PyTorch Lightning plugins: recurrent training whose hidden states are recomputed exactly.

The cores need torch only; what needs Lightning is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_revflip.convert import apply_spec, convert, load_from_checkpoint
from lightning_revflip.reversible import (
    HiddenSlice,
    LinearCrossEntropy,
    LockedDropout,
    LuongAttention,
    MemoryReport,
    RevDecoder,
    RevEncoder,
    ReversalError,
    ReversibleSequence,
    RevGRU,
    RevLSTM,
    SequenceNoise,
    memory_report,
)

if TYPE_CHECKING:
    from lightning_revflip.callbacks import MemoryMonitor, ReversibleRNN

__version__ = "0.1.0"

__all__ = [
    "HiddenSlice",
    "LinearCrossEntropy",
    "LockedDropout",
    "LuongAttention",
    "MemoryMonitor",
    "MemoryReport",
    "RevDecoder",
    "RevEncoder",
    "RevGRU",
    "RevLSTM",
    "ReversalError",
    "ReversibleRNN",
    "ReversibleSequence",
    "SequenceNoise",
    "apply_spec",
    "convert",
    "load_from_checkpoint",
    "memory_report",
]

_LAZY = {
    "MemoryMonitor": "lightning_revflip.callbacks",
    "ReversibleRNN": "lightning_revflip.callbacks",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
