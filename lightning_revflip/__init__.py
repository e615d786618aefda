"""PyTorch Lightning plugins: reversible recurrences, flipout, samples of posteriors, distillation.

The cores need torch only; what needs Lightning is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_revflip.apd import DistilledPosterior, IdentityCodec, ParameterCodec, distil
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
from lightning_revflip.posterior import (
    ChainWriter,
    DiagonalGaussian,
    LowRankGaussian,
    Posterior,
    SampleBank,
    expected_entropy,
    max_probability,
    mutual_information,
    predict,
    predictive_entropy,
    reestimate_buffers,
    variation_ratio,
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
from lightning_revflip.sgld import (
    PSGLD,
    SGHMC,
    SGLD,
    CyclicalSchedule,
    ParallelChains,
    PolynomialSchedule,
)

if TYPE_CHECKING:
    from lightning_revflip.callbacks import (
        DistillationReport,
        EvolutionStrategies,
        Flipout,
        MemoryMonitor,
        PosteriorDistillation,
        ReversibleRNN,
        RNGState,
        SGLDSampler,
    )
    from lightning_revflip.modules import APDModule, EvolutionModule, SampleBankCodes
    from lightning_revflip.strategies import IndependentChainsStrategy

__version__ = "0.1.0"

__all__ = [
    "FLIPOUT_LAYERS",
    "PSGLD",
    "REVERSIBLE_FLIPOUT_LAYERS",
    "SGHMC",
    "SGLD",
    "APDModule",
    "ChainWriter",
    "CyclicalSchedule",
    "DiagonalGaussian",
    "DistillationReport",
    "DistilledPosterior",
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
    "IdentityCodec",
    "IndependentChainsStrategy",
    "LinearCrossEntropy",
    "LockedDropout",
    "LowRankGaussian",
    "LuongAttention",
    "MemoryMonitor",
    "MemoryReport",
    "MultiplicativeGaussian",
    "ParallelChains",
    "ParameterCodec",
    "Perturbation",
    "PolynomialSchedule",
    "Posterior",
    "PosteriorDistillation",
    "RNGState",
    "RevDecoder",
    "RevEncoder",
    "RevGRU",
    "RevLSTM",
    "ReversalError",
    "ReversibleRNN",
    "ReversibleSequence",
    "SGLDSampler",
    "SampleBank",
    "SampleBankCodes",
    "SequenceNoise",
    "apply_spec",
    "convert",
    "distil",
    "elbo_loss",
    "expected_entropy",
    "kl",
    "load_from_checkpoint",
    "max_probability",
    "memory_report",
    "mutual_information",
    "predict",
    "predictive_entropy",
    "reestimate_buffers",
    "sample_n",
    "sampling",
    "variation_ratio",
]

_LAZY = {
    "APDModule": "lightning_revflip.modules",
    "DistillationReport": "lightning_revflip.callbacks",
    "EvolutionModule": "lightning_revflip.modules",
    "EvolutionStrategies": "lightning_revflip.callbacks",
    "Flipout": "lightning_revflip.callbacks",
    "IndependentChainsStrategy": "lightning_revflip.strategies",
    "MemoryMonitor": "lightning_revflip.callbacks",
    "PosteriorDistillation": "lightning_revflip.callbacks",
    "RNGState": "lightning_revflip.callbacks",
    "ReversibleRNN": "lightning_revflip.callbacks",
    "SGLDSampler": "lightning_revflip.callbacks",
    "SampleBankCodes": "lightning_revflip.modules",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
