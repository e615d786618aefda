"""Translation of Multi30k at a fixed budget: reversible models beside ordinary ones.

    python -m benchmarks.nmt_quality [--epochs 10] [--lr 0.001] [--cells lstm revlstm gru revgru]
    python -m benchmarks.nmt_quality --source numbers --pair en-de --size small --epochs 4 \\
        --lr 0.002 --folder runs/nmt_numbers --output nmt_numbers

Runs `revflip fit`, then `revflip test` on the best checkpoint, with the recipe's configurations at
the paper's size: ordinary models attend to all units, reversible ones to the embedding and 20
units, and forget at most 3 bits. Same seed, same batches, Adam for all. Needs Multi30k in
REVFLIP_DATA; writes results/OUTPUT.json and its curves beside the recipe's README. Trainings stay
in `--folder`, where `benchmarks.translation` finds them; those that are there are not run again.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks import measure

CONFIGS = Path("recipes/nmt/configs")
SETTINGS = ("source", "pair", "min_count", "size", "epochs", "lr")
CELLS = {
    "lstm": ["lstm"],
    "revlstm": ["lstm", "emb20h", "rev3"],
    "gru": ["gru"],
    "revgru": ["gru", "emb20h", "rev3"],
}


def command(task: str, cell: str, options: argparse.Namespace) -> list[str]:
    """A training or test of one cell, as a user would start it."""
    configs = ["base", options.size, *CELLS[cell], "csv"]
    call = [
        *(sys.executable, "-m", "lightning_revflip.cli", task),
        *(f"--config={CONFIGS / name}.yaml" for name in configs),
        f"--trainer.max_epochs={options.epochs}",
        "--model.init_args.optimizer=adam",
        f"--model.init_args.lr={options.lr}",
        "--trainer.num_sanity_val_steps=0",
        f"--trainer.accelerator={options.accelerator}",
        f"--data.source={options.source}",
        f"--data.pair={options.pair}",
        f"--data.min_count={options.min_count}",
        f"--trainer.logger.init_args.save_dir={options.folder}",
        f"--trainer.logger.init_args.name={cell}",
        f"--trainer.logger.init_args.version={task}",
    ]
    if task == "test":
        call.append(f"--ckpt_path={best_checkpoint(cell, options.folder)}")
    return call


def best_checkpoint(cell: str, folder: Path) -> Path:
    """The checkpoint with the lowest validation perplexity."""
    found = sorted(folder.glob(f"{cell}/fit/checkpoints/epoch*.ckpt"))
    if len(found) != 1:
        raise SystemExit(
            f"{folder / cell}/fit/checkpoints holds {len(found)} checkpoints of an epoch, one is "
            "expected. Run python -m benchmarks.nmt_quality with this --folder."
        )
    return found[0]


def column(path: Path, name: str) -> list[tuple[int, float]]:
    """What was logged under a name, with the steps."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [(int(row["step"]) + 1, float(row[name])) for row in rows if row.get(name)]


def read(cell: str, folder: Path) -> dict[str, Any]:
    """Curves and last figures of a cell."""
    fit, test = (folder / cell / task / "metrics.csv" for task in ("fit", "test"))
    found: dict[str, Any] = {"cell": cell}
    names = ("perplexity", "bleu", "bleu_tokenized", "exact_match")
    found |= {f"val_{name}": column(fit, f"val/{name}") for name in names}
    for name in names:
        ((_, found[f"test_{name}"]),) = column(test, f"test/{name}")
    return found


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Validation perplexity and BLEU against steps."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("perplexity", "bleu"), strict=True):
        for row in rows:
            style = "--" if row["cell"].startswith("rev") else "-"
            color = "C0" if "gru" in row["cell"] else "C1"
            curve = zip(*row[f"val_{name}"], strict=True)
            axes.plot(*curve, style, color=color, label=row["cell"])
        axes.set(xlabel="training steps", ylabel=f"validation {name}")
    axes.legend()
    figure.axes[0].set_yscale("log")
    return figure


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What decides the results of a training."""
    return {n: getattr(options, n) for n in SETTINGS}


def is_done(task: str, cell: str, options: argparse.Namespace) -> bool:
    """Whether this was run to its end before; an error if it was with other settings."""
    marker = options.folder / cell / f"{task}.json"
    if not marker.exists():
        return False
    found = json.loads(marker.read_text())
    if found != settings(options):
        raise SystemExit(
            f"{marker} was run with {found}, not with {settings(options)}. Give another --folder."
        )
    return True


def run_all(task: str, options: argparse.Namespace) -> None:
    """All trainings or tests, one thread each, as many at a time as there are processors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    waiting = [cell for cell in options.cells if not is_done(task, cell, options)]
    running: list[tuple[str, subprocess.Popen[bytes]]] = []
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                cell = waiting.pop(0)
                shutil.rmtree(options.folder / cell / task, ignore_errors=True)  # what was cut off
                call = command(task, cell, options)
                process = subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL)
                running.append((cell, process))
            cell, process = running[0]
            if process.wait() != 0:
                raise SystemExit(f"the {task} of {cell} failed, see above")
            running.pop(0)
            (options.folder / cell / f"{task}.json").write_text(json.dumps(settings(options)))
    finally:
        for _, process in running:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--size", choices=("paper", "small"), default="paper")
    add("--epochs", type=int, default=10)
    add("--lr", type=float, default=0.001)
    add("--source", choices=("multi30k", "numbers"), default="multi30k")
    add("--pair", default="de-en")
    add("--min-count", type=int, default=2, help="occurrences of a word that gets a number")
    add("--accelerator", default="auto", help="of the trainings, as a Trainer takes it")
    add("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    add("--folder", type=Path, default=Path("runs/nmt_quality"), help="where trainings are kept")
    add("--output", default="nmt_quality", help="name of the results file")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in the trainings, for the record
    for task in ("fit", "test"):
        run_all(task, options)
    rows = [read(cell, options.folder) for cell in options.cells]
    for row in rows:
        plain = next((r for r in rows if r["cell"] == row["cell"].removeprefix("rev")), row)
        if plain is not row:
            row["test_bleu_difference"] = row["test_bleu"] - plain["test_bleu"]
        print({key: value for key, value in row.items() if not key.startswith("val_")})
    print(measure.write(options.output, rows, **settings(options)))
    draw(rows).savefig(f"recipes/nmt/{options.output}.png", dpi=100)


if __name__ == "__main__":
    main()
