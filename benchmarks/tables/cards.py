"""Tables and figures of the model cards, `recipes/*/README.md`, written by `benchmarks.readme`."""

import statistics

from benchmarks.tables.markdown import Results, grouped, mean, ms, read, table
from benchmarks.tables.posterior import mnist_posterior, score

CELLS = {
    "gru": "nn.GRU",
    "revgru": "RevGRU, 3 bits",
    "lstm": "nn.LSTM",
    "revlstm": "RevLSTM, 3 bits",
    "revlstm_forgetful": "RevLSTM, 3 bits, `forget_bias` -3",
}
FLOAT_BITS = 32


def small_cells() -> str:
    """Language models of size `small` by cell."""
    return table(
        [
            "cell",
            "validation perplexity",
            "against the ordinary cell",
            "stored bits per unit and step",
            "recurrent layer keeps",
        ],
        (
            [
                *_perplexity(row),
                f"{row['savings']:.0f}x less" if "savings" in row else 1,
            ]
            for row in read("ptb_perplexity")["rows"]
        ),
    )


def small_cells_at_20() -> str:
    """Perplexities of the same cells at learning rate 20."""
    return _listed([f"{row['val_perplexity']:.1f}" for row in read("ptb_perplexity_lr20")["rows"]])


def revgru_at_20() -> str:
    """How far RevGRU is behind nn.GRU at learning rate 20."""
    return f"{100 * (_cells('ptb_perplexity_lr20')['revgru']['perplexity_ratio'] - 1):.1f} %"


def paper_cells() -> str:
    """Language models of size `paper` by cell."""
    return table(
        ["cell", "validation perplexity", "against nn.LSTM", "stored bits per unit and step"],
        (_perplexity(row) for row in read("ptb_paper")["rows"]),
    )


def perturbed_cells() -> str:
    """Language models with perturbed recurrent weights, of words and of characters."""
    noise = {
        "lstm_weightdrop": "one mask for a batch",
        "lstm_flipout_dropconnect": "of its own for each sequence",
        "lstm_flipout_gaussian": "of its own for each sequence",
    }
    words, characters = read("ptb_flipout"), _cells("ptb_flipout_char")
    return table(
        [
            "recurrent weights",
            f"words, {words['steps']:,} steps: validation perplexity",
            f"characters, {read('ptb_flipout_char')['steps']} steps: per character",
        ],
        (
            [
                f"`{row['cell']}`: {noise[row['cell']]}",
                f"{row['val_perplexity']:.1f}",
                f"{characters[row['cell']]['val_perplexity']:.3f}",
            ]
            for row in words["rows"]
        ),
    )


def perturbed_revlstm() -> str:
    """Perplexities of a RevLSTM by weight drop and by flipout's DropConnect."""
    return _listed([f"{row['val_perplexity']:.1f}" for row in read("ptb_flipout_rev")["rows"]])


def translations() -> str:
    """Models trained on Multi30k."""
    return table(
        [
            "model",
            "attention sees",
            "test 2016 BLEU",
            "against its baseline",
            "tokenised BLEU",
            "test perplexity",
        ],
        (
            [
                CELLS[row["cell"]],
                "embedding and 20 units" if row["cell"].startswith("rev") else "all 300 units",
                f"{row['test_bleu']:.2f}",
                f"{row['test_bleu_difference']:+.2f}" if "test_bleu_difference" in row else "",
                f"{row['test_bleu_tokenized']:.2f}",
                f"{row['test_perplexity']:.2f}",
            ]
            for row in read("nmt_quality")["rows"]
        ),
        texts=2,
    )


def translation_step() -> str:
    """Time and memory of a training step of these models."""
    return table(
        [
            "model",
            "time of a step",
            "",
            "peak beyond gradients",
            "",
            "encoder states: stored",
            "information",
            "decoder states: stored",
            "information",
        ],
        (
            [
                row["model"],
                f"{ms(row['seconds_per_step'])} ms",
                f"{row['time_ratio']:.2f}x",
                f"{row['peak_bytes'] / 1e6:.1f} MB",
                f"{row['peak_ratio']:.1f}x less",
                *(
                    f"{row[part][kind]:.1f}x less" if part in row else ""
                    for part in ("encoder", "decoder")
                    for kind in ("stored_savings", "information_savings")
                ),
            ]
            for row in read("translation")["rows"]
        ),
    )


