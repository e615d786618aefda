"""Figures of the documentation, drawn from `results/*.json`.

    python -m benchmarks.figures

writes that of README.md to docs/memory.png. The pages of the site show theirs by `show(name)`, as
SVG in the colour of the text.
"""

import html
import io
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import flipout_variance, language_model, nmt_quality, ptb_perplexity
from benchmarks.tables import read

MUTED, CHOSEN = "#8c93a1", "#e8743b"
"""Colours that can be read on white and on dark: of what is compared with, and of this package."""
SECOND = "#3f8fd2"
README = Path("docs/memory.png")


def svg(figure: Figure, alt: str) -> str:
    """A figure as HTML that takes the colour of the text around it.

    Args:
        figure: any that was drawn in black on white; white becomes transparent.
        alt: what it shows, for those who do not see it; also its caption.
    """
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])  # the same in every figure
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("#000000", "currentcolor").replace("fill: #ffffff", "fill: none")
    text = text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(alt)}" ', 1)
    text = re.sub(r"\n\s*", " ", text)
    return f'<figure class="plot">{text}<figcaption>{html.escape(alt)}</figcaption></figure>'


def show(name: str) -> str:
    """The figure with a name of `FIGURES` as HTML."""
    draw, alt = FIGURES[name]
    return svg(draw(), alt)


