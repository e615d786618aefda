"""Fixed-point numbers: the representation in which a recurrence can be undone exactly.

Floating-point addition loses low bits, so `(h + u) - u` is not `h`. Integer addition is exact.
A state is therefore an integer that counts multiples of `2^-fraction_bits`, and always fits int32.

Between passes states are kept as int32. Inside a sweep they are carried as float64 tensors that
hold the same integers: float64 represents every integer below 2^53 exactly, and processors have
vector instructions for dividing float64 but none for dividing integers (5 times slower on the CPU
that was measured, see `benchmarks/README.md`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FixedPoint:
    """A fixed-point format with `fraction_bits` binary digits after the point.

    Args:
        fraction_bits: resolution 2^-fraction_bits, range |x| < 2^(31 - fraction_bits).
    """

    fraction_bits: int

    @property
    def one(self) -> float:
        """The integer that stands for 1."""
        return float(1 << self.fraction_bits)

    @property
    def limit(self) -> float:
        """Magnitude that no representable number reaches."""
        return float(2 ** (31 - self.fraction_bits))

    def from_float(self, x: Tensor) -> Tensor:
        """Round floats of any shape to fixed-point numbers (ties to even), as float64 integers."""
        return (x.double() * self.one).round_()

    def to_float(self, fixed: Tensor, dtype: torch.dtype) -> Tensor:
        """The value of fixed-point numbers of any shape, rounded to `dtype`."""
        # Multiplying by a power of two is exact, so only the conversion to dtype rounds.
        return fixed.double().mul(1.0 / self.one).to(dtype)

    def check(self, x: Tensor, name: str, growth: float = 0.0) -> None:
        """Raise unless every |x| + growth is representable.

        Args:
            x: floats of any shape.
            name: what the caller named the tensor, for the message.
            growth: how much the pass that follows may add to a magnitude.

        Raises:
            ValueError: if `x` holds a NaN, an infinity, or a number out of range.
        """
        if x.numel() == 0:
            return
        largest = x.detach().abs().max().item()
        if not largest + growth < self.limit:  # written so that NaN fails as well
            reached = f"a largest magnitude of {largest:g}"
            if growth:
                reached += f", and this pass can add up to {growth:g}"
            raise ValueError(
                f"{name} must be finite and stay below {self.limit:g} in magnitude "
                f"(the range of fixed point with {self.fraction_bits} fractional bits), got "
                f"{reached}. Scale it down, or start from the zero state."
            )
