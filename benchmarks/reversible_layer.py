"""Drop-in layers: RevGRU and RevLSTM against nn.GRU, nn.LSTM and chunked checkpointing.

    python -m benchmarks.reversible_layer [--quick]

One thread, forward and backward of one layer, taken in turns. "Kept" is what the layer leaves
allocated between the passes beyond its input and output, "peak" the allocator's peak over both
passes less the final gradients; both are counted alike for all layers.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import measure
from lightning_revflip.reversible import RevGRU, RevLSTM, memory_report

SHAPES = [(20, 70, 650, 1150), (20, 70, 200, 300), (64, 35, 300, 300), (20, 1000, 650, 650)]
"""Batch, steps, input size, hidden size."""


def checkpointed(rnn: nn.Module, x: Tensor) -> Tensor:
    """The outputs of a layer whose chunks of sqrt(steps) are recomputed in the backward pass."""
    outputs, state = [], None
    for chunk in x.split(math.isqrt(len(x))):
        output, state = checkpoint(rnn, chunk, state, use_reentrant=False)
        outputs.append(output)
    return torch.cat(outputs)


def candidates(
    kind: str, x: Tensor, hidden: int
) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """Layer and forward pass by name."""
    standard, reversible = {"GRU": (nn.GRU, RevGRU), "LSTM": (nn.LSTM, RevLSTM)}[kind]
    plain = standard(x.shape[-1], hidden, device=x.device)
    rev = reversible(x.shape[-1], hidden, max_forget_bits=3.0, device=x.device)
    return {
        f"nn.{kind}": (plain, lambda: plain(x)[0]),
        f"nn.{kind} checkpointed": (plain, lambda: checkpointed(plain, x)),
        f"Rev{kind}": (rev, lambda: rev(x)[0]),
    }


def compare(kind: str, shape: tuple[int, int, int, int], budget: float) -> list[dict[str, Any]]:
    """One row per candidate."""
    batch, steps, features, hidden = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = torch.randn(steps, batch, features, device=device, requires_grad=True)
    grad = torch.randn(steps, batch, hidden, device=device)
    options = candidates(kind, x, hidden)

    def training_pass(module: nn.Module, forward: Callable[[], Tensor]) -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        forward().backward(grad)

    passes = {name: partial(training_pass, *option) for name, option in options.items()}
    times = measure.seconds(passes, budget)
    rows: list[dict[str, Any]] = []
    for name, (module, forward) in options.items():
        kept, _ = measure.bytes_allocated(forward)
        module.zero_grad(set_to_none=True)
        x.grad = None
        gradients, peak = measure.bytes_allocated(passes[name])
        row: dict[str, Any] = {
            "layer": name,
            "batch": batch,
            "steps": steps,
            "input_size": features,
            "hidden_size": hidden,
            "seconds": measure.summary(times[name]),
            "kept_bytes": kept - grad.nbytes,
            "peak_bytes": peak - gradients,
        }
        if isinstance(module, (RevGRU, RevLSTM)):
            forward()
            row["bits_per_unit_step"] = memory_report(module).bits_per_unit_step
        rows.append(row)
    for row in rows:
        row["time_ratio"] = row["seconds"]["median"] / rows[0]["seconds"]["median"]
        for figure in ("kept", "peak"):
            row[f"{figure}_ratio"] = rows[0][f"{figure}_bytes"] / row[f"{figure}_bytes"]
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    shown = Table("B, T, in, hidden", "layer", "ms", "time", "kept MB", "", "peak MB", "")
    for row in rows:
        shape = ", ".join(str(row[k]) for k in ("batch", "steps", "input_size", "hidden_size"))
        shown.add_row(
            shape,
            row["layer"],
            f"{1e3 * row['seconds']['median']:.1f}",
            f"{row['time_ratio']:.2f}x",
            f"{row['kept_bytes'] / 1e6:.2f}",
            f"{row['kept_ratio']:.1f}x less",
            f"{row['peak_bytes'] / 1e6:.2f}",
            f"{row['peak_ratio']:.1f}x less",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a second per shape, no results file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        for kind in ("GRU", "LSTM"):
            rows += compare(kind, shape, 1.0 if options.quick else 12.0)
    console = Console()
    console.print(table(rows))
    if not options.quick:
        console.print(f"written to {measure.write('reversible_layer', rows)}")


if __name__ == "__main__":
    main()
