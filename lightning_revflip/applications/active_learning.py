"""Active learning: the posterior says which labels would help most, round by round."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_revflip.applications.acquisition import ACQUISITIONS, Acquisition
from lightning_revflip.applications.pool import Pool
from lightning_revflip.applications.predictors import check_predictor
from lightning_revflip.posterior.files import write_file

Predictive = Callable[[Tensor], Tensor]
"""Class probabilities (samples, examples, classes) of inputs (examples, ...)."""

Train = Callable[[Tensor, Tensor, int], Predictive]
"""Trains a new model on inputs (examples, ...) and labels (examples,), with a seed."""

_VERSION = 1


@dataclass(frozen=True)
class Round:
    """What a round found.

    Attributes:
        num_labelled: number of labels that the model was trained on.
        accuracy: of the mean prediction on each set of `evaluate`, by name; empty if the round was
            not measured.
        acquired: the examples that were labelled next.
    """

    num_labelled: int
    accuracy: dict[str, float]
    acquired: list[int]


class ActiveLearning:
    """Trains on few labels, asks for those it is least sure of, and begins anew with more.

    A round trains a new model on all labels so far, measures it, and labels further examples: those
    that the acquisition function picks among unlabelled candidates (Houlsby et al., 2011; Gal et
    al., 2017, arXiv 1703.02910). Nothing of a model remains for the next round.

    All random numbers of a round follow from `seed` and the number of the round. With `path`, the
    state is written after each round, and a process that was killed goes on after the last finished
    round with the same numbers, as far as `train` computes the same for the same seed.

    Args:
        train: makes and trains a model, and returns what it predicts; see `LightningTraining` for
            any LightningModule. It is always that of the end of training: to choose among epochs,
            give it validation data of its own.
        inputs: of all examples of the pool, shape (size, ...).
        labels: their classes, int64, shape (size,); only those of labelled examples are used.
        pool: which examples are labelled at first.
        acquisition: `random`, a name in `ACQUISITIONS`, or a function.
        labels_per_round: number of examples to label after each round.
        num_candidates: so many unlabelled examples, drawn at random in each round, can be
            picked; None: all of them.
        evaluate: inputs and labels by name, of which rounds note the accuracy.
        evaluate_every: measure the first of every so many rounds. With `random`, the others train
            nothing.
        batch_size: number of inputs that are predicted at a time.
        seed: of all rounds.
        path: file of the state, JSON; if it is there already, goes on from it.

    Raises:
        ValueError: for arguments that do not fit each other, and for a file of other settings.

    Examples:
        >>> from lightning_revflip.applications import ActiveLearning, Pool
        >>> inputs, labels = (
        ...     torch.tensor([[-2.0], [2], [-1], [1], [0]]),
        ...     torch.tensor([0, 1] * 2 + [1]),
        ... )
        >>> def train(inputs, labels, seed):
        ...     centres = torch.stack([inputs[labels == label].mean(0) for label in (0, 1)])
        ...     return lambda x: (-(x - centres.T).abs()).softmax(-1).unsqueeze(0)
        >>> learner = ActiveLearning(
        ...     train, inputs, labels, Pool(5, [0, 1]), acquisition="entropy", labels_per_round=1
        ... )
        >>> learner.run(1)[0].acquired  # the one between the classes
        [4]
    """

    def __init__(
        self,
        train: Train,
        inputs: Tensor,
        labels: Tensor,
        pool: Pool,
        *,
        acquisition: str | Acquisition = "bald",
        labels_per_round: int = 10,
        num_candidates: int | None = None,
        evaluate: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        evaluate_every: int = 1,
        batch_size: int = 1000,
        seed: int = 0,
        path: str | PathLike[str] | None = None,
    ) -> None:
        if not len(inputs) == len(labels) == pool.size:
            raise ValueError(
                "there must be one input and one label for each example of the pool, got "
                f"{len(inputs)} inputs and {len(labels)} labels for a pool of {pool.size}."
            )
        if not len(pool.labelled):
            raise ValueError("the pool has no label to start with. See Pool.balanced.")
        if isinstance(acquisition, str) and acquisition not in ("random", *ACQUISITIONS):
            known = ", ".join(("random", *ACQUISITIONS))
            raise ValueError(f"acquisition must be one of {known}, got {acquisition!r}.")
        numbers = {
            "labels_per_round": labels_per_round,
            "evaluate_every": evaluate_every,
            "batch_size": batch_size,
        }
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        if num_candidates is not None and num_candidates < labels_per_round:
            raise ValueError(
                f"{labels_per_round} labels a round cannot be picked from num_candidates="
                f"{num_candidates}."
            )
        self.train = train
        self.inputs = inputs
        self.labels = labels
        self.pool = pool
        self.acquisition = acquisition
        self.labels_per_round = labels_per_round
        self.num_candidates = num_candidates
        self.evaluate = dict(evaluate or {})
        self.evaluate_every = evaluate_every
        self.batch_size = batch_size
        self.seed = seed
        self.path = None if path is None else Path(path)
        self.rounds: list[Round] = []
        """The rounds so far."""
        self._initial = pool.labelled.tolist()
        self._checksum = _checksum(inputs, labels)
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def run(self, rounds: int, report: Callable[[Round], object] | None = None) -> list[Round]:
        """Go on until there were so many rounds, those before a restart included.

        Args:
            rounds: number of rounds.
            report: is called with each new round; None: nothing.

        Returns:
            All rounds.

        Raises:
            ValueError: before anything is trained, if the pool has too few examples for that.
        """
        missing = rounds - len(self.rounds)
        self.pool.check_remaining(max(0, missing) * self.labels_per_round)
        for _ in range(missing):
            found = self.step()
            if report is not None:
                report(found)
        return self.rounds

    def step(self) -> Round:
        """One round: train, measure, label.

        Raises:
            ValueError: before anything is trained, if the pool runs out; afterwards, for
                predictions of another shape.
            TypeError: if `train` returns something that does not predict.
        """
        self.pool.check_remaining(self.labels_per_round)
        generator = torch.Generator().manual_seed((self.seed << 20) + len(self.rounds))
        seed = int(torch.randint(2**32, (), generator=generator))
        measured = len(self.rounds) % self.evaluate_every == 0
        labelled, accuracy = self.pool.labelled, {}
        if measured or self.acquisition != "random":
            predict = self.train(self.inputs[labelled], self.labels[labelled], seed)
        if measured:
            accuracy = {name: self._accuracy(predict, *of) for name, of in self.evaluate.items()}
        if self.acquisition == "random":
            acquired = self.pool.draw(self.labels_per_round, generator)
        else:
            acquired = self._acquire(predict, generator)
        self.pool.label(acquired)
        self.rounds.append(Round(len(labelled), accuracy, acquired.tolist()))
        if self.path is not None:
            self._save(self.path)
        return self.rounds[-1]

    def _acquire(self, predict: Predictive, generator: torch.Generator) -> Tensor:
        """The examples to label, by what is predicted for them."""
        found = self.acquisition
        acquire = ACQUISITIONS[found] if isinstance(found, str) else found
        count = self.num_candidates or self.pool.num_unlabelled
        candidates = self.pool.draw(min(count, self.pool.num_unlabelled), generator)
        probs = self._predict(predict, self.inputs[candidates])
        picked = acquire(probs, self.labels_per_round, generator)
        if len(picked) != self.labels_per_round:
            raise ValueError(
                f"the acquisition function must pick {self.labels_per_round} candidates, got "
                f"{len(picked)}."
            )
        return candidates[picked]

    def _accuracy(self, predict: Predictive, inputs: Tensor, labels: Tensor) -> float:
        classes = self._predict(predict, inputs).mean(0).argmax(-1)
        return (classes == labels.cpu()).double().mean().item()

    def _predict(self, predict: Predictive, inputs: Tensor) -> Tensor:
        """Probabilities on the CPU, shape (samples, examples, classes)."""
        _check_predicts(predict)
        parts = [predict(part) for part in torch.split(inputs, self.batch_size)]
        if any(part.dim() != 3 for part in parts):
            raise ValueError(
                "what `train` returns must predict probabilities of the shape (samples, examples, "
                f"classes), got {tuple(parts[0].shape)}. A network makes a "
                "NetworkPredictor(network)."
            )
        return torch.cat([part.cpu() for part in parts], dim=1)

    # --- state -------------------------------------------------------------------------------

    @property
    def _settings(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        found = self.acquisition
        return {
            "acquisition": found if isinstance(found, str) else getattr(found, "__name__", "?"),
            "labels_per_round": self.labels_per_round,
            "num_candidates": self.num_candidates,
            "evaluate": {name: len(labels) for name, (_, labels) in self.evaluate.items()},
            "evaluate_every": self.evaluate_every,
            "seed": self.seed,
            "pool_size": self.pool.size,
            "data_checksum": self._checksum,
            "labelled_at_first": self._initial,
        }

    def _save(self, path: Path) -> None:
        state = {
            "version": _VERSION,
            "settings": self._settings,
            "rounds": [asdict(each) for each in self.rounds],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(state, indent=1).encode())

    def _load(self, path: Path) -> None:
        try:
            state = json.loads(path.read_bytes())
            version, settings = state["version"], state["settings"]
            rounds = [Round(**each) for each in state["rounds"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged, or not the state of active learning ({error!r}). Choose "
                "another file, or remove it to begin anew."
            ) from error
        if version != _VERSION:
            raise ValueError(f"{path} has version {version}, expected {_VERSION}.")
        for name, value in self._settings.items():
            if settings.get(name) != value:
                raise ValueError(
                    f"{path} is of a run with {name}={settings.get(name)}, but now it is {value}. "
                    "Use the same settings to go on, or another file to begin anew."
                )
        for each in rounds:
            self.pool.label(each.acquired)
        self.rounds = rounds


def _check_predicts(trained: object) -> None:
    """Raise for what cannot predict without more, such as a bank of samples."""
    if not callable(trained):
        check_predictor(trained, "what `train` returns")


def _checksum(*tensors: Tensor) -> int:
    """CRC-32 of the values of some tensors."""
    found = 0
    for each in tensors:
        found = zlib.crc32(each.detach().cpu().contiguous().numpy().data, found)
    return found
