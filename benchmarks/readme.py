"""Writes tables and figures of README files from results/*.json, so that none is typed in.

python -m benchmarks.readme
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.tables import cards, read
from benchmarks.tables.markdown import table

ROOT = Path(__file__).parent.parent


def rows(name: str, **wanted: Any) -> list[dict[str, Any]]:
    """Those rows of a results file that have these values."""
    found = read(name)["rows"]
    return [row for row in found if all(row.get(key) == value for key, value in wanted.items())]


def only(name: str, **wanted: Any) -> dict[str, Any]:
    """The one row of a results file with these values."""
    (row,) = rows(name, **wanted)
    return row


def memory() -> str:
    """The language model at three lengths."""
    names = {
        "nn.LSTM": "`nn.LSTM`",
        "nn.LSTM, checkpointed": "`nn.LSTM`, activation checkpointing",
        "RevLSTM, chunk 4": "`RevLSTM` in a `ReversibleSequence`",
    }
    lengths = (70, 500, 2000)
    lines = []
    for model, label in names.items():
        measured = [only("language_model", model=model, steps=steps) for steps in lengths]
        lines.append([label, *(f"{_megabytes(row)}, {_seconds(row)}" for row in measured)])
    return table(["", *(f"{steps:,} steps" for steps in lengths)], lines)


def recipes() -> str:
    """What the recipes reach."""
    perplexity = {row["cell"]: row["val_perplexity"] for row in rows("ptb_paper")}
    bleu = {row["cell"]: row["test_bleu"] for row in rows("nmt_quality")}
    less = only("translation", model="RevLSTM")["peak_ratio"]
    single, sgld = (rows("mnist_posterior", run=run) for run in ("sgd", "sgld"))
    bayes, cartpole = (rows("recipes", run=run) for run in ("mlp,flipout_bayes", "cartpole"))
    generations = ", ".join(str(row["steps"]) for row in cartpole)
    return table(
        ["recipe", "what it is", "runs on", "measured"],
        [
            [
                "[`ptb`](recipes/ptb/README.md)",
                "word and character language models: GRU and LSTM, plain, reversible, with weight "
                "drop or flipout",
                "Penn Treebank, or an embedded text without any download",
                f"the paper's model, its first 2,000 steps: validation perplexity "
                f"{perplexity['lstm']:.0f} as LSTM, "
                f"{perplexity['revlstm_sequence']:.0f} as RevLSTM, "
                f"{perplexity['revlstm_forgetful_sequence']:.0f} with `forget_bias` -3",
            ],
            [
                "[`nmt`](recipes/nmt/README.md)",
                "translation with attention, plain and reversible; beam search, BLEU",
                "Multi30k, parallel files of yours, or number words without any data",
                f"test BLEU {bleu['lstm']:.1f} as LSTM, {bleu['revlstm']:.1f} as RevLSTM with "
                f"{less:.1f} times less memory",
            ],
            [
                "[`mnist`](recipes/mnist/README.md)",
                "classifiers: flipout, evolution strategies, SGLD and its relatives, ensembles, "
                "APD; anomalies, active learning, attacks",
                "MNIST, or scikit-learn's digits without any download",
                f"letters told from digits by entropy: AUROC {_percent(sgld, 'auroc_entropy')} % "
                f"with SGLD, {_percent(single, 'auroc_entropy')} % with one network; accuracy "
                f"{_percent(sgld, 'accuracy')} % and {_percent(single, 'accuracy')} %, "
                f"{_percent(bayes, 'accuracy')} % by flipout",
            ],
            [
                "[`es_cartpole`](recipes/es_cartpole/README.md)",
                "evolution strategies that balance a pole, all members in one batch",
                "gymnasium",
                f"solved after {generations} generations of 128 members ({len(cartpole)} seeds)",
            ],
        ],
        texts=4,
    )


def alternatives() -> str:
    """What users know already, what it is better at, and figures measured side by side."""
    lstm = only("language_model", model="nn.LSTM, checkpointed", steps=2000)
    ours = only("language_model", model="RevLSTM, chunk 4", steps=2000)
    layers = {row["layer"].split()[0]: row["ratio"] for row in rows("flipout_layers")}
    speed = {row["optimizer"]: row["of_sgd"] for row in rows("sgld_steps")}
    members = {
        row["method"]: row["members_per_second"] for row in rows("flipout_evolution", examples=1)
    }
    cost = "; ".join(
        f"{name} {layers[key]['flipout']:.1f}x, {layers[key]['bayesian_torch']:.1f}x there"
        for key, name in (("Linear", "linear"), ("Conv2d", "convolution"), ("LSTM", "LSTM"))
    )
    return table(
        ["you know", "it suits you when", "what is different here", "measured side by side"],
        [
            [
                "activation checkpointing (`torch.utils.checkpoint`)",
                "the network is not recurrent, or `nn.LSTM` must stay `nn.LSTM`",
                "states are recomputed backwards, so nothing grows with the sequence but the bits "
                "that were forgotten",
                f"language model, 2,000 steps: {_megabytes(ours)} and {_seconds(ours)}, "
                f"{_megabytes(lstm)} and {_seconds(lstm)} with checkpoints",
            ],
            [
                "[bayesian-torch](https://github.com/IntelLabs/bayesian-torch)",
                "you want transposed convolutions, priors from a trained network (MOPED), "
                "or quantisation",
                "layers of your model are converted in place by a callback; noise is redrawn, not "
                "kept; the KL gradient is exact under accumulation and mixed precision",
                f"forward and backward pass over the plain layer: {cost}",
            ],
            [
                "[posteriors](https://github.com/normal-computing/posteriors)",
                "you write functional code, or want Laplace, Kalman filters, dense "
                "variational inference",
                "a torch optimizer and a callback; samples go to a crash-safe bank",
                f"steps of SGLD per second of those of SGD: {speed['SGLD']:.2f}, "
                f"{speed['posteriors sgld']:.2f} there",
            ],
            [
                "[torch-uncertainty](https://github.com/ENSTA-U2IS-AI/torch-uncertainty)",
                "you want its training routines, baselines and benchmarks of vision",
                "your LightningModule stays yours; data size and temperature are stated by name",
                f"the same: {speed['SGLD']:.2f}, {speed['torch-uncertainty SGLD']:.2f} there",
            ],
            [
                "[lightning-uq-box](https://github.com/lightning-uq-box/lightning-uq-box)",
                "you compare many methods, conformal ones too, each a LightningModule around a "
                "network",
                "four methods, each attached to your own LightningModule, with banks and "
                "distillation",
                "not measured",
            ],
            [
                "[EvoTorch](https://github.com/nnaisense/evotorch)",
                "you want CMA-ES, genetic or multi-objective search, or clusters by Ray",
                "members are rows of one batch that share a perturbation up to signs",
                f"784-100-10, one image a member: {members['flipout']:,.0f} members per second, "
                f"{members['EvoTorch PGPE (vmap)']:,.0f} there",
            ],
        ],
        texts=4,
    )


TABLES: dict[str, list[Callable[[], str]]] = {
    "README.md": [memory, recipes, alternatives],
    "recipes/ptb/README.md": [
        cards.small_cells,
        cards.paper_cells,
        cards.perturbed_cells,
        cards.perturbed_revlstm,
        cards.small_cells_at_20,
        cards.revgru_at_20,
    ],
    "recipes/nmt/README.md": [cards.translations, cards.translation_step, cards.number_words],
    "recipes/mnist/README.md": [
        cards.classifiers,
        cards.posteriors,
        cards.anomalies,
        cards.attacks,
        cards.labels_needed,
        cards.random_picks,
    ],
    "recipes/es_cartpole/README.md": [cards.cartpole],
}


def filled(text: str, tables: Iterable[Callable[[], str]]) -> str:
    """The text with each table, or figures in a sentence, between the two comments of its name.

    Raises:
        ValueError: if a comment is missing.
    """
    for make in tables:
        name, made = make.__name__, make()
        begin, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->"
        if begin in text:
            made += "\n"
        else:
            begin = f"<!-- figures: {name} -->"
        start, stop = text.find(begin), text.find(end)
        if not 0 <= start < stop:
            raise ValueError(
                f"There is no place for {name}: write <!-- table: {name} --> or, within a line, "
                f"{begin}, and behind it {end}."
            )
        text = f"{text[:start]}{begin}{made}{text[stop:]}"
    return text


def _megabytes(row: dict[str, Any]) -> str:
    value = row["peak_bytes"] / 1e6
    return f"{value:.1f} MB" if value < 20 else f"{value:,.0f} MB"


def _seconds(row: dict[str, Any]) -> str:
    value = row["seconds"]["median"]
    return f"{value:.2f} s" if value < 2 else f"{value:.1f} s"


def _percent(measured: list[dict[str, Any]], key: str) -> str:
    return f"{100 * statistics.mean(row[key] for row in measured):.1f}"


if __name__ == "__main__":
    for file, tables in TABLES.items():
        path = ROOT / file
        path.write_text(filled(path.read_text(encoding="utf-8"), tables), encoding="utf-8")
