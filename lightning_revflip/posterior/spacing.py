"""Which samples represent several chains of different lengths."""

from __future__ import annotations

from collections.abc import Sequence


def shares(n: int, lengths: Sequence[int]) -> list[int]:
    """How many of `n` samples come from each chain: equally many, as far as they have them.

    Args:
        n: number of samples, at most the sum of the lengths.
        lengths: samples in each chain.

    Examples:
        >>> shares(20, [100, 3, 100, 100])
        [6, 3, 6, 5]
    """
    taken = [0] * len(lengths)
    while n > 0:
        open_chains = [i for i, length in enumerate(lengths) if taken[i] < length]
        each = max(1, n // len(open_chains))
        for i in open_chains[:n]:
            more = min(each, lengths[i] - taken[i], n)
            taken[i] += more
            n -= more
    return taken


def evenly_spaced(n: int, length: int) -> list[int]:
    """The last element of each of `n` equal parts of 0 ... length - 1.

    Examples:
        >>> evenly_spaced(4, 100), evenly_spaced(1, 100), evenly_spaced(3, 3)
        ([24, 49, 74, 99], [99], [0, 1, 2])
    """
    return [length * (i + 1) // n - 1 for i in range(n)]
