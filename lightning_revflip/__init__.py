"""PyTorch Lightning plugins: exactly reversible recurrences, and flipout.

The cores need torch only; what needs Lightning is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_revflip.convert import apply_spec, convert, load_from_checkpoint
from lightning_revflip.flipout import (
    FLIPOUT_LAYERS,
    DropConnect,
    FlipoutConv1d,
    FlipoutConv2d,
    FlipoutConv3d,
    FlipoutEmbedding,
    FlipoutES,
    FlipoutGRU,
    FlipoutLinear,
    FlipoutLSTM,
    Gaussian,
    MultiplicativeGaussian,
    Perturbation,
    elbo_loss,
    kl,
    sample_n,
    sampling,
)
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
from lightning_revflip.reversible_flipout import (
    REVERSIBLE_FLIPOUT_LAYERS,
    FlipoutRevGRU,
    FlipoutRevLSTM,
)

if TYPE_CHECKING:
    from lightning_revflip.callbacks import (
        EvolutionStrategies,
        Flipout,
        MemoryMonitor,
        ReversibleRNN,
    )
    from lightning_revflip.modules import EvolutionModule

__version__ = "0.1.0"

__all__ = [
    "FLIPOUT_LAYERS",
    "REVERSIBLE_FLIPOUT_LAYERS",
    "DropConnect",
    "EvolutionModule",
    "EvolutionStrategies",
    "Flipout",
    "FlipoutConv1d",
    "FlipoutConv2d",
    "FlipoutConv3d",
    "FlipoutES",
    "FlipoutEmbedding",
    "FlipoutGRU",
    "FlipoutLSTM",
    "FlipoutLinear",
    "FlipoutRevGRU",
    "FlipoutRevLSTM",
    "Gaussian",
    "HiddenSlice",
    "LinearCrossEntropy",
    "LockedDropout",
    "LuongAttention",
    "MemoryMonitor",
    "MemoryReport",
    "MultiplicativeGaussian",
    "Perturbation",
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
    "elbo_loss",
    "kl",
    "load_from_checkpoint",
    "memory_report",
    "sample_n",
    "sampling",
]

_LAZY = {
    "EvolutionModule": "lightning_revflip.modules",
    "EvolutionStrategies": "lightning_revflip.callbacks",
    "Flipout": "lightning_revflip.callbacks",
    "MemoryMonitor": "lightning_revflip.callbacks",
    "ReversibleRNN": "lightning_revflip.callbacks",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
