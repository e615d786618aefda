"""A language model with a tied softmax: nn.GRU, nn.LSTM, checkpointed, and ReversibleSequence.

    python -m benchmarks.language_model [--quick | --long | --plot]

One recurrent layer, forward and backward, models in turns. The peak is the allocator's over one
step, from no gradients to the final ones, less these. Models are compared at equal H, where RevGRU
has half as many recurrent weights as nn.GRU, and RevLSTM five gates of half as many instead of
four; models of "equal size" have the H at which all parameters together are as many.

`--long` shows the sub-linear mode, which keeps states instead of an information buffer, on 10,000
steps. `--plot` only redraws the figure, from the results file.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import measure
from lightning_revflip.reversible import (
    LinearCrossEntropy,
    ReversibleSequence,
    RevGRU,
    RevLSTM,
    memory_report,
)

LAYERS = {"GRU": (nn.GRU, RevGRU), "LSTM": (nn.LSTM, RevLSTM)}
CHUNKS = ["4", "10", "4/2", "2", "auto"]
CPU = {"steps": [70, 500, 2000], "hidden": [650], "batch": 20, "vocab": 10_000, "chunks": CHUNKS}
CUDA = CPU | {"steps": [70, 500, 2000, 10_000], "hidden": [650, 1150, 2048], "batch": 64}
LONG = {"steps": [10_000], "hidden": [200], "batch": 8, "vocab": 1000, "output": "long_sequence"}
LONG["chunks"] = ["10", "10 segments"]


class Ordinary(nn.Module):
    """Embedding, nn.GRU or nn.LSTM, tied softmax, as one writes them down."""

    def __init__(self, kind: str, vocab: int, hidden: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.rnn = LAYERS[kind][0](hidden, hidden)
        self.head = nn.Linear(hidden, vocab)
        self.head.weight = self.embedding.weight
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.checkpointed = checkpointed

    def run(self, tokens: Tensor, targets: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Summed loss and final state."""
        hidden, state = self.rnn(self.embedding(tokens), state)
        logits = self.head(hidden)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), state

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Loss per token; if checkpointed, chunks of sqrt(steps) are recomputed as a whole."""
        if not self.checkpointed:
            return self.run(tokens, targets, None)[0] / tokens.numel()
        losses, state, size = [], None, math.isqrt(len(tokens))
        for chunk in zip(tokens.split(size), targets.split(size), strict=True):
            loss, state = checkpoint(self.run, *chunk, state, use_reentrant=False)
            losses.append(loss)
        return torch.stack(losses).sum() / tokens.numel()


class Reversible(nn.Module):
    """The same model as a ReversibleSequence, which takes the settings."""

    def __init__(self, kind: str, vocab: int, hidden: int, **settings: Any) -> None:
        super().__init__()
        embedding = nn.Embedding(vocab, hidden)
        head = LinearCrossEntropy(hidden, vocab, vocab_chunk=settings.pop("vocab_chunk", None))
        head.weight = embedding.weight
        nn.init.uniform_(embedding.weight, -0.1, 0.1)
        rnn = LAYERS[kind][1](hidden, hidden, max_forget_bits=3.0)
        self.sequence = ReversibleSequence(embedding, rnn, head, **settings)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Loss per token."""
        return self.sequence(tokens, None, targets)[0] / tokens.numel()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def settings(text: str) -> dict[str, Any]:
    """Settings of Reversible: auto or CHUNK[/READ_OUT[/VOCAB_CHUNK]], with or without segments."""
    chunk, *segments = text.split()
    names = ("chunk_steps", "read_out_steps", "vocab_chunk")
    numbers = [None if number == "auto" else int(number) for number in chunk.split("/")]
    return dict(zip(names, numbers, strict=False)) | {"segment_steps": "auto" if segments else None}


