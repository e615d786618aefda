"""Tables of samples of a posterior, and of what is distilled of them."""

from collections.abc import Iterable

from benchmarks.tables.markdown import Results, grouped, mean, ms, shown, table


@shown
def sgld_steps(results: Results) -> str:
    """A training step of 784-100-10 with batches of 100, forward and backward pass included,
    against SGD of torch.
    """
    return table(
        ["optimizer", "a step, µs", "steps per second, of SGD's"],
        (
            [row["optimizer"], f"{1e6 * row['median']:.0f}", f"{row['of_sgd']:.2f}"]
            for row in results["rows"]
        ),
    )


@shown
def sgld_collection(results: Results) -> str:
    """What keeping a sample costs every 20 steps, and which share of the time of these steps it
    is, for banks and for two ways of one's own.
    """
    return table(
        ["collector", "a sample, µs", "of the steps"],
        (
            [row["collector"], f"{1e6 * row['mean']:.0f}", f"{row['of_steps']:.1%}"]
            for row in results["rows"]
        ),
    )


@shown
def sgld_prediction(results: Results) -> str:
    """Predictions of 100 samples at once, against a loop of `load_state_dict`."""
    return table(
        ["batch", "loop, ms", "`predict`, ms", "faster"],
        (
            [row["batch"], ms(row["loop"]), ms(row["predict"]), f"{row['speedup']:.2f}x"]
            for row in results["rows"]
        ),
        texts=0,
    )


@shown
def sgld_crash(results: Results) -> str:
    """Writers of a bank killed at random moments. Lost are samples that the killed process had
    already added; a shard in memory is what may be lost.
    """
    groups = grouped(results["rows"], "policy", "max_samples")
    return table(
        ["samples kept", "kills", "while writing", "samples on disk", "most lost", "of a shard of"],
        (
            [
                policy if most is None else f"{policy}, {most} at most",
                len(rows),
                sum(row["while_writing"] for row in rows),
                f"{sum(row['on_disk'] for row in rows):,}",
                max(row["lost"] for row in rows),
                results["shard_samples"],
            ]
            for (policy, most), rows in groups.items()
        ),
    )


@shown
def mnist_posterior(results: Results) -> str:
    """Networks of 784-100-10 on MNIST, up to 200 samples or passes: accuracy and calibration on the
    test images, and AUROC of telling 2,000 letters of notMNIST from digits, by predictive entropy
    (H) and mutual information (MI). ESS and R-hat are the worst over 32 outputs. Means and standard
    deviations over the seeds.
    """
    return table(
        [
            "run",
            "seeds",
            "networks",
            "accuracy, %",
            "nll",
            "ece, %",
            "AUROC, H",
            "AUROC, MI",
            "ESS",
            "R-hat",
        ],
        (
            [
                f"`{run}`",
                len(rows),
                f"{rows[0]['networks']:.0f}",
                mean(rows, "accuracy", 2, 100),
                mean(rows, "nll", 4),
                mean(rows, "ece", 2, 100),
                mean(rows, "auroc_entropy", 1, 100),
                mean(rows, "auroc_mutual_information", 1, 100),
                mean(rows, "ess_function", 1),
                mean(rows, "rhat_function", 2),
            ]
            for (run,), rows in grouped(results["rows"], "run").items()
        ),
    )


@shown
def apd(results: Results) -> str:
    """What may take the place of a bank of samples, networks of 784-100-10 on MNIST. *Networks*
    counts bytes, in networks of float32. AUROC of telling 2,000 letters of notMNIST from digits, by
    predictive entropy (H) and mutual information (MI). *Correlation*, over test images, is that of
    how much predictions differ within the posterior and within the bank. Seconds are CPU time.
    Means and standard deviations over seeds.
    """
    banks = {"sgld_chains": "four chains"}
    return table(
        [
            "bank of",
            "posterior",
            "networks",
            "accuracy, %",
            "nll",
            "AUROC, H",
            "AUROC, MI",
            "correlation",
            "s",
        ],
        (
            [
                banks.get(run, "one chain"),
                posterior if rank is None else f"{posterior}, rank {rank}",
                mean(rows, "networks", 1),
                mean(rows, "accuracy", 2, 100),
                mean(rows, "nll", 4),
                mean(rows, "auroc_entropy", 1, 100),
                mean(rows, "auroc_mutual_information", 1, 100),
                mean(rows, "correlation", 2),
                mean(rows, "seconds", 0),
            ]
            for (run, posterior, rank), rows in grouped(
                results["rows"], "run", "posterior", "rank"
            ).items()
        ),
        texts=2,
    )


@shown
def apd_modes(results: Results) -> str:
    """Posteriors with several modes: share of generated networks at a mode, modes found, and sliced
    Wasserstein distance to held-out samples, in the plane through the modes. The first row of each
    posterior is the distance between two halves of the samples, the last a mixture of Gaussians
    that is told how many modes there are.
    """
    return table(
        ["posterior", "method", "modes found", "at a mode, %", "distance", "bytes", "s"],
        (
            [
                row["case"],
                row["method"],
                f"{row['covered']} of {row['modes']}",
                f"{100 * row['at_modes']:.0f}",
                f"{row['sliced_wasserstein']:.2f}",
                f"{row['bytes']:,}" if "bytes" in row else "",
                f"{row['seconds']:.0f}" if "seconds" in row else "",
            ]
            for row in results["rows"]
        ),
        texts=2,
    )


def score(found: Results, key: str, digits: int = 0) -> str:
    """AUROC in percent by predictive entropy and, where there is one, mutual information."""
    names = (key.format(kind) for kind in ("predictive_entropy", "mutual_information"))
    return " / ".join(f"{100 * found[name]:.{digits}f}" for name in names if name in found)


@shown
def posterior_uses(results: Results) -> str:
    """Predictors of 784-100-10 on MNIST, 40 networks or passes, one seed. Left, AUROC in percent of
    telling images of something else from digits, by predictive entropy and mutual information.
    Right, accuracy under PGD with 40 steps at the largest change of a pixel.
    """
    rows = results["rows"]
    kinds = sorted({key.split("/")[0] for key in rows[0]["anomalies"]})
    changes = keys_after(rows[0]["PGD"], "accuracy/")
    return table(
        ["predictor", *kinds, *(f"PGD {change}, %" for change in changes)],
        (
            [
                f"`{row['posterior']}`",
                *(score(row["anomalies"], f"{kind}/auroc/{{}}") for kind in kinds),
                *(f"{100 * row['PGD'][f'accuracy/{change}']:.1f}" for change in changes),
            ]
            for row in rows
        ),
    )


def keys_after(found: Results, prefix: str) -> Iterable[str]:
    """What stands behind a prefix, of the keys that have it."""
    return [key.removeprefix(prefix) for key in found if key.startswith(prefix)]


@shown
def active_learning(results: Results) -> str:
    """Labels needed to reach an accuracy on MNIST, 20 at the start and 10 more a round, picked from
    2,000 unlabelled images; a fresh network each round, tested after every fourth. One figure for
    each seed, a dash where 500 labels were not enough.
    """
    levels = list(results["rows"][0]["labels_needed"])
    reached = [f"{100 * float(level):.0f} %" for level in levels]
    return table(
        ["posterior and picks", *reached, "accuracy at the end"],
        (
            [
                f"`{run}`",
                *(
                    ", ".join(str(row["labels_needed"][level] or "-") for row in rows)
                    for level in levels
                ),
                ", ".join(f"{row['accuracy'][-1]:.3f}" for row in rows),
            ]
            for (run,), rows in grouped(results["rows"], "run").items()
        ),
    )
