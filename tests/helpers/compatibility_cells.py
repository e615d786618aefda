"""The cells of the compatibility matrix: which there are, and how each should come out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lightning.pytorch import Callback

from tests.helpers.compatibility import SUBJECTS, Run, Subject

DDP = "Two processes with DDP"
CHAINS = "Two independent chains"

AXES = {
    "Stages": ("fit", "validate", "test", "predict", "resume"),
    "Precision": ("32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true"),
    "Accumulation and clipping": (
        "accumulate",
        "clip the norm",
        "clip values",
        "both, bf16-mixed",
        "both, 16-mixed",
    ),
    DDP: ("fit", "evaluate", "resume", "bf16-mixed", "accumulate and clip"),
    CHAINS: ("fit", "resume"),
    "Callbacks of Lightning": (
        "ModelCheckpoint",
        "EarlyStopping",
        "WeightAveraging",
        "WeightAveraging before it",
        "EMAWeightAveraging",
        "StochasticWeightAveraging",
        "GradientAccumulationScheduler",
        "LearningRateFinder",
        "BatchSizeFinder",
        "LearningRateMonitor",
        "Timer",
        "RichProgressBar, RichModelSummary",
    ),
    "Trainer and optimization": (
        "barebones",
        "fast_dev_run",
        "manual optimization",
        "several optimizers",
        "layers of configure_model",
        "compiled layer",
    ),
    "Followed by": tuple(SUBJECTS)[:-2],
}


class Refused(NamedTuple):
    """An error before the first batch.

    Attributes:
        message: pattern of its text.
        reason: why, in one line.
    """

    message: str
    reason: str


class NotApplicable(NamedTuple):
    """Nothing to try, and why."""

    reason: str


@dataclass(frozen=True)
class Cell:
    """A row and a column of the matrix."""

    name: str
    axis: str
    value: str

    def __str__(self) -> str:
        return re.sub(r"[^\w.-]+", "-", f"{self.name}-{self.value}")

    @property
    def subject(self) -> Subject:
        return SUBJECTS[self.name]

    @property
    def exception(self) -> Refused | NotApplicable | None:
        for axis, names, values, outcome in EXCEPTIONS:
            if self.axis == axis and self.name in names and self.value in values:
                return outcome
        return None

    @property
    def inapplicable(self) -> bool:
        return isinstance(self.exception, NotApplicable)


# --- what is not as usual -----------------------------------------------------------------------

APD = ("DistillationReport", "APDModule")
SAMPLERS = ("SGLDSampler", "PosteriorDistillation")
CONVERTING = ("ReversibleRNN", "Flipout")
EVOLUTION = ("EvolutionStrategies", "EvolutionModule")
OWN_MODULE = (*APD, "EvolutionModule")
"""Rows with a module of the package, which optimizes manually."""

_ONE_OPTIMIZER = "Lightning itself needs one optimizer here"
_MANUAL = Refused(
    "not supported for manual optimization|`GradientAccumulationScheduler` is not supported",
    "Lightning itself accumulates and clips in automatic optimization alone",
)
_UNPERTURBABLE = Refused(
    "members cannot differ in the parameters of .*rnn",
    "evolution strategies perturb plain layers; choose others by `targets`",
)
_NO_GRADIENT = Refused(
    "evolution strategies give the optimizer an estimate of another gradient",
    "a sampler needs the gradient of the loss",
)
_TRIES = Refused(
    "tries values before EvolutionStrategies stands in",
    "it would find a value for training by backpropagation",
)
_COMPILED = Refused(
    "is compiled, and members compute with other weights",
    "each generation would be compiled anew",
)
_TWO_POSTERIORS = Refused(
    "These are two posteriors of one module",
    "both train a posterior of the weights",
)
_TWICE = Refused(
    "Found more than one stateful callback",
    "one does it; two of `ReversibleRNN` or `Flipout` need different `targets`",
)
_ONE_PROCESS = Refused(
    "PosteriorDistillation works in one process",
    "distil the finished bank with `APDModule`",
)
_OTHER_MODULE = NotApplicable("they are for different modules")

EXCEPTIONS: list[tuple[str, Sequence[str], Sequence[str], Refused | NotApplicable]] = [
    ("Stages", APD, ["test"], NotApplicable("`APDModule` has no test data")),
    (
        "Stages",
        APD,
        ["predict"],
        NotApplicable("`APDModule` makes networks; `APDModule.posterior()` predicts"),
    ),
    (
        "Precision",
        (*APD, *EVOLUTION),
        ["16-mixed"],
        scaler := Refused(
            "Use precision='bf16-mixed' or '32-true'",
            "without one loss and its backward pass a gradient scaler has nothing to scale",
        ),
    ),
    (
        "Precision",
        SAMPLERS,
        ["bf16-true"],
        Refused(
            "parameters must be float32 or float64, got torch.bfloat16",
            "16 bits would round away the small steps of a sampler; mixed precision works",
        ),
    ),
    ("Accumulation and clipping", OWN_MODULE, AXES["Accumulation and clipping"], _MANUAL),
    (DDP, OWN_MODULE, ["accumulate and clip"], _MANUAL),
    *((axis, ["PosteriorDistillation"], AXES[axis], _ONE_PROCESS) for axis in (DDP, CHAINS)),
    ("Accumulation and clipping", ["EvolutionStrategies"], ["both, 16-mixed"], scaler),
    (
        "Callbacks of Lightning",
        CONVERTING,
        ["WeightAveraging before it"],
        Refused(
            "copies the model in `setup`, so .* must convert it before that",
            "the copy would have the layers of before; put it after",
        ),
    ),
    (
        "Callbacks of Lightning",
        APD,
        ["StochasticWeightAveraging"],
        Refused("SWA currently works with 1 `optimizer`", _ONE_OPTIMIZER),
    ),
    (
        "Callbacks of Lightning",
        APD,
        ["LearningRateFinder"],
        Refused("learning rate finder only works with single optimizer", _ONE_OPTIMIZER),
    ),
    ("Callbacks of Lightning", OWN_MODULE, ["GradientAccumulationScheduler"], _MANUAL),
    (
        "Callbacks of Lightning",
        ["EvolutionStrategies"],
        ["LearningRateFinder", "BatchSizeFinder"],
        _TRIES,
    ),
    (
        "Trainer and optimization",
        OWN_MODULE,
        AXES["Trainer and optimization"][2:],
        NotApplicable("the module is the package's own"),
    ),
    (
        "Trainer and optimization",
        ["EvolutionStrategies"],
        ["manual optimization", "several optimizers"],
        Refused(
            "stands in for the backward pass of automatic optimization",
            "use `FlipoutES` in a `training_step` of your own",
        ),
    ),
    (
        "Trainer and optimization",
        SAMPLERS,
        ["several optimizers"],
        Refused("SGLDSampler needs the module to have one optimizer", "a chain has one sampler"),
    ),
    ("Trainer and optimization", ["EvolutionStrategies"], ["compiled layer"], _COMPILED),
]
_SINGLE = ("MemoryMonitor", "DistillationReport")
_BESIDE_APD = ("DistillationReport", "MemoryMonitor", "RNGState")
_COMBINATIONS: list[tuple[Sequence[str], Sequence[str], Refused | NotApplicable]] = [
    *(((name,), (name,), _TWICE) for name in AXES["Followed by"] if name not in _SINGLE),
    (APD, [name for name in AXES["Followed by"] if name not in _BESIDE_APD], _OTHER_MODULE),
    (
        [name for name in SUBJECTS if name not in (*APD, *_BESIDE_APD)],
        ["DistillationReport"],
        _OTHER_MODULE,
    ),
    (CONVERTING, ["EvolutionStrategies"], _UNPERTURBABLE),
    (EVOLUTION, CONVERTING, _UNPERTURBABLE),
    (
        ["EvolutionModule"],
        ["EvolutionStrategies"],
        Refused("stands in for the backward pass of automatic", "both are evolution strategies"),
    ),
    (SAMPLERS, ["Flipout"], _TWO_POSTERIORS),
    (["Flipout"], SAMPLERS, _TWO_POSTERIORS),
    (SAMPLERS, ["EvolutionStrategies"], _NO_GRADIENT),
    (EVOLUTION, SAMPLERS, _NO_GRADIENT),
    (
        ["PosteriorDistillation"],
        ["SGLDSampler"],
        Refused("there is none before it", "it distils what the sampler before it has drawn"),
    ),
]
EXCEPTIONS += [("Followed by", *rest) for rest in _COMBINATIONS]


# --- cells --------------------------------------------------------------------------------------


def cells(axis: str, *values: str) -> list[Any]:
    """The cells of an axis that a test tries, as its parameters; a core of them is fast."""
    return [
        pytest.param(cell, id=str(cell), marks=[] if _is_core(cell) else [pytest.mark.slow])
        for cell in matrix(axis)
        if cell.value in (values or AXES[axis]) and not cell.inapplicable
    ]


def _is_core(cell: Cell) -> bool:
    if isinstance(cell.exception, Refused):
        return cell.axis not in (DDP, CHAINS)
    return cell.value in _CORE.get(cell.axis, ())


_CORE = {"Stages": ("fit", "resume"), "Accumulation and clipping": ("both, bf16-mixed",)}


def row(cell: Cell, outcome: str | None = None) -> dict[str, str]:
    """How a cell comes out, in the file of results; by default as it should."""
    reason = "" if cell.exception is None else cell.exception.reason
    kind = {Refused: "refused", NotApplicable: "not applicable"}
    found = kind.get(type(cell.exception), "works") if outcome is None else outcome
    place = {"callback": cell.name, "axis": cell.axis, "value": cell.value}
    return {**place, "outcome": found, "reason": reason}


def matrix(*axes: str) -> Iterator[Cell]:
    """All cells, those that are not applicable too."""
    for axis in axes or AXES:
        for name in SUBJECTS:
            for value in AXES[axis]:
                yield Cell(name, axis, value)


def trained(cell: Cell, folder: Path, *others: Callback, **settings: Any) -> Run | None:
    """A run that has trained; None where the Trainer refuses, which is before the first batch."""
    if not isinstance(cell.exception, Refused):
        return cell.subject.run(folder, *others, **settings).fit()
    run = None
    with pytest.raises(Exception, match=cell.exception.message):  # noqa: PT012
        run = cell.subject.run(folder, *others, **settings)
        run.fit()
    assert run is None or run.watch.batches == 0
    return None