def equal_hidden(kind: str, vocab: int, hidden: int) -> int:
    """The even H at which the reversible model has as many parameters as the ordinary one."""
    with torch.device("meta"):
        wanted = parameters(Ordinary(kind, vocab, hidden))
        widths = range(hidden - hidden % 2, 6 * hidden // 5 + 2, 2)
        sizes = {width: parameters(Reversible(kind, vocab, width)) for width in widths}
    return min(widths, key=lambda width: abs(sizes[width] - wanted))


def candidates(
    kinds: Iterable[str], vocab: int, hidden: int, chunks: Sequence[str], equal_size: bool
) -> dict[str, Callable[[], nn.Module]]:
    """How to build each model; at equal size, only with the first of the settings."""
    found: dict[str, Callable[[], nn.Module]] = {}
    for kind in kinds:
        found[f"nn.{kind}"] = partial(Ordinary, kind, vocab, hidden)
        found[f"nn.{kind}, checkpointed"] = partial(Ordinary, kind, vocab, hidden, True)
        for chunk in chunks:
            name = f"Rev{kind}, chunk {chunk}"
            found[name] = partial(Reversible, kind, vocab, hidden, **settings(chunk))
        if equal_size:
            width = equal_hidden(kind, vocab, hidden)
            name = f"Rev{kind}, chunk {chunks[0]}, equal size"
            found[name] = partial(Reversible, kind, vocab, width, **settings(chunks[0]))
    return found


def compare(
    models: dict[str, Callable[[], nn.Module]], tokens: Tensor, budget: float, rounds: int
) -> list[dict[str, Any]]:
    """One row per model, with `seconds` None if it ran out of memory; tokens (steps + 1, batch)."""
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Tensor]] = {}
    for name, build in models.items():
        torch.manual_seed(0)
        model = build().to(tokens.device)

        def step(model: nn.Module = model, length: int = len(tokens) - 1) -> Tensor:
            model.zero_grad(set_to_none=True)
            loss: Tensor = model(tokens[:length], tokens[1 : length + 1])
            loss.backward()
            return loss

        embedding = next(p for p in model.parameters() if p.dim() == 2)
        rows[name] = {
            "model": name,
            "cell": "GRU" if "GRU" in name else "LSTM",
            "steps": len(tokens) - 1,
            "batch": tokens.shape[1],
            "vocab": embedding.shape[0],
            "hidden_size": embedding.shape[1],
            "parameters": parameters(model),
        }
        try:
            step(length=len(tokens) - 1 if tokens.is_cuda else 4)  # what happens only once
            rows[name] |= memory(model, step, tokens)
            steps[name] = step
        except torch.cuda.OutOfMemoryError:
            model.cpu().zero_grad(set_to_none=True)
    times = measure.seconds(steps, budget, rounds, warm_up=False)
    for name, row in rows.items():
        row["seconds"] = measure.summary(times[name]) if name in times else None
    for row in rows.values():
        for suffix, base in (("", rows["nn.LSTM"]), ("_same_cell", rows[f"nn.{row['cell']}"])):
            if row["seconds"] and base["seconds"]:
                row[f"time_ratio{suffix}"] = row["seconds"]["median"] / base["seconds"]["median"]
                row[f"peak_ratio{suffix}"] = base["peak_bytes"] / row["peak_bytes"]
    return list(rows.values())


