"""Memory and time of a training step of translation models, ordinary and reversible, on Multi30k.

    python -m benchmarks.translation [--folder runs/nmt_quality] [--batches 20]

Takes the models that `benchmarks.nmt_quality` trained, and the same training batches for all. The
states of encoder and decoder are counted as in the paper: what is stored of them (information
buffer and units kept as floats) against all of them as floats, c and h for an LSTM. The peak is the
allocator's over one step of the whole model, from no gradients to the final ones, less these, for
the largest of the batches. Times are taken in turns, over all batches.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import measure
from benchmarks.nmt_quality import best_checkpoint
from lightning_revflip.convert import load_from_checkpoint
from lightning_revflip.reversible import memory_report
from recipes.nmt.batches import Batch
from recipes.nmt.data import ParallelText
from recipes.nmt.module import Translator

MODELS = {
    "nn.LSTM": ("lstm", "plain"),
    "RevLSTM, layers alone": ("revlstm", "plain"),
    "RevLSTM": ("revlstm", "sequence"),
    "nn.GRU": ("gru", "plain"),
    "RevGRU, layers alone": ("revgru", "plain"),
    "RevGRU": ("revgru", "sequence"),
}
HALVES = ("encoder", "decoder")
COUNTS = ("float_state_bits", "stored_bits", "slice_bits", "information_bits")


def step(model: Translator, batch: Batch) -> None:
    """One training step but the update."""
    model.zero_grad(set_to_none=True)
    (model.negative_log_likelihood(batch) / len(batch.lines)).backward()


def count_states(model: Translator, batches: Sequence[Batch]) -> dict[str, dict[str, float]]:
    """What is stored of the states of either half, summed over batches, and what that saves."""
    found = {half: dict.fromkeys(COUNTS, 0.0) for half in HALVES}
    for batch in batches:
        step(model, batch)
        report = memory_report(model)
        for half, counts in found.items():
            for name in COUNTS:
                counts[name] += getattr(report.within(half), name)
    for counts in found.values():
        for kind in ("stored", "information"):
            bits = counts[f"{kind}_bits"] + counts["slice_bits"]
            counts[f"{kind}_savings"] = counts["float_state_bits"] / bits
    return found


def peak_of_a_step(model: Translator, batch: Batch) -> dict[str, int]:
    """The allocator's peak beyond gradients, and these."""
    model.zero_grad(set_to_none=True)
    _, peak = measure.bytes_allocated(partial(step, model, batch), "cpu")
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    return {"peak_bytes": peak - gradients, "gradient_bytes": gradients}


def compare(
    models: dict[str, Translator], batches: Sequence[Batch], budget: float, rounds: int
) -> list[dict[str, Any]]:
    """One row per model."""
    largest = max(batches, key=lambda batch: batch.source.numel() + batch.targets.numel())
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        step(model, batches[0])
        cell = name.split(",")[0].removeprefix("nn.")
        rows[name] = {"model": name, "cell": cell, "context": model.hparams["context"]}
        rows[name] |= peak_of_a_step(model, largest)
        if "Rev" in name:
            rows[name] |= count_states(model, batches)

    def run(model: Translator) -> None:
        for batch in batches:
            step(model, batch)

    runs: dict[str, Callable[[], None]] = {n: partial(run, model) for n, model in models.items()}
    for name, times in measure.seconds(runs, budget, rounds, warm_up=False).items():
        rows[name]["seconds_per_step"] = measure.summary([t / len(batches) for t in times])
    for row in rows.values():
        same = rows[f"nn.{row['cell'].removeprefix('Rev')}"]
        for suffix, base in (("", rows["nn.LSTM"]), ("_same_cell", same)):
            mine, theirs = (r["seconds_per_step"]["median"] for r in (row, base))
            row[f"time_ratio{suffix}"] = mine / theirs
            row[f"peak_ratio{suffix}"] = base["peak_bytes"] / row["peak_bytes"]
    return list(rows.values())


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for people; ratios to nn.LSTM."""
    headers = ("model", "ms", "time", "peak MB", "less")
    shown = Table(*headers, "encoder: stored", "information", "decoder: stored", "information")
    for row in rows:
        cells = [
            row["model"],
            f"{1e3 * row['seconds_per_step']['median']:.0f}",
            f"{row['time_ratio']:.2f}x",
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['peak_ratio']:.1f}x",
        ]
        kinds = [(half, kind) for half in HALVES for kind in ("stored", "information")]
        cells += [f"{row[half][f'{kind}_savings']:.1f}x" for half, kind in kinds if half in row]
        shown.add_row(*cells)
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("runs/nmt_quality"), help="of benchmarks.nmt_quality")
    add("--pair", default="de-en")
    add("--min-count", type=int, default=2, help="as in the trainings")
    add("--batches", type=int, default=20)
    add("--seconds", type=float, default=60.0, help="to spend on times")
    add("--rounds", type=int, default=3, help="at least")
    add("--output", default="translation", help="name of the results file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = ParallelText(options.pair, "multi30k", min_count=options.min_count)
    data.setup("fit")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(options.batches))]  # noqa: B905
    models = {}
    for name, (cell, memory) in MODELS.items():
        path = best_checkpoint(cell, options.folder)
        models[name] = load_from_checkpoint(Translator, path, memory=memory).train()
    rows = compare(models, batches, options.seconds, options.rounds)
    Console(width=140).print(table(rows))
    lengths = [length for batch in batches for length in batch.source_lengths]
    settings = {
        "batch_size": len(batches[0].lines),
        "batches": len(batches),
        "mean_source_length": sum(lengths) / len(lengths),
        "source_words": len(data.source_vocabulary),
        "target_words": len(data.target_vocabulary),
    }
    print(measure.write(options.output, rows, "cpu", **settings))


if __name__ == "__main__":
    main()
