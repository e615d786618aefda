"""Which samples of a chain stay when only so many may be kept.

Samples have serial numbers 0, 1, 2, ... in the order in which they are offered. What a policy
decides depends on the serial number only, not on when the process was started, so that a chain
that was interrupted and resumed keeps the samples that an uninterrupted one keeps.

    all         every sample
    latest      the last `max_samples`: first in, first out
    spread      every stride-th; when full, the stride doubles and every other one leaves, so that
                between half of `max_samples` and all of them lie evenly over the chain so far
    reservoir   `max_samples` drawn uniformly from the chain so far (algorithm R of Vitter, "Random
                Sampling with a Reservoir", ACM Transactions on Mathematical Software, 1985)
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple


class Decision(NamedTuple):
    """Whether a sample that is offered is kept, and the serial numbers that leave."""

    kept: bool
    leaving: Sequence[int] = ()


class Policy(ABC):
    """Decides for one sample after another."""

    @abstractmethod
    def decide(self, serial: int) -> Decision:
        """What happens when the sample is offered, all before having been accepted."""

    def accept(self, serial: int) -> None:
        """Note that the sample was offered."""
        return None


class KeepAll(Policy):
    """Every sample stays."""

    def decide(self, serial: int) -> Decision:
        return Decision(True)


class Latest(Policy):
    """The last samples stay."""

    def __init__(self, max_samples: int) -> None:
        self.max_samples = max_samples

    def decide(self, serial: int) -> Decision:
        oldest = serial - self.max_samples
        return Decision(True, (oldest,) if oldest >= 0 else ())


class Spread(Policy):
    """The last of every `stride` samples stays; the stride is a power of two that doubles."""

    def __init__(self, max_samples: int) -> None:
        self.max_samples = max_samples

    def decide(self, serial: int) -> Decision:
        before, stride = self._stride(serial), self._stride(serial + 1)
        kept = (serial + 1) % stride == 0
        leaving = range(before - 1, serial, stride) if stride > before else ()
        return Decision(kept, leaving)

    def _stride(self, offered: int) -> int:
        """The smallest power of two at which no more than `max_samples` were kept."""
        return 1 << max(0, -(-(offered + 1) // (self.max_samples + 1)) - 1).bit_length()


class Reservoir(Policy):
    """A uniform sample of all that were offered."""

    def __init__(self, max_samples: int, seed: int) -> None:
        self.max_samples = max_samples
        self.seed = seed
        self._slots: list[int] = []

    def decide(self, serial: int) -> Decision:
        slot = self._slot(serial)
        if slot >= self.max_samples:
            return Decision(False)
        return Decision(True, self._slots[slot : slot + 1])

    def accept(self, serial: int) -> None:
        slot = self._slot(serial)
        if slot < self.max_samples:
            self._slots[slot : slot + 1] = [serial]

    def _slot(self, serial: int) -> int:
        """The next free slot while there is one; then uniform in 0 ... serial."""
        if serial < self.max_samples:
            return serial
        digest = hashlib.blake2b(f"{self.seed} {serial}".encode(), digest_size=16).digest()
        return int.from_bytes(digest, "little") % (serial + 1)


POLICIES = ("spread", "reservoir", "latest")
"""Names of the policies of banks that hold a fixed number of samples."""


def make_policy(name: str, max_samples: int | None, seed: int, offered: int = 0) -> Policy:
    """The policy of a chain to which some samples have been offered already.

    Args:
        name: one of `POLICIES`.
        max_samples: how many samples may be kept; None: all, whatever the name.
        seed: of the choices of "reservoir".
        offered: how many samples have been offered.

    Raises:
        ValueError: for an unknown name, or fewer than one sample.
    """
    if name not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {name!r}.")
    if max_samples is None:
        return KeepAll()
    if max_samples < 1:
        raise ValueError(
            f"max_samples must be at least 1, got {max_samples}. Use None to keep all samples."
        )
    if name == "latest":
        return Latest(max_samples)
    if name == "spread":
        return Spread(max_samples)
    reservoir = Reservoir(max_samples, seed)
    for serial in range(offered):
        reservoir.accept(serial)
    return reservoir