def memory(model: nn.Module, step: Callable[[], Tensor], tokens: Tensor) -> dict[str, Any]:
    """What one step allocates, and what its reversible layer stores."""
    model.zero_grad(set_to_none=True)
    found: dict[str, Any] = {}
    _, peak = measure.bytes_allocated(lambda: found.update(loss=step().item()), tokens.device.type)
    if not math.isfinite(found["loss"]):
        raise RuntimeError(f"the loss is {found['loss']} for {model}")
    found["gradient_bytes"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    found["peak_bytes"] = peak - found["gradient_bytes"]
    if isinstance(model, Reversible):
        report = memory_report(model)
        found |= {
            "chunk_steps": model.sequence.chosen_chunk_steps(tokens.shape[1]),
            "stored_bits": report.stored_bits,
            "information_bits": report.information_bits,
            "bits_per_unit_step": report.bits_per_unit_step,
        }
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people; ratios to nn.LSTM."""
    shown = Table("T, B, H", "model", "parameters", "ms", "time", "peak MB", "less", "bits")
    for row in rows:
        shape = f"{row['steps']}, {row['batch']}, {row['hidden_size']}"
        cells = [shape, row["model"], f"{row['parameters'] / 1e6:.2f}M"]
        if not row["seconds"]:
            shown.add_row(*cells, "out of memory")
            continue
        shown.add_row(
            *cells,
            f"{1e3 * row['seconds']['median']:.0f}",
            f"{row['time_ratio']:.2f}x" if "time_ratio" in row else "",
            f"{row['peak_bytes'] / 1e6:.2f}",
            f"{row['peak_ratio']:.1f}x" if "peak_ratio" in row else "",
            f"{row['bits_per_unit_step']:.3f}" if "bits_per_unit_step" in row else "",
        )
    return shown


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Peak and time against steps, for the first H and the models measured at every length."""
    rows = [row for row in rows if row["hidden_size"] == rows[0]["hidden_size"]]
    lengths = sorted({row["steps"] for row in rows})
    figure = Figure(figsize=(9, 5), layout="constrained")
    memories, times = figure.subplots(1, 2)
    styles = {"": "-", "checkpointed": "--"}
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        fits = [row for row in mine if row["seconds"]]
        if len(mine) < len(lengths) or not fits:
            continue
        style = styles.setdefault(name.partition(", ")[2], "os^vD"[len(styles) % 5] + "-")
        how = {"color": "C0" if "GRU" in name else "C1", "label": name}
        steps = [row["steps"] for row in fits]
        peaks = [row["peak_bytes"] / 1e6 for row in fits]
        spent = [1e6 * row["seconds"]["median"] / row["steps"] / row["batch"] for row in fits]
        memories.plot(steps, peaks, style, **how)
        times.plot(steps, spent, style, **how)
    memories.set(yscale="log", ylabel="peak of a step, MB")
    times.set(ylim=(0, None), ylabel="time per token, µs")
    for axes in (memories, times):
        axes.set(xscale="log", xlabel="time steps")
        axes.set_xticks(lengths, [f"{steps:,}" for steps in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(handles=memories.lines, loc="outside lower center", ncols=2)
    return figure


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with defaults for the device."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, nargs="+", help="lengths, default 70 500 2000, on a GPU 10000 too")
    add("--hidden", type=int, nargs="+", help="units, default 650, on a GPU 1150 and 2048 too")
    add("--batch", type=int, help="default 20, on a GPU 64")
    add("--vocab", type=int, help="tokens, default 10000")
    add("--chunks", nargs="+", help=f"default {CHUNKS}; {settings.__doc__}")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1)
    add("--seconds", type=float, default=20.0, help="to spend on the timed steps of each length")
    add("--rounds", type=int, help="timed steps at least; default 3, or 1 where steps are slow")
    add("--quick", action="store_true", help="the first length, one round, no results file")
    add("--long", action="store_true", help="10,000 steps of a small model, with segments too")
    add("--plot", action="store_true", help="only draw the figure, from the results file")
    add("--output", default="language_model", help="name of the results file and the figure")
    add("--figures", type=Path, default=Path("runs"), help="folder of the figure")
    given = parser.parse_args(argv)
    parser.set_defaults(**LONG if given.long else CUDA if given.device == "cuda" else CPU)
    return parser.parse_args(argv)


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All settings at the first length, two at the others, one where a step takes half a minute."""
    rows: list[dict[str, Any]] = []
    for hidden, steps in product(options.hidden, options.steps[: 1 if options.quick else None]):
        torch.manual_seed(0)
        tokens = torch.randint(options.vocab, (steps + 1, options.batch), device=options.device)
        first = steps == options.steps[0]
        slow = options.long or steps >= (5000 if options.device == "cuda" else 1000)
        chunks = options.chunks[: None if first else 1 if slow else 2]
        kinds, equal_size = (["LSTM"], False) if options.long else (LAYERS, first)
        models = candidates(kinds, options.vocab, hidden, chunks, equal_size)
        rounds = options.rounds or (1 if slow or options.quick else 3)
        rows += compare(models, tokens, 0.0 if options.quick else options.seconds, rounds)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    options, console = arguments(argv), Console()
    if options.plot:
        rows = json.loads((measure.RESULTS / f"{options.output}.json").read_text())["rows"]
    else:
        torch.set_num_threads(options.threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        console.print(table(rows := measured(options)))
        if not options.quick:
            console.print(f"written to {measure.write(options.output, rows, options.device)}")
    if not options.quick and not options.long:
        options.figures.mkdir(parents=True, exist_ok=True)
        draw(rows).savefig(options.figures / f"{options.output}.png", dpi=120)


if __name__ == "__main__":
    main()
