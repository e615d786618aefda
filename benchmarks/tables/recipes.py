"""Table of what recipes reach."""

from benchmarks.tables.markdown import Results, grouped, mean, shown, table


@shown
def recipes(results: Results) -> str:
    """Recipes trained and tested with their configurations as they are: classifiers of handwritten
    digits, and a pole that is balanced (500 is the largest return). Means and standard deviations
    over the seeds.
    """
    return table(
        ["recipe", "run", "seeds", "steps", "accuracy, %", "nll", "ece, %", "return"],
        (
            [
                recipe,
                f"`{run}`",
                len(rows),
                mean(rows, "steps", 0),
                mean(rows, "accuracy", 2, 100),
                mean(rows, "nll", 3),
                mean(rows, "ece", 2, 100),
                mean(rows, "return", 0),
            ]
            for (recipe, run), rows in grouped(results["rows"], "recipe", "run").items()
        ),
        texts=2,
    )
