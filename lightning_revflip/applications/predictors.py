"""`Predictor`: one network or several whose predictions are scored and attacked alike."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from lightning_revflip.posterior.layout import Parameters
from lightning_revflip.posterior.predict import evaluating, named_tensors, softmax
from lightning_revflip.posterior.protocol import Posterior

DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


class Predictor(ABC):
    """Class probabilities of several networks for the same inputs, and their gradients.

    The module that computes with the weights returns logits, shape (batch, classes). It computes as
    in evaluation, with its own weights out of reach of gradients, and is left as it was.

    Args:
        module: computes logits of a batch of inputs.
    """

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"{type(self).__name__} computes with an nn.Module, got a {type(module).__name__}. "
                "Give the network; a posterior and its network make a "
                "PosteriorPredictor(posterior, network)."
            )
        self.module = module

    @abstractmethod
    def logits(self, inputs: Tensor) -> Iterator[Tensor]:
        """Logits of some networks at a time, shape (k, batch, classes).

        Args:
            inputs: shape (batch, ...).
        """

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Probabilities, shape (networks, batch, classes).

        Args:
            inputs: shape (batch, ...).

        Raises:
            ValueError: if the module does not return logits.
        """
        return torch.cat([softmax(_checked(logits, inputs)) for logits in self.logits(inputs)])

    def log_likelihood(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log of the mean probability of the labels, and its gradient.

        log 1/S sum_s p_s(y | x), and by x

        Networks are added up part by part in the logarithm, so that any number of them fits into
        memory and no probability is too small. Nor is one too large: where float32 rounds it to 1,
        as it does from 1 - 3e-8, the usual cross-entropy has a gradient of 0 or of rounding errors,
        which makes a confident network look robust. Here the gradient is right there too.

        Args:
            inputs: x, floating point, shape (batch, ...). Its elements must not influence each
                other.
            labels: y, int64, shape (batch,).

        Returns:
            Shape (batch,), in nats, and the shape of the inputs. Works in inference mode too.

        Raises:
            ValueError: if the module does not return logits, and for a label of no class.
        """
        total, gradient, networks = None, torch.empty(0), 0
        with torch.inference_mode(False), torch.enable_grad():
            # Clones, because a tensor made in inference mode can never have a gradient.
            x, y = inputs.detach().clone().requires_grad_(), labels.clone()
            for logits in self.logits(x):
                part = _log_likelihoods(_checked(logits, x), y).logsumexp(0)
                (slope,) = torch.autograd.grad(part.sum(), x)
                part, networks = part.detach(), networks + len(logits)
                if total is None:
                    total, gradient = part, slope
                    continue
                both = torch.logaddexp(total, part)
                gradient = _scaled(gradient, total - both) + _scaled(slope, part - both)
                total = both
        if total is None:
            raise ValueError(f"{type(self).__name__} has no networks.")
        return total - math.log(networks), gradient


class NetworkPredictor(Predictor):
    """One network, as it is.

    Examples:
        >>> predictor = NetworkPredictor(nn.Linear(4, 3))
        >>> predictor(torch.ones(8, 4)).shape
        torch.Size([1, 8, 3])
    """

    def logits(self, inputs: Tensor) -> Iterator[Tensor]:
        with evaluating(self.module):
            outputs = functional_call(self.module, _constants(self.module), (inputs,))
        yield outputs.unsqueeze(0)


class DropoutPredictor(Predictor):
    """Passes that drop units as in training: Monte Carlo dropout.

    Gal and Ghahramani (2016), arXiv 1506.02142. Every input has units of its own dropped, and every
    pass drops others, those of a gradient too: an attack sees the expectation over passes (Athalye
    et al., 2018, arXiv 1802.00420). Random numbers come from a seed of their own.

    Args:
        module: a module with layers of `DROPOUT_LAYERS`, which returns logits.
        passes: how many.
        seed: of what is dropped.

    Raises:
        ValueError: if there is no dropout, and for passes below 1.
    """

    def __init__(self, module: nn.Module, passes: int, seed: int = 0) -> None:
        super().__init__(module)
        if passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}.")
        if not _dropout(module):
            raise ValueError(
                "Monte Carlo dropout needs a network with dropout, and this one has none. Train "
                "one with dropout, or use NetworkPredictor."
            )
        self.passes = passes
        self._seeds = torch.Generator().manual_seed(seed)

    def logits(self, inputs: Tensor) -> Iterator[Tensor]:
        constants = _constants(self.module)
        for _ in range(self.passes):
            with _dropping(self.module), self._random_numbers(inputs.device):
                outputs = functional_call(self.module, constants, (inputs,))
            yield outputs.unsqueeze(0)

    @contextmanager
    def _random_numbers(self, device: torch.device) -> Iterator[None]:
        """Torch's global generators, which dropout draws from, at a seed; restored afterwards."""
        seed = int(torch.randint(2**62, (), generator=self._seeds))
        if device.type == "cpu":
            with torch.random.fork_rng([]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed is 300 times slower
                yield
            return
        with torch.random.fork_rng([device], device_type=device.type):
            torch.get_device_module(device).manual_seed(seed)
            yield


class PosteriorPredictor(Predictor):
    """Samples of a posterior, drawn once: predictions and attacks are about the same networks.

    Args:
        posterior: a bank of samples, a Gaussian fitted to it, a distilled generator.
        module: of the architecture that the samples are of; returns logits.
        n: number of samples, all in memory; None: `len(posterior)`.
        chunk_size: samples that `torch.func.vmap` computes at a time. A module that it cannot run
            (nn.LSTM, control flow that depends on data) is computed sample by sample.
        generator: to draw samples from, see `Posterior.sample`.

    Raises:
        ValueError: for n or chunk_size below 1, and samples of another architecture.
        TypeError: for what is no posterior, or no module.
    """

    def __init__(
        self,
        posterior: Posterior,
        module: nn.Module,
        n: int | None = None,
        *,
        chunk_size: int = 25,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(module)
        if not isinstance(posterior, Posterior):
            raise TypeError(
                "PosteriorPredictor takes a Posterior and then its network, got a "
                f"{type(posterior).__name__} first. Samples on the disk are read by "
                "SampleBank(path), a distilled posterior by DistilledPosterior.load(path)."
            )
        for name, value in {"n": n, "chunk_size": chunk_size}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        posterior.check_module(module)
        self.chunk_size = chunk_size
        with torch.inference_mode(False), torch.no_grad():
            count = len(posterior) if n is None else n
            self.samples: Parameters = posterior.sample(count, generator)

    def logits(self, inputs: Tensor) -> Iterator[Tensor]:
        own = named_tensors(self.module)
        self.samples = {  # where and how the module computes, from the first time on
            name: value.to(own[name].device, own[name].dtype)
            for name, value in self.samples.items()
        }
        constants = _constants(self.module, replaced=self.samples)
        count, done = len(next(iter(self.samples.values()))), 0
        while done < count:
            end = min(done + self.chunk_size, count)
            chunk = {name: value[done:end] for name, value in self.samples.items()}
            yield self._several(constants, chunk, inputs)
            done = end

    def _several(self, constants: dict[str, Tensor], chunk: Parameters, inputs: Tensor) -> Tensor:
        """Logits of a chunk, by vmap where that can run the module."""

        def one(sample: Parameters) -> Tensor:
            outputs: Tensor = functional_call(self.module, {**constants, **sample}, (inputs,))
            return outputs

        count = len(next(iter(chunk.values())))
        with evaluating(self.module):
            # Under vmap some operations, such as linear, ignore autocast.
            if self.chunk_size > 1 and not torch.is_autocast_enabled(inputs.device.type):
                try:
                    together: Tensor = vmap(one)(chunk)
                    return together
                except RuntimeError:  # what vmap and a full memory raise
                    self.chunk_size = 1
            singles = ({name: value[i] for name, value in chunk.items()} for i in range(count))
            return torch.stack([one(sample) for sample in singles])


def check_predictor(value: object, name: str) -> None:
    """Raise unless this is a predictor, and say how one is made.

    Args:
        value: what a function got.
        name: of its argument.

    Raises:
        TypeError: naming the predictor that was probably meant.
    """
    if isinstance(value, Predictor):
        return
    if isinstance(value, Posterior):
        advice = "Give PosteriorPredictor(posterior, network), with the network that was sampled."
    elif isinstance(value, nn.Module):
        advice = (
            "Give NetworkPredictor(network) for the network as it is, DropoutPredictor(network, "
            "passes) for Monte Carlo dropout, or PosteriorPredictor(posterior, network) for "
            "samples of its weights."
        )
    else:
        advice = (
            "Give a NetworkPredictor, DropoutPredictor, PosteriorPredictor, or a subclass of "
            "Predictor of your own."
        )
    raise TypeError(f"{name} must be a Predictor, got a {type(value).__name__}. {advice}")


def in_batches(predict: Predictor, inputs: Tensor, batch_size: int) -> Tensor:
    """Probabilities of many inputs, some at a time, on the device of the module.

    Args:
        predict: whose predictions.
        inputs: shape (N, ...), on any device.
        batch_size: inputs at a time.

    Returns:
        Shape (networks, N, classes), on the CPU.
    """
    device = device_of(predict.module)
    parts = (predict(x.to(device)).cpu() for x in batches(inputs, batch_size))
    return torch.cat(list(parts), dim=1)


def batches(values: Tensor, size: int) -> Iterator[Tensor]:
    """The rows of a tensor, at most `size` at a time."""
    return (values[start : start + size] for start in range(0, len(values), size))


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes; the CPU if it has no tensors."""
    return next((value.device for value in named_tensors(module).values()), torch.device("cpu"))


def _constants(module: nn.Module, replaced: Iterable[str] = ()) -> dict[str, Tensor]:
    """The module's tensors, each by one name, as tensors that no gradient reaches.

    Those that are replaced are left out, with all names that they have.
    """
    own = named_tensors(module)
    seen = {id(own[name]) for name in replaced}
    constants = {}
    for name, value in own.items():
        if id(value) not in seen:
            seen.add(id(value))
            constants[name] = value.detach().clone() if value.is_inference() else value.detach()
    return constants


def _checked(logits: Tensor, inputs: Tensor) -> Tensor:
    if logits.dim() != 3 or logits.shape[1] != len(inputs):
        raise ValueError(
            f"the module must return logits of the shape (batch, classes), with a batch of "
            f"{len(inputs)}, got {tuple(logits.shape[1:])}."
        )
    return logits


def _log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels, shape (k, batch), by log sigmoid(z_y - log sum exp z_other).

    Unlike in log softmax, 1 - p is never a difference of rounded numbers.
    """
    classes = logits.shape[-1]
    if labels.dtype != torch.int64 or labels.shape != logits.shape[1:2]:
        raise ValueError(
            f"labels must be int64, of the shape ({logits.shape[1]},), got {labels.dtype}, "
            f"{tuple(labels.shape)}."
        )
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, as the module has {classes} classes, got "
            f"{int(labels.min())} to {int(labels.max())}."
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = labels.expand(len(logits), -1).unsqueeze(-1)
    own = logits.gather(-1, index).squeeze(-1)
    others = logits.scatter(-1, index, -math.inf).logsumexp(-1)
    return F.logsigmoid(own - others)


def _scaled(gradient: Tensor, log_factor: Tensor) -> Tensor:
    """Gradients times the exponential of a number each."""
    factor = log_factor.exp().to(gradient.dtype)
    return gradient * factor.view(-1, *[1] * (gradient.dim() - 1))


def _dropout(module: nn.Module) -> list[nn.Module]:
    return [each for each in module.modules() if isinstance(each, DROPOUT_LAYERS) and each.p > 0]


@contextmanager
def _dropping(module: nn.Module) -> Iterator[None]:
    """In this context dropout layers drop units; all other layers compute as in evaluation."""
    with evaluating(module):
        for layer in _dropout(module):
            layer.training = True
        try:
            yield
        finally:
            for layer in _dropout(module):
                layer.training = False
