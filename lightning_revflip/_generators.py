"""The global random number generators of a process: Python's, NumPy's and torch's."""

from __future__ import annotations

import random
from importlib.util import find_spec
from typing import Any

import torch

State = dict[str, Any]
"""Numbers, text and tensors alone, which `torch.load(weights_only=True)` reads."""

_HAS_NUMPY = find_spec("numpy") is not None


def get_generators() -> State:
    """The state of each generator, on CUDA that of the current device if one is in use."""
    version, numbers, gauss = random.getstate()
    state: State = {
        "python": {"version": version, "numbers": torch.tensor(numbers), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    if _HAS_NUMPY:
        import numpy

        found: dict[str, Any] = numpy.random.get_state(legacy=False)
        inner = found["state"]
        state["numpy"] = found | {"state": inner | {"key": torch.from_numpy(inner["key"]).long()}}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_generators(state: State) -> list[str]:
    """Set the generators.

    Args:
        state: from `get_generators`, perhaps of another process.

    Returns:
        Names of those that are only here or only in the state, and were left alone.
    """
    python = state["python"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    torch.set_rng_state(state["torch"].cpu())
    uses_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    here = {"numpy": _HAS_NUMPY, "cuda": uses_cuda}
    if here["numpy"] and "numpy" in state:
        import numpy

        inner = state["numpy"]["state"]
        keys = numpy.asarray(inner["key"].tolist(), dtype=numpy.uint32)
        numpy.random.set_state(state["numpy"] | {"state": inner | {"key": keys}})
    if here["cuda"] and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())
    return [name for name, found in here.items() if found != (name in state)]


def seed_generators(seed: int) -> None:
    """Seed the generators as `seed_everything` does, but leave the environment alone.

    Args:
        seed: from 0 to 2^32 - 1.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if _HAS_NUMPY:
        import numpy

        numpy.random.seed(seed)