def number_words() -> str:
    """Share of the number words that each model spells without a mistake."""
    return ", ".join(
        f"{CELLS[row['cell']].split(',')[0]} {100 * row['test_exact_match']:.1f} %"
        for row in read("nmt_numbers")["rows"]
    )


def classifiers() -> str:
    """Classifiers of digits by flipout and evolution strategies."""
    data = {"small": "digits"}
    return table(
        ["run", "data", "seeds", "test accuracy, %", "nll", "ece, %"],
        (
            [
                f"`{run}`",
                data.get(run.split(",")[-1], "MNIST"),
                len(seeds),
                mean(seeds, "accuracy", 2, 100),
                mean(seeds, "nll", 3),
                mean(seeds, "ece", 2, 100),
            ]
            for (run,), seeds in grouped(_recipe("mnist"), "run").items()
        ),
        texts=2,
    )


def posteriors() -> str:
    """The table of the documentation, with what is one network and what are several chains."""
    made = mnist_posterior(read("mnist_posterior"))
    for run, said in {"`sgd`": "one network", "`sgld_chains`": "4 chains"}.items():
        made = made.replace(run, f"{run}, {said}")
    return made


def anomalies() -> str:
    """AUROC of telling images of something else from digits."""
    kinds = {
        "notmnist": "notMNIST",
        "omniglot": "Omniglot",
        "inverted": "inverted",
        "gaussian": "Gaussian noise",
        "uniform": "uniform noise",
    }
    return table(
        ["predictor", *kinds.values()],
        (
            [
                f"`{row['posterior']}`",
                *(score(row["anomalies"], f"{kind}/auroc/{{}}", digits=1) for kind in kinds),
            ]
            for row in read("posterior_uses")["rows"]
        ),
    )


def attacks() -> str:
    """Accuracy under attack, and AUROC of telling changed images from unchanged ones."""
    changes = ("0.05", "0.1", "0.15", "0.3")
    return table(
        ["attack", "predictor", "clean", *changes],
        (
            [
                attack,
                f"`{row['posterior']}`",
                f"{100 * row[attack]['accuracy/0']:.1f}",
                *(
                    f"{100 * row[attack][f'accuracy/{change}']:.1f} "
                    f"({score(row[attack], f'auroc/{{}}/{change}')})"
                    for change in changes
                ),
            ]
            for attack in ("FGSM", "PGD")
            for row in read("posterior_uses")["rows"]
        ),
        texts=2,
    )


def labels_needed() -> str:
    """Fewest and most labels, picked by variation ratio, that 90 % takes."""
    needed = [
        row["labels_needed"]["0.90"]
        for row in read("active_learning")["rows"]
        if row["run"].endswith("variation_ratio")
    ]
    return f"{min(needed)} to {max(needed)}"


def random_picks() -> str:
    """Accuracy at the end with labels picked at random."""
    rows = read("active_learning")["rows"]
    at_end = [row["accuracy"][-1] for row in rows if row["run"].endswith("random")]
    return f"{100 * statistics.mean(at_end):.0f} %"


def cartpole() -> str:
    """Generations until the pole is balanced, by seed."""
    return _listed([str(row["steps"]) for row in _recipe("es_cartpole")])


def _cells(name: str) -> dict[str, Results]:
    return {row["cell"]: row for row in read(name)["rows"]}


def _recipe(name: str) -> list[Results]:
    return [row for row in read("recipes")["rows"] if row["recipe"] == name]


def _perplexity(row: Results) -> list[object]:
    """Cell, perplexity, that of the ordinary cell, and bits, of a language model."""
    reversible = "bits_per_unit_step" in row
    return [
        CELLS[row["cell"].removesuffix("_sequence")],
        f"{row['val_perplexity']:.1f}",
        f"{row['perplexity_ratio']:.3f}" if reversible else "",
        f"{row['bits_per_unit_step']:.2f}" if reversible else FLOAT_BITS,
    ]


def _listed(figures: list[str]) -> str:
    return f"{', '.join(figures[:-1])} and {figures[-1]}"
