"""What a run of a recipe records in W&B, read back from its file."""

import csv
import json

import torch
import wandb

from tests.helpers.recipe_runs import (
    CSV,
    WANDB,
    config_args,
    csv_rows,
    fit_and_test,
    logger_args,
    tiny,
)
from tests.helpers.wandb_file import read_run

OWN = {"_runtime", "_step", "_timestamp", "_wandb/runtime"}
"""What W&B adds to what it is given."""
RENAMED = {"trainer/global_step": "step"}


def test_offline_run_holds_settings_numbers_figures_table_and_artifact(cwd):
    configs = config_args("nmt", "base", "small", "lstm", "emb20h", "rev3")
    cli = fit_and_test(*configs, *tiny("nmt", cwd), *logger_args(cwd, WANDB, CSV))
    wandb.finish()  # so that a later test in this process begins a run of its own
    wandb.teardown()  # waits until W&B's own process has written its file
    (path,) = (cwd / "wandb").glob("offline-run-*/*.wandb")
    run, files = read_run(path), path.parent / "files"

    # settings: of the run, and of its callbacks
    assert run.config["seed_everything"] == 1111
    assert run.config["versions"]["torch"] == torch.__version__
    assert run.config["ReversibleRNN"]["max_forget_bits"] == 3.0
    classes = [each["class_path"] for each in run.config["trainer"]["callbacks"]]
    assert "lightning_revflip.callbacks.MemoryMonitor" in classes
    assert run.config["model"]["init_args"]["context"] == "embedding+slice:20"

    # numbers: names, steps and values of the logger beside it, row for row
    media = {"reversible/bits_per_layer", "reversible/forget_gates"}
    media |= {"nmt/attention", "nmt/translations"}
    rows = [
        {RENAMED.get(name, name): value for name, value in row.items() if name not in OWN}
        for row in run.history
        if not any(name.startswith(tuple(media)) for name in row)
    ]
    expected = [{name: float(value) for name, value in row.items()} for row in csv_rows(cwd)]
    assert rows == expected
    last = {name: value for row in expected for name, value in row.items() if name != "step"}
    assert {name: run.summary[name] for name in last} == last

    # figures: those of the history are files
    shown = {
        name.removesuffix("/filenames"): value
        for row in run.history
        for name, value in row.items()
        if name.endswith("/filenames")
    }
    assert set(shown) == media - {"nmt/translations"}
    for (name,) in shown.values():
        assert (files / name).read_bytes()[1:4] == b"PNG"

    # the table: sentences of the validation
    names = [row["nmt/translations/path"] for row in run.history if "nmt/translations/path" in row]
    assert len(names) == 1  # a validation
    table = json.loads((files / names[0]).read_text())
    assert table["columns"] == ["source", "translation", "reference"]
    pairs = [*zip(*cli.datamodule.corpus.read("val"), strict=True)]
    assert {(source, reference) for source, _, reference in table["data"]} <= {*pairs}

    # the artifact: all sentences of the test
    number = cli.trainer.loggers[0].version
    kind, paths = run.artifacts[f"translations-{number}"]
    assert (kind, paths) == ("translations", {"translations.tsv"})
    (written,) = cwd.glob(f"*/{number}/translations.tsv")
    with written.open() as file:
        lines = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    found = [(line["source"], line["reference"]) for line in lines]
    assert found == [*zip(*cli.datamodule.corpus.read("test"), strict=True)]
    assert {"config.yaml", "checkpoints"} <= {path.name for path in written.parent.iterdir()}
