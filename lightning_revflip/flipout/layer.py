"""What all flipout layers share: parameters of the perturbation, drawing, conversion."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_revflip.flipout.draw import Draw
from lightning_revflip.flipout.noise import NoiseSource, composing, derive
from lightning_revflip.flipout.noise_checks import check_repeatable, check_symmetric
from lightning_revflip.flipout.perturbations import Gaussian, Perturbation

Estimator = Literal["flipout", "local_reparameterization", "shared"]
Mode = Literal["flipout", "shared", "mean"]

ESTIMATORS = get_args(Estimator)

Shared = MutableMapping[nn.Parameter, list[nn.Parameter]]
"""Spread parameters by their weight, by which tied weights share them."""


class PerturbedWeight(NamedTuple):
    """A weight and the parameters of its perturbation."""

    name: str
    mean: Tensor
    spread: list[Tensor]


class Sampling(NamedTuple):
    """How a layer draws within a `sampling` context."""

    mode: Mode
    source: NoiseSource
    seeds: dict[str, int]
    """Seed of each perturbed weight, in the mode `shared`."""


class PerturbedLayer(nn.Module):
    """Base of layers whose weights are perturbed; mixed in before the nn class they replace.

    In training each call draws anew, by the estimator; in `eval()` the layer computes with its
    mean weights. `sampling` changes either. Perturbed weights keep their names, so that plain
    checkpoints load; the parameters of the perturbation are called `<weight>_<name>`, for example
    `weight_rho`.
    """

    supports_local_reparameterization: ClassVar[bool] = False

    perturbation: Perturbation
    estimator: Estimator
    base_perturbations: int

    def _perturb(
        self,
        perturbation: Perturbation | None,
        estimator: Estimator,
        base_perturbations: int,
        shared: Shared | None = None,
    ) -> None:
        """Make a layer that has all weights a perturbed one."""
        perturbation = Gaussian() if perturbation is None else perturbation
        self._check_settings(perturbation, estimator, base_perturbations)
        self.perturbation = perturbation
        self.estimator = estimator
        self.base_perturbations = base_perturbations
        self.noise_source = NoiseSource()
        self._sampling: Sampling | None = None
        self._register_spread({} if shared is None else shared)

    @classmethod
    def _check_settings(
        cls, perturbation: Perturbation, estimator: Estimator, base_perturbations: int
    ) -> None:
        """Raise a ValueError for settings that do not fit together."""
        name = cls.__name__
        if not isinstance(perturbation, Perturbation):
            raise ValueError(
                f"{name} needs a Perturbation such as Gaussian(), got a "
                f"{type(perturbation).__name__}."
            )
        check_repeatable(perturbation)
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}.")
        if type(base_perturbations) is not int or base_perturbations < 1:
            raise ValueError(
                f"base_perturbations must be a whole number from 1, got {base_perturbations!r}."
            )
        if estimator == "flipout":
            check_symmetric(perturbation)
        elif base_perturbations != 1:
            raise ValueError(
                f"base_perturbations={base_perturbations} needs estimator='flipout', got "
                f"{estimator!r}, which has no base perturbation to choose several of."
            )
        if estimator == "local_reparameterization":
            if not cls.supports_local_reparameterization:
                raise ValueError(
                    f"{name} has no local reparameterization: its weights are used at several "
                    "places of an example, whose outputs are not independent. Use "
                    "estimator='flipout'."
                )
            if not perturbation.is_gaussian:
                raise ValueError(
                    "local reparameterization draws sums of normal numbers, and the noise of "
                    f"{type(perturbation).__name__} is not normal. Use estimator='flipout', or "
                    "Gaussian() or MultiplicativeGaussian()."
                )

    # --- perturbed weights -------------------------------------------------------------------

    @staticmethod
    def names_to_perturb(module: nn.Module, **arguments: Any) -> Sequence[str]:
        """Names of the weights of a plain layer that a flipout layer in its place perturbs.

        Args:
            module: the plain layer.
            arguments: of this class alone, as for `upgrade`.
        """
        return ("weight",)

    def perturbed_names(self) -> Sequence[str]:
        """Names of the weights that are perturbed."""
        return ("weight",)

    def spread(self, name: str) -> list[Tensor]:
        """The parameters of the perturbation of a weight.

        Args:
            name: of the weight.
        """
        return [getattr(self, f"{name}_{suffix}") for suffix in self.perturbation.spread_names]

    def perturbed_weights(self) -> Iterator[PerturbedWeight]:
        """All perturbed weights."""
        for name in self.perturbed_names():
            yield PerturbedWeight(name, getattr(self, name), self.spread(name))

    def _register_spread(self, shared: Shared) -> None:
        for name in self.perturbed_names():
            mean: nn.Parameter = getattr(self, name)
            if mean not in shared:
                initial = self._initial_spread(mean)
                shared[mean] = [nn.Parameter(value, mean.requires_grad) for value in initial]
            pairs = zip(self.perturbation.spread_names, shared[mean], strict=True)
            for suffix, parameter in pairs:
                self.register_parameter(f"{name}_{suffix}", parameter)

    def _initial_spread(self, mean: Tensor) -> list[Tensor]:
        """What the perturbation says, checked."""
        names = self.perturbation.spread_names
        initial = self.perturbation.initial_spread(mean.detach())
        if [value.shape for value in initial] != [mean.shape] * len(names):
            shapes = ", ".join(str(tuple(value.shape)) for value in initial) or "none"
            raise ValueError(
                f"{type(self.perturbation).__name__}.initial_spread must return a tensor in the "
                f"shape of the weight, {tuple(mean.shape)}, for each of spread_names={names}; got "
                f"{shapes}."
            )
        return initial

    def reset_parameters(self) -> None:
        """Draw weights as the plain layer does, and set the spread to its initial value."""
        super().reset_parameters()  # type: ignore[misc]
        if "noise_source" not in vars(self):
            return  # the plain layer is being made, there is no spread yet
        with torch.no_grad():
            for weight in self.perturbed_weights():
                initial = self._initial_spread(weight.mean)
                for parameter, value in zip(weight.spread, initial, strict=True):
                    parameter.copy_(value)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load also what a plain layer saved: spread parameters then stay as they are."""
        names = [
            f"{prefix}{name}_{suffix}"
            for name in self.perturbed_names()
            for suffix in self.perturbation.spread_names
        ]
        if not any(name in state_dict for name in names):
            own = {name: getattr(self, name[len(prefix) :]).detach() for name in names}
            state_dict.update(own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # --- drawing -----------------------------------------------------------------------------

    def draws(self) -> dict[str, Draw] | None:
        """Random numbers for each perturbed weight in a call; None: compute with the means."""
        sampling = self._sampling
        if sampling is None:
            if not self.training:
                return None
            sampling = Sampling("flipout", self.noise_source, {})
            signed = self.estimator != "shared"
        elif sampling.mode == "mean":
            return None
        else:
            signed = sampling.mode == "flipout"
        seeds: Mapping[str, int | None] = sampling.seeds
        if not seeds and composing():
            seeds = dict.fromkeys(self.perturbed_names())
        elif not seeds:
            seed = sampling.source.seed()
            seeds = {
                name: derive(seed, zlib.crc32(name.encode())) for name in self.perturbed_names()
            }
        groups = self.base_perturbations if signed else 1
        return {name: Draw(seed, signed, groups) for name, seed in seeds.items()}

    # --- conversion --------------------------------------------------------------------------

    unsupported: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Relatives of the plain layer that have no flipout layer; `convert` refuses them by name."""
    bypassed: ClassVar[tuple[type[nn.Module], ...]] = (nn.MultiheadAttention,)
    """Modules that use the weights of layers in them without calling these layers."""

    @classmethod
    def check_upgrade(
        cls,
        module: nn.Module,
        *,
        perturbation: Perturbation | None = None,
        estimator: Estimator = "flipout",
        base_perturbations: int = 1,
        **arguments: Any,
    ) -> None:
        """Raise unless `upgrade` could be called with these arguments; changes nothing.

        Args:
            module: as for `upgrade`.
            perturbation: likewise.
            estimator: likewise.
            base_perturbations: likewise.
            arguments: likewise.

        Raises:
            ValueError: for settings that do not fit together, arguments that there are not, and
                weights that are no parameters.
        """
        known = inspect.signature(cls._configure).parameters
        unknown = [name for name in arguments if name not in known]
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no argument {', '.join(unknown)}. Convert layers that take "
                "other arguments by a second call with targets of their own (a second callback "
                "Flipout)."
            )
        perturbation = Gaussian() if perturbation is None else perturbation
        cls._check_settings(perturbation, estimator, base_perturbations)
        for name in cls.names_to_perturb(module, **arguments):
            if not isinstance(module._parameters.get(name), nn.Parameter):
                raise ValueError(
                    f"its {name} is no parameter (computed by weight_norm, prune or similar?), so "
                    "it cannot be perturbed. Remove that before, or choose other modules by "
                    "targets."
                )

    @classmethod
    def upgrade(
        cls,
        module: nn.Module,
        *,
        shared: Shared | None = None,
        perturbation: Perturbation | None = None,
        estimator: Estimator = "flipout",
        base_perturbations: int = 1,
        **arguments: Any,
    ) -> None:
        """Make a flipout layer of a plain one in place; its parameters stay the mean weights.

        Args:
            module: an instance of the class that this one replaces.
            shared: spread parameters that exist already, by their weight; is added to.
            perturbation: as for the constructor, like the other arguments.
            estimator: how examples of a batch are perturbed.
            base_perturbations: how many independent dW a batch gets.
            arguments: arguments of this class alone.

        Raises:
            ValueError: as `check_upgrade`, and for a weight that is tied to one with another kind
                of perturbation.
        """
        cls.check_upgrade(
            module,
            perturbation=perturbation,
            estimator=estimator,
            base_perturbations=base_perturbations,
            **arguments,
        )
        cls._check_ties(module, perturbation or Gaussian(), shared or {}, arguments)
        module.__class__ = cls
        assert isinstance(module, cls)
        module._configure(**arguments)
        module._perturb(perturbation, estimator, base_perturbations, shared)

    @classmethod
    def _check_ties(
        cls,
        module: nn.Module,
        perturbation: Perturbation,
        shared: Shared,
        arguments: Mapping[str, Any],
    ) -> None:
        """Raise if a weight is tied to one that has a perturbation with other parameters."""
        for name in cls.names_to_perturb(module, **arguments):
            spread = shared.get(getattr(module, name))
            if spread is not None and len(spread) != len(perturbation.spread_names):
                raise ValueError(
                    f"{name} is tied to a weight of another layer, whose perturbation has "
                    f"{len(spread)} parameters for each weight; {perturbation!r} has "
                    f"{len(perturbation.spread_names)}. Convert both alike, or untie them."
                )

    def _configure(self) -> None:
        """Set the arguments of this class alone."""

    @classmethod
    def shared_parameters(cls, module: nn.Module) -> dict[nn.Parameter, list[nn.Parameter]]:
        """The spread parameters of a flipout layer by their weight, for `upgrade`.

        Args:
            module: the flipout layer.
        """
        assert isinstance(module, PerturbedLayer)
        parameters: Any = {w.mean: w.spread for w in module.perturbed_weights()}
        return parameters  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """The arguments of the plain layer, the perturbation, and what is not usual."""
        text = f"{super().extra_repr()}, perturbation={self.perturbation!r}"
        if self.estimator != "flipout":
            text += f", estimator={self.estimator!r}"
        if self.base_perturbations != 1:
            text += f", base_perturbations={self.base_perturbations}"
        return text
