"""A network that answers for samples of its weights while a Trainer evaluates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_revflip.callbacks._mixing import Mixing, measure
from lightning_revflip.callbacks._network import part_of
from lightning_revflip.posterior import (
    Parameters,
    SampleBank,
    mutual_information,
    predict,
    predictive_entropy,
)
from lightning_revflip.sgld import ParallelChains, log_mean_softmax

Combine = Callable[[Tensor], Tensor]

_FEW_EXAMPLES = 16


class EnsembleEvaluation:
    """Lets calls of a network return the combined outputs of an ensemble, and watches them.

    Args:
        bank: samples.
        pl_module: the model, as it was sampled.
        path: of the network in it; None: the model itself. Its `forward` is replaced until `remove`
            is called.
        count: number of samples of the ensemble, spread evenly over the bank.
        combine: makes one output of those of the samples, (samples, batch, ...) to (batch, ...).
    """

    def __init__(
        self,
        bank: SampleBank,
        pl_module: LightningModule,
        path: str | None,
        count: int,
        combine: Combine,
    ) -> None:
        self._bank = bank
        self._path = path
        self._place = place = part_of(pl_module, path)
        self._call = _Network(place.network(0) if isinstance(place, ParallelChains) else place)
        self._samples = self._of_network(bank.sample(count))
        self._combine = combine
        self.calls = 0
        """How often the network was called."""
        self._arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
        self._entropy = self._information = 0.0
        self._predictions = 0
        self._previous = vars(place).get("forward")
        self._original = place.forward
        self._plain = False
        place.forward = self._forward

    def _of_network(self, samples: Parameters) -> Parameters:
        """What belongs to the network, by the names in `_Network`."""
        prefix = "" if self._path is None else f"{self._path}."
        return {
            f"network.{name.removeprefix(prefix)}": values
            for name, values in samples.items()
            if name.startswith(prefix)
        }

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._plain:
            return self._original(*args, **kwargs)
        if self.calls == 0:
            self._arguments = args, kwargs
        self.calls += 1
        with self._own_weights():
            outputs = predict(self._call, self._samples, (args, kwargs), transform=None)
        if self._combine is log_mean_softmax:  # outputs are logits
            self._watch(outputs.float().softmax(-1).view(len(outputs), -1, outputs.shape[-1]))
        return self._combine(outputs)

    def _watch(self, probabilities: Tensor) -> None:
        self._entropy += float(predictive_entropy(probabilities).sum())
        self._information += float(mutual_information(probabilities).sum())
        self._predictions += probabilities.shape[1]

    @contextmanager
    def _own_weights(self) -> Iterator[None]:
        """Meanwhile the network computes as if it had not been replaced."""
        self._plain = True
        try:
            yield
        finally:
            self._plain = False

    def outputs(self, samples: Parameters) -> Tensor:
        """Outputs for a few examples of the first call, of samples of the whole model."""
        args, kwargs = self._arguments
        few = tuple(map(_few, args)), {name: _few(each) for name, each in kwargs.items()}
        own = self._of_network(samples)
        with self._own_weights():
            try:
                return predict(self._call, own, few, transform=None)
            except (RuntimeError, IndexError):  # the first dimension is not that of examples
                return predict(self._call, own, self._arguments, transform=None)

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> Mixing | None:
        """Log means over all predictions, and the diagnostics of the bank, which are returned."""
        if self.calls == 0:
            rank_zero_warn(
                f"SGLDSampler: the evaluation did not call {self._path or 'the module itself'}, so "
                "it was that of the current weights alone. Give SGLDSampler(network=...) the part "
                "of the module that the steps call."
            )
            return None
        mixing = measure(self._bank, self.outputs)
        values = {} if mixing is None else mixing.metrics()
        if self._predictions > 0:
            values["entropy"] = self._entropy / self._predictions
            values["mutual_information"] = self._information / self._predictions
        if not trainer.barebones:
            logged = {f"sgld/{name}": value for name, value in values.items()}
            pl_module.log_dict(logged, batch_size=1, sync_dist=True)
        return mixing

    def remove(self) -> None:
        """Let the network answer for its own weights from now on."""
        if self._previous is None:
            vars(self._place).pop("forward", None)
        else:
            self._place.forward = self._previous


class _Network(nn.Module):
    """Calls a network with keyword arguments as well, and requires a tensor of it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        output = self.network(*args, **kwargs)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{type(self.network).__name__} returns a {type(output).__name__}, and outputs of "
                "samples can be combined only if they are one tensor. Choose with "
                "SGLDSampler(network=...) a part of the module that returns one, or evaluate the "
                "current weights: eval_samples=0."
            )
        return output


def _few(argument: Any) -> Any:
    return argument[:_FEW_EXAMPLES] if isinstance(argument, Tensor) and argument.dim() else argument
