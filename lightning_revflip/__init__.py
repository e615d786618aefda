"""PyTorch Lightning plugins: reversible recurrences, flipout, samples of posteriors, distillation.

Names are imported when they are first used. The cores need torch only.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_revflip.apd import DistilledPosterior, IdentityCodec, ParameterCodec, distil
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
    from lightning_revflip.modules import APDModule, EvolutionModule, SampleBankCodes
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

_MODULES = (
    "reversible",
    "flipout",
    "sgld",
    "posterior",
    "apd",
    "reversible_flipout",
    "convert",
    "callbacks",
    "modules",
    "strategies",
)
"""Where names are looked for, in this order: what needs Lightning comes last."""


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(_imported, _MODULES):
            if hasattr(module, name):
                return getattr(module, name)
    if name in _MODULES:
        return _imported(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def _imported(module: str) -> ModuleType:
    return import_module(f"{__name__}.{module}")


class _Package(ModuleType):
    """Keeps `convert` the function: to import the module of that name would set the attribute."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name == "convert" and isinstance(value, ModuleType)
        super().__setattr__(name, value.convert if is_module else value)


sys.modules[__name__].__class__ = _Package
