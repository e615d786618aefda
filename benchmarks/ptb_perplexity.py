"""Perplexity on the Penn Treebank at a small, fixed budget: reversible cells beside ordinary ones.

    python -m benchmarks.ptb_perplexity [--steps 400] [--lr 20] [--cells gru revgru lstm revlstm]
    python -m benchmarks.ptb_perplexity --size paper --steps 2000 --every 250 \\
        --cells lstm revlstm_sequence revlstm_forgetful_sequence --output ptb_paper
    python -m benchmarks.ptb_perplexity --steps 2052 --every 171 --cells lstm_weightdrop \\
        lstm_flipout_dropconnect lstm_flipout_gaussian --output ptb_flipout [--char]

Runs `revflip fit` with the recipe's configurations (same seed, same windows), then reads the logged
metrics. Needs the Penn Treebank in REVFLIP_DATA; writes results/OUTPUT.json and its curve beside
the recipe's README. `--read FOLDER` reads trainings that were run before, FOLDER/CELL/version_0.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import measure

CONFIGS = Path("recipes/ptb/configs")
CELLS = {
    "gru": ["gru"],
    "revgru": ["gru", "rev3"],
    "lstm": ["lstm"],
    "revlstm": ["lstm", "rev3"],
    "revlstm_forgetful": ["lstm", "rev3_forgetful"],
    "revlstm_sequence": ["lstm", "rev3", "sequence"],
    "revlstm_forgetful_sequence": ["lstm", "rev3_forgetful", "sequence"],
    "lstm_weightdrop": ["lstm_weightdrop"],
    "lstm_flipout_dropconnect": ["lstm_flipout_dropconnect"],
    "lstm_flipout_gaussian": ["lstm_flipout_gaussian"],
    "revlstm_weightdrop": ["rev3", "lstm_weightdrop"],
    "revlstm_flipout_dropconnect": ["rev3", "lstm_flipout_dropconnect"],
}


def command(cell: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """The training of one cell, as a user would start it."""
    level = ["char"] if options.char else []
    configs = ["base", options.size, *level, *CELLS[cell], "csv"]
    return [
        *(sys.executable, "-m", "lightning_revflip.cli", "fit"),
        *(f"--config={CONFIGS / name}.yaml" for name in configs),
        f"--trainer.max_steps={options.steps}",
        f"--model.init_args.lr={options.lr}",
        f"--trainer.val_check_interval={options.every}",
        "--trainer.check_val_every_n_epoch=null",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.accelerator=cpu",
        "--data.source=ptb",
        f"--trainer.logger.init_args.save_dir={folder}",
        f"--trainer.logger.init_args.name={cell}",
    ]


def read(cell: str, folder: Path) -> dict[str, Any]:
    """The curve and the last figures of a run."""
    (path,) = folder.glob(f"{cell}/version_0/metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))

    def column(name: str) -> list[tuple[int, float]]:
        return [(int(row["step"]) + 1, float(row[name])) for row in rows if row.get(name)]

    curve = column("val/perplexity")
    found: dict[str, Any] = {"cell": cell, "curve": curve, "val_perplexity": curve[-1][1]}
    found["saved_for_backward_bytes"] = column("memory/saved_for_backward_bytes")[-1][1]
    if stored := column("reversible/bits_per_unit_step"):
        found["bits_per_unit_step"] = stored[-1][1]
        found["savings"] = column("reversible/savings")[-1][1]
    return found


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Validation perplexity against steps."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        reversible, forgetful = row["cell"].startswith("rev"), "forgetful" in row["cell"]
        style = ":" if forgetful else "--" if reversible else "-"
        color = color_of(row["cell"])
        axes.plot(*zip(*row["curve"], strict=True), style, color=color, label=row["cell"])
    axes.set(xlabel="training steps", ylabel="validation perplexity")
    axes.legend()
    return figure


def color_of(cell: str) -> str:
    """GRU blue, LSTM orange; LSTMs with perturbed weights have colours of their own."""
    kinds = {"gru": "C0", "weightdrop": "C2", "dropconnect": "C3", "gaussian": "C4"}
    return next((color for kind, color in kinds.items() if kind in cell), "C1")


def train(options: argparse.Namespace, folder: Path) -> None:
    """All trainings, one thread each, as many at a time as there are processors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    waiting = list(options.cells)
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            call = command(waiting.pop(0), options, folder)
            running.append(subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL))
        if running.pop(0).wait() != 0:
            raise SystemExit("a training failed, see above")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--size", choices=("small", "paper", "paper_2layer"), default="small")
    add("--steps", type=int, default=400)
    add("--every", type=int, default=100, help="steps between two validations")
    add("--char", action="store_true", help="characters instead of words")
    add("--lr", type=float, default=20.0)
    add("--cells", nargs="+", choices=CELLS, default=list(CELLS)[:5])
    add("--output", default="ptb_perplexity", help="name of the results file")
    add("--read", type=Path, metavar="FOLDER", help="of trainings that were run before")
    options = parser.parse_args()
    if options.steps % options.every:
        parser.error(
            f"--steps must be a multiple of --every ({options.every}), after which validation "
            f"runs, got {options.steps}"
        )
    torch.set_num_threads(1)  # as in the trainings, for the record
    with tempfile.TemporaryDirectory() as name:
        folder = options.read or Path(name)
        if not options.read:
            train(options, folder)
        rows = [read(cell, folder) for cell in options.cells]
    for row in rows:
        if row["cell"].startswith("rev"):
            name = row["cell"].removeprefix("rev").split("_")[0]
            plain = next((r for r in rows if r["cell"] == name), None)
            if plain is not None:
                row["perplexity_ratio"] = row["val_perplexity"] / plain["val_perplexity"]
        print({key: value for key, value in row.items() if key != "curve"})
    level = "char" if options.char else "word"
    settings = {"size": options.size, "level": level, "steps": options.steps, "lr": options.lr}
    print(measure.write(options.output, rows, **settings))
    draw(rows).savefig(f"recipes/ptb/{options.output}.png", dpi=100)


if __name__ == "__main__":
    main()
