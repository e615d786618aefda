"""Tables of flipout and evolution strategies."""

from benchmarks.tables.markdown import Results, ms, perplexities, shown, table


@shown
def flipout_layers(results: Results) -> str:
    """Forward and backward pass of a layer with Gaussian weights, gradient of the divergence
    included, against the plain layer of torch, in turns.
    """
    return table(
        ["layer", "plain, ms", "flipout", "bayesian-torch"],
        (
            [
                row["layer"],
                ms(row["seconds"]["plain"]),
                *(
                    f"{row['ratio'][rival]:.2f}x" if rival in row["ratio"] else ""
                    for rival in ("flipout", "bayesian_torch")
                ),
            ]
            for row in results["rows"]
        ),
    )


@shown
def flipout_variance(results: Results) -> str:
    """How the variance of a gradient's component falls with the number of examples, MNIST, weights
    N(w, 0.1^2) around an initial network: the slope of a double-logarithmic line, -1 for
    independent examples.
    """
    return table(
        ["network", "estimator", "batch", "slope by mean", "slope by rho"],
        (
            [
                row["network"],
                row["estimator"],
                f"{row['batch'][0]} to {row['batch'][-1]:,}",
                f"{row['slope_by_mean']:.2f}",
                f"{row['slope_by_rho']:.2f}",
            ]
            for row in results["rows"]
        ),
        texts=2,
    )


@shown
def flipout_large_batch(results: Results) -> str:
    """Iterations until a network of 784-200-200-10 units with weights mean * N(1, 1) reaches a
    training loss of 0.3 on MNIST, each with the best of three learning rates, means of three seeds.
    """
    rows = results["rows"]
    return table(
        ["batch", "flipout", "one sample for the batch", "ratio"],
        (
            [
                f"{flipout['batch']:,}",
                f"{flipout['mean_iterations']:.0f}",
                f"{shared['mean_iterations']:.0f}",
                f"{shared['mean_iterations'] / flipout['mean_iterations']:.1f}",
            ]
            for flipout, shared in zip(rows[::2], rows[1::2], strict=True)
        ),
        texts=0,
    )


@shown
def flipout_evolution(results: Results) -> str:
    """Members of evolution strategies evaluated and used per second, network 784-100-10."""
    return table(
        ["method", "examples per member", "members per second", "flipout is"],
        (
            [
                row["method"],
                row["examples"],
                f"{row['members_per_second']:,.0f}",
                "" if row["method"] == "flipout" else f"{row['flipout_ratio']:.0f}x faster",
            ]
            for row in results["rows"]
        ),
    )


@shown
def ptb_flipout(results: Results) -> str:
    """Recurrent weights of a small language model dropped for the whole batch, or for each
    sequence, or Gaussian for each sequence: words, 1,368 steps, one seed.
    """
    return perplexities(results)


@shown
def ptb_flipout_char(results: Results) -> str:
    """The same for characters, 800 steps."""
    return perplexities(results)


@shown
def ptb_flipout_rev(results: Results) -> str:
    """The same within the reversible pass of a RevLSTM, words, 684 steps."""
    return perplexities(results)
