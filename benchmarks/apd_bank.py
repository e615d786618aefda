"""Banks of MNIST networks, and what may take their place in fewer bytes, APD among it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lightning_revflip.apd.offline import distil
from lightning_revflip.applications.predictors import DropoutPredictor, in_batches
from lightning_revflip.posterior import DiagonalGaussian, LowRankGaussian, SampleBank, predict
from lightning_revflip.posterior.layout import Parameters
from lightning_revflip.posterior.protocol import Posterior
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.module import Classifier
from recipes.mnist.uncertainty import detection, quality

RANKS = (10, 20, 40)
WHITENED = "APD, whitened"
PASSES = 200  # of Monte Carlo dropout
HALVES = 20
RAW_SECONDS = 60.0
NETWORK: dict[str, Any] = {
    "image_shape": (1, 28, 28),
    "num_classes": 10,
    "network": "mlp",
    "hidden": (100,),
}
FIGURES = ("accuracy", "nll", "ece", "auroc_entropy", "auroc_mutual_information", "correlation")


@dataclass
class Images:
    """What networks are compared on."""

    test: Tensor
    labels: Tensor
    outliers: Tensor

    @classmethod
    def mnist(cls) -> Images:
        """The test of MNIST, and 2,000 letters of notMNIST."""
        data = HandwrittenDigits(source="mnist", outliers="notmnist")
        data.setup("test")
        outliers = data.outlier_images()
        assert outliers is not None
        return cls(*data.test_set(), outliers)


@dataclass
class Probabilities:
    """Of the test images and of the outliers, each of shape (networks, images, classes)."""

    test: Tensor
    outliers: Tensor

    def some(self, networks: Tensor) -> Probabilities:
        """Those of some of the networks."""
        return Probabilities(self.test[networks], self.outliers[networks])

    @property
    def model_variance(self) -> Tensor:
        """Of each test image: the variance of a probability over networks, mean over classes."""
        return self.test.double().var(0).mean(-1)


@dataclass
class Candidate:
    """A posterior to compare with the bank.

    Attributes:
        name: in the table.
        fit: makes it.
        rank: if it has one.
    """

    name: str
    fit: Callable[[], Posterior]
    rank: int | None = None


def candidates(
    bank: SampleBank, ranks: tuple[int, ...], raw: bool, seed: int
) -> Iterator[Candidate]:
    """All that are fitted to a bank. Of the same rank they take about the same bytes."""
    yield Candidate("diagonal Gaussian", partial(DiagonalGaussian.fit, bank))
    for rank in ranks:
        low_rank = partial(LowRankGaussian.fit, bank, rank, "diagonal", dtype=torch.float16)
        yield Candidate("low-rank Gaussian", low_rank, rank)
        bare = partial(LowRankGaussian.fit, bank, rank, None, dtype=torch.float16)
        yield Candidate("low-rank Gaussian, no residual", bare, rank)
        if len(bank.chains) == 1:  # it is defined for the trajectory of one chain
            swag = partial(LowRankGaussian.swag, bank, rank, dtype=torch.float16)
            yield Candidate("SWAG", swag, rank)
        yield Candidate(WHITENED, partial(distil, bank, rank, seed=seed), rank)
    if raw:
        yield Candidate("APD, raw", partial(distil_raw, bank, seed=seed))


def distil_raw(bank: SampleBank, *, seconds: float = RAW_SECONDS, seed: int = 0) -> Posterior:
    """APD as in the paper, for as many steps as take some seconds of CPU time."""
    paper = partial(
        distil,
        bank,
        None,
        critic_steps=5,
        gradient_penalty=10.0,
        r1=0.0,
        lr=1e-4,
        betas=(0.5, 0.9),
        seed=seed,
    )
    one, several = (_cpu_seconds(partial(paper, steps=steps))[1] for steps in (1, 3))
    return paper(steps=max(1, int(2 * seconds / (several - one))))


def compare(
    path: Path,
    checkpoint: Path | None,
    images: Images,
    *,
    ranks: tuple[int, ...] = RANKS,
    raw: bool = True,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The figures of a bank and of all candidates, each by as many networks as the bank has.

    Args:
        path: folder of the bank, of networks `NETWORK`.
        checkpoint: of such a network that was trained with dropout.
        images: to compare on.
        ranks: of low-rank candidates.
        raw: whether to train APD on raw weights, too, which takes a minute.
        seed: of training and of what is drawn.
    """
    bank = SampleBank(path)
    module = Classifier(**NETWORK).eval()
    samples = bank.sample(len(bank))
    whole = _predict(module, samples, images)
    mean = {name: values.mean(0, keepdim=True) for name, values in samples.items()}
    found = partial(figures, images=images, whole=whole)

    rows: list[dict[str, Any]] = [{"posterior": "bank", "bytes": bank.nbytes, "samples": len(bank)}]
    rows[0] |= found(whole) | spread(whole, images)
    one = 4 * bank.layout.numel
    rows.append({"posterior": "mean weights", "bytes": one})
    rows[1] |= found(_predict(module, mean, images))
    for candidate in candidates(bank, ranks, raw, seed):
        posterior, seconds = _cpu_seconds(candidate.fit)
        random = torch.Generator().manual_seed(seed)
        samples, taken = _cpu_seconds(partial(posterior.sample, len(bank), random))
        row = {"posterior": candidate.name, "rank": candidate.rank, "bytes": posterior.nbytes}
        row |= {"seconds": seconds, "per_second": len(bank) / taken}
        rows.append(row | found(_predict(module, samples, images)))
        if candidate.name == WHITENED:
            thinned = bank.sample(fitting(bank, posterior.nbytes))
            kept = len(next(iter(thinned.values())))
            row = {"posterior": "bank, thinned", "rank": candidate.rank, "samples": kept}
            row["bytes"] = kept * (bank.nbytes // len(bank))
            rows.append(row | found(_predict(module, thinned, images)))
    if checkpoint is not None:
        row = {"posterior": "MC dropout", "bytes": one}
        rows.append(row | found(_dropout(checkpoint, images)))
    return [{**row, "networks": row["bytes"] / one} for row in rows]


def fitting(bank: SampleBank, nbytes: int) -> int:
    """The number of samples of a bank that fit into so many bytes, at least 1."""
    return max(1, min(len(bank), nbytes * len(bank) // bank.nbytes))


def figures(probs: Probabilities, images: Images, whole: Probabilities) -> dict[str, float]:
    """Accuracy, calibration, detection of outliers; and the correlation of the model variances.

    Args:
        probs: of the candidate.
        images: that they are of.
        whole: those of the bank.
    """
    values: dict[str, Any] = dict(quality(probs.test, images.labels))
    scores = detection(probs.test, probs.outliers)
    values["auroc_entropy"] = scores["auroc/predictive_entropy"]
    if len(probs.test) > 1:
        values["auroc_mutual_information"] = scores["auroc/mutual_information"]
        variances = torch.stack([probs.model_variance, whole.model_variance])
        values["correlation"] = torch.corrcoef(variances)[0, 1]
    return {key: float(value) for key, value in values.items()}


def spread(whole: Probabilities, images: Images) -> dict[str, Any]:
    """Mean and standard deviation of the figures of random halves of a bank."""
    count = len(whole.test)
    random = torch.Generator().manual_seed(0)
    halves = [torch.randperm(count, generator=random)[: count // 2] for _ in range(HALVES)]
    found = [figures(whole.some(half), images, whole) for half in halves]
    return {
        f"halves_{key}": {
            "mean": statistics.mean(each[key] for each in found),
            "std": statistics.stdev(each[key] for each in found),
        }
        for key in FIGURES
    }


def _predict(module: Classifier, samples: Parameters, images: Images) -> Probabilities:
    return Probabilities(
        *(predict(module, samples, each) for each in (images.test, images.outliers))
    )


def _dropout(checkpoint: Path, images: Images) -> Probabilities:
    module = Classifier.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    predictor = DropoutPredictor(module, PASSES)
    return Probabilities(
        *(in_batches(predictor, each, 1000) for each in (images.test, images.outliers))
    )


def _cpu_seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.process_time()
    return run(), time.process_time() - begin


def acceptance(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Whether an APD on whitened codes takes the place of the bank, by each of its promises.

    Args:
        rows: of one bank: its own, and that of the APD.
    """
    bank, apd = rows
    accuracy, nll = bank["halves_accuracy"], bank["halves_nll"]
    return {
        "bytes": apd["networks"] <= 25,
        "seconds": apd["seconds"] <= 60,
        "accuracy": apd["accuracy"] >= accuracy["mean"] - 2 * accuracy["std"],
        "nll": apd["nll"] <= nll["mean"] + 2 * nll["std"],
        "auroc_entropy": apd["auroc_entropy"] >= bank["auroc_entropy"] - 0.01,
        "auroc_mutual_information": apd["auroc_mutual_information"]
        >= bank["auroc_mutual_information"] - 0.01,
        "correlation": apd["correlation"] >= 0.95,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Means and standard deviations over the seeds."""
    keys = ("networks", *FIGURES, "seconds", "per_second")
    shown = Table("bank of", "posterior", "rank", *keys)
    groups: dict[tuple[str, str, int | None], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["run"], row["posterior"], row.get("rank")), []).append(row)
    for (run, posterior, rank), own in groups.items():
        cells = [_cell([row[key] for row in own if key in row]) for key in keys]
        shown.add_row(run, posterior, "" if rank is None else str(rank), *cells)
    return shown


def _cell(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4g}{deviation}" if values else ""