def memory() -> Figure:
    """Peak and time of a training step against the length of the sequence."""
    rows = read("language_model")["rows"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    peaks, times = figure.subplots(1, 2)
    models = {
        "nn.LSTM": ("nn.LSTM", MUTED),
        "nn.LSTM, checkpointed": ("checkpointed", SECOND),
        "RevLSTM, chunk 4": ("RevLSTM", CHOSEN),
    }
    for model, (label, color) in models.items():
        own = [row for row in rows if row["model"] == model]
        steps = [row["steps"] for row in own]
        megabytes = [row["peak_bytes"] / 1e6 for row in own]
        tokens = [row["steps"] * row["batch"] for row in own]
        spent = [1e6 * row["seconds"]["median"] / n for row, n in zip(own, tokens, strict=True)]
        peaks.loglog(steps, megabytes, "o-", color=color, linewidth=2.2)
        times.semilogx(steps, spent, "o-", color=color, linewidth=2.2)
        largest = megabytes[-1]
        size = f"{largest:.0f} MB" if largest < 1000 else f"{largest / 1000:.1f} GB"
        name_line(peaks, steps[-1], largest, f"{label}, {size}", color)
        name_line(times, steps[-1], spent[-1], f"{label}, {spent[-1]:,.0f} µs", color)
    peaks.set_title("Peak memory of a training step", loc="left", weight="bold", size="medium")
    peaks.set_yticks([10, 100, 1000, 10_000], ["10 MB", "100 MB", "1 GB", "10 GB"])
    peaks.set_ylim(5, 15_000)
    times.set_title("Time per token, µs", loc="left", weight="bold", size="medium")
    times.set_ylim(bottom=0)
    for axes in (peaks, times):
        axes.set_xlabel("time steps in the sequence")
        axes.set_xlim(60, 25_000)
        axes.set_xticks(steps, [f"{length:,}" for length in steps])
        plain(axes)
    return figure


def name_line(axes: Axes, x: float, y: float, label: str, color: str) -> None:
    """Write the name of a line behind its last point."""
    axes.annotate(
        label, (x, y), (7, 0), textcoords="offset points", va="center", color=color, weight="bold"
    )


def plain(axes: Axes) -> None:
    """A light grid, and no frame."""
    axes.minorticks_off()
    axes.grid(alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def bars(values: Iterable[tuple[str, float, bool]], xlabel: str, pattern: str) -> Figure:
    """Horizontal bars with their values.

    Args:
        values: name and value of each, and whether it belongs to this package.
        xlabel: quantity and unit.
        pattern: how a value is written behind its bar.
    """
    names, lengths, chosen = zip(*values, strict=True)
    figure = Figure(figsize=(7, 0.8 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    drawn = axes.barh(places, lengths, color=[CHOSEN if own else MUTED for own in chosen])
    axes.bar_label(drawn, [pattern.format(length) for length in lengths], padding=4)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xlabel(xlabel)
    plain(axes)
    axes.grid(visible=False, axis="y")
    return figure


def translation() -> Figure:
    """Peak of a training step of translation models."""
    rows = read("translation")["rows"]
    values = [(r["model"], r["peak_bytes"] / 1e6, r["model"].startswith("Rev")) for r in rows]
    return bars(values, "peak memory of a training step, MB", "{:.0f}")


def flipout_layers() -> Figure:
    """Time of layers against those of torch."""
    labels = {"flipout": "this package", "bayesian_torch": "bayesian-torch"}
    values = [
        (f"{row['layer'].split(',')[0]}: {labels[rival]}", row["ratio"][rival], rival == "flipout")
        for row in read("flipout_layers")["rows"]
        for rival in labels
        if rival in row["ratio"]
    ]
    return bars(values, "time of a pass, of the plain layer's", "{:.1f}x")


def flipout_large_batch() -> Figure:
    """Iterations to a training loss against the batch size."""
    rows = read("flipout_large_batch")["rows"]
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    names = {"flipout": ("flipout", CHOSEN), "shared": ("one sample for the batch", MUTED)}
    for estimator, (label, color) in names.items():
        own = [row for row in rows if row["estimator"] == estimator]
        batches = [row["batch"] for row in own]
        axes.loglog(batches, [row["mean_iterations"] for row in own], "o-", color=color)
        name_line(axes, batches[-1], own[-1]["mean_iterations"], label, color)
    axes.set_xlim(100, 80_000)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.set_yticks([30, 100, 300], ["30", "100", "300"])
    axes.set(xlabel="examples per batch", ylabel="iterations")
    plain(axes)
    return figure


def flipout_evolution() -> Figure:
    """Members per second."""
    rows = [row for row in read("flipout_evolution")["rows"] if row["examples"] == 1]
    values = [(r["method"], r["members_per_second"], r["method"] == "flipout") for r in rows]
    figure = bars(values, "members per second, one example each", "{:,.0f}")
    figure.axes[0].set_xscale("log")
    figure.axes[0].set_xlim(100, 2e6)
    return figure


def sgld_steps() -> Figure:
    """Time of a training step by optimizer."""
    others = ("torch SGD", "torch Adam", "torch-uncertainty", "posteriors")
    values = [
        (row["optimizer"], 1e6 * row["median"], not row["optimizer"].startswith(others))
        for row in read("sgld_steps")["rows"]
    ]
    return bars(values, "time of a training step, µs", "{:.0f}")


def mnist_posterior() -> Figure:
    """Detection of letters by entropy, means over the seeds of each run."""
    rows = read("mnist_posterior")["rows"]
    others = ("sgd", "mc_dropout", "deep_ensemble")
    values = [
        (run, 100 * mean(row["auroc_entropy"] for row in rows if row["run"] == run))
        for run in dict.fromkeys(row["run"] for row in rows)
    ]
    figure = bars(
        [(run, auroc, run not in others) for run, auroc in values],
        "letters told from digits by predictive entropy, AUROC in %",
        "{:.1f}",
    )
    figure.axes[0].set_xlim(50, 105)
    return figure


def apd() -> Figure:
    """Agreement with the bank against the bytes that it takes, one chain."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    kinds = {
        "APD, whitened": ("APD", CHOSEN, "o-"),
        "low-rank Gaussian, no residual": ("Gaussian", SECOND, "s-"),
        "bank, thinned": ("thinned bank", MUTED, "^-"),
    }
    rows = [row for row in read("apd")["rows"] if row["run"] == "sgld" and row["seed"] == 0]
    for kind, (label, color, style) in kinds.items():
        own = [row for row in rows if row["posterior"] == kind]
        own.sort(key=lambda row: row["networks"])
        sizes = [row["networks"] for row in own]
        axes.plot(sizes, [row["correlation"] for row in own], style, color=color, label=label)
    axes.set(xlabel="size, in networks of float32", ylabel="correlation with the bank")
    axes.legend(frameon=False)
    plain(axes)
    return figure


def drawn(name: str, draw: Callable[[list[dict[str, Any]]], Figure]) -> Callable[[], Figure]:
    """The figure that a benchmark draws of its own results."""
    return lambda: draw(read(name)["rows"])


FIGURES: dict[str, tuple[Callable[[], Figure], str]] = {
    "memory": (
        memory,
        "A training step of a language model (10,000 words, batch 20, 650 units, one CPU thread): "
        "peak memory beyond parameters and gradients on a logarithmic axis, and time per token, "
        "against the length of the sequence.",
    ),
    "language_model": (
        drawn("language_model", language_model.draw),
        "The same for all models that were measured at every length.",
    ),
    "translation": (
        translation,
        "Peak memory of a training step of translation models, beyond parameters and gradients.",
    ),
    "ptb_perplexity": (
        drawn("ptb_perplexity", ptb_perplexity.draw),
        "Validation perplexity of small language models against training steps.",
    ),
    "ptb_paper": (
        drawn("ptb_paper", ptb_perplexity.draw),
        "Validation perplexity of language models of the paper's size against training steps.",
    ),
    "nmt_quality": (
        drawn("nmt_quality", nmt_quality.draw),
        "Validation perplexity and BLEU of translation models against training steps.",
    ),
    "flipout_layers": (
        flipout_layers,
        "Time of a forward and backward pass with Gaussian weights, against the plain layer.",
    ),
    "flipout_variance": (
        drawn("flipout_variance", flipout_variance.draw),
        "Variance of a gradient's component against the number of examples, by estimator.",
    ),
    "flipout_large_batch": (
        flipout_large_batch,
        "Iterations to a training loss of 0.3 on MNIST against the batch size.",
    ),
    "flipout_evolution": (
        flipout_evolution,
        "Members of evolution strategies per second, on a logarithmic axis.",
    ),
    "ptb_flipout": (
        drawn("ptb_flipout", ptb_perplexity.draw),
        "Validation perplexity against training steps, recurrent weights perturbed.",
    ),
    "sgld_steps": (sgld_steps, "Time of a training step by optimizer."),
    "mnist_posterior": (
        mnist_posterior,
        "How well letters are told from digits, where 50 % is chance; means over seeds.",
    ),
    "apd": (
        apd,
        "How closely the disagreement of the networks follows that of the bank, against bytes.",
    ),
}


def main() -> None:
    figure = memory()
    figure.savefig(README, dpi=160)
    print(f"written to {README}")


if __name__ == "__main__":
    main()
