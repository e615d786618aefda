"""Tables of reversible recurrences."""

from benchmarks.tables.markdown import Results, ms, perplexities, shown, table


@shown
def reversible_layer(results: Results) -> str:
    """Forward and backward pass of one layer, in turns, against nn.GRU or nn.LSTM: its time, what
    it keeps between the passes beyond input and output, and the allocator's peak over both passes
    less the gradients.
    """
    return table(
        ["batch, steps, in, hidden", "layer", "ms", "time", "kept MB", "less", "peak MB", "less"],
        (
            [
                f"{row['batch']}, {row['steps']}, {row['input_size']}, {row['hidden_size']}",
                row["layer"],
                ms(row["seconds"]),
                f"{row['time_ratio']:.2f}x",
                f"{row['kept_bytes'] / 1e6:.2f}",
                f"{row['kept_ratio']:.0f}x",
                f"{row['peak_bytes'] / 1e6:.1f}",
                f"{row['peak_ratio']:.1f}x",
            ]
            for row in results["rows"]
        ),
        texts=2,
    )


@shown
def language_model(results: Results) -> str:
    """One training step of a language model with 10,000 words, against nn.LSTM: one layer,
    embedding tied to the softmax. The peak is the allocator's over a step that starts without
    gradients, less the final ones. Checkpointed models recompute everything in chunks of sqrt(T)
    steps. *Chunk a/b*: a steps at a time, b for the read-out; *equal size*: as many parameters,
    instead of units, as the ordinary model; *bits*: stored per unit and step.
    """
    return table(
        ["T, B, H", "model", "parameters", "ms", "time", "peak MB", "less", "bits"],
        (
            [
                f"{row['steps']:,}, {row['batch']}, {row['hidden_size']}",
                row["model"],
                f"{row['parameters'] / 1e6:.1f} M",
                ms(row["seconds"]),
                f"{row['time_ratio']:.2f}x",
                f"{row['peak_bytes'] / 1e6:,.1f}",
                f"{row['peak_ratio']:.1f}x",
                f"{row['bits_per_unit_step']:.2f}" if "bits_per_unit_step" in row else "",
            ]
            for row in results["rows"]
        ),
        texts=2,
    )


@shown
def long_sequence(results: Results) -> str:
    """One training step of a smaller language model over 10,000 steps, with and without the
    sub-linear mode (`segments`).
    """
    return table(
        ["T, B, H", "model", "seconds", "peak MB", "less"],
        (
            [
                f"{row['steps']:,}, {row['batch']}, {row['hidden_size']}",
                row["model"],
                f"{row['seconds']['median']:.1f}",
                f"{row['peak_bytes'] / 1e6:,.2f}",
                f"{row['peak_ratio']:.0f}x",
            ]
            for row in results["rows"]
        ),
        texts=2,
    )


@shown
def translation(results: Results) -> str:
    """One training step of translation models (Multi30k, German to English, 300 units, 64
    sentences), against nn.LSTM. The peak is the allocator's, less the final gradients. The last
    columns are by how much states shrink, counted as in the paper: *stored* is the memory that is
    there, *information* what no lossless buffer could go below. *Layers alone* are reversible
    layers in an otherwise ordinary model, which keeps attention, embeddings and logits.
    """
    kinds = [(half, kind) for half in ("encoder", "decoder") for kind in ("stored", "information")]
    return table(
        ["model", "attends to", "ms", "time", "peak MB", "less"]
        + [f"{half}: {kind}" for half, kind in kinds],
        (
            [
                row["model"],
                row["context"],
                ms(row["seconds_per_step"]),
                f"{row['time_ratio']:.2f}x",
                f"{row['peak_bytes'] / 1e6:.1f}",
                f"{row['peak_ratio']:.1f}x",
                *(
                    f"{row[half][f'{kind}_savings']:.1f}x" if half in row else ""
                    for half, kind in kinds
                ),
            ]
            for row in results["rows"]
        ),
        texts=2,
    )


@shown
def ptb_perplexity(results: Results) -> str:
    """Small language models on Penn Treebank after 300 steps, learning rate 10, one seed; at most
    3 forgotten bits per unit and step.
    """
    return perplexities(results)


@shown
def ptb_perplexity_lr20(results: Results) -> str:
    """The same at learning rate 20."""
    return perplexities(results)


@shown
def ptb_paper(results: Results) -> str:
    """The paper's language model (650 units) after its first 2,000 steps, whole windows in one
    reversible pass.
    """
    return perplexities(results)


def translations(results: Results) -> str:
    """Test figures of translation models."""
    return table(
        ["cell", "BLEU", "tokenised BLEU", "perplexity", "exact, %"],
        (
            [
                f"`{row['cell']}`",
                f"{row['test_bleu']:.2f}",
                f"{row['test_bleu_tokenized']:.2f}",
                f"{row['test_perplexity']:.2f}",
                f"{100 * row['test_exact_match']:.1f}",
            ]
            for row in results["rows"]
        ),
    )


@shown
def nmt_quality(results: Results) -> str:
    """Translation of Multi30k, German to English, at a fixed budget of ten epochs, one seed: test
    2016, beam 5. Reversible models attend to the embedding and 20 units, the others to all 300.
    """
    return translations(results)


@shown
def nmt_numbers(results: Results) -> str:
    """Number words, English to German, four epochs: the share spelled without a mistake counts
    (BLEU, of runs of four words, says nothing about single words).
    """
    return translations(results)
