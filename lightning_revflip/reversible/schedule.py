"""The order in which a sweep visits the steps of a batch of sequences."""

from dataclasses import dataclass

from torch import Tensor


class Chunk:
    """Some consecutive steps of a schedule; their rows are contiguous.

    Args:
        offsets: first row of each step, in processing order (rising or falling).
        sizes: rows of each step.
    """

    def __init__(self, offsets: list[int], sizes: list[int]) -> None:
        first, last = (0, -1) if offsets[0] <= offsets[-1] else (-1, 0)
        self.start = offsets[first]
        self.stop = offsets[last] + sizes[last]
        firsts = [offset - self.start for offset in offsets]
        self.steps = [slice(i, i + size) for i, size in zip(firsts, sizes, strict=True)]
        """Rows of each step within the chunk, in processing order."""

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self, packed: Tensor) -> Tensor:
        """The chunk's rows of (rows, features) or of unpadded (steps, batch, features)."""
        if packed.dim() == 2:
            return packed[self.start : self.stop]
        batch = max(1, packed.shape[1])
        return packed[self.start // batch : self.stop // batch].reshape(-1, packed.shape[2])


@dataclass(frozen=True)
class Schedule:
    """Steps in processing order, in chunks, over rows that are stored step after step.

    This is the layout of `PackedSequence.data`: step t occupies `batch_sizes[t]` rows, those of
    the sequences longer than t, which are the first ones of the batch. A sequence that has ended
    (or, in reverse direction, not begun) is not visited, so its state and buffer stay untouched.
    """

    batch_sizes: list[int]
    chunk_steps: int
    reverse: bool = False

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.batch_sizes[0]

    @property
    def rows(self) -> int:
        """Steps summed over all sequences."""
        return sum(self.batch_sizes)

    def chunks(self) -> list[Chunk]:
        """All steps, at most `chunk_steps` in a chunk, in processing order."""
        offsets = [0]
        for size in self.batch_sizes:
            offsets.append(offsets[-1] + size)
        order = range(len(self.batch_sizes))
        steps = list(reversed(order)) if self.reverse else list(order)
        return [
            Chunk([offsets[t] for t in part], [self.batch_sizes[t] for t in part])
            for part in (
                steps[i : i + self.chunk_steps] for i in range(0, len(steps), self.chunk_steps)
            )
        ]
