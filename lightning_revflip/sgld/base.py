"""What the samplers share: a torch optimizer whose steps have noise.

All of them sample from exp(-U / T), where U is the negative logarithm of the posterior given N
examples, up to a constant:

    U(theta) = N L(theta) + prior_precision / 2 |theta|^2

with the mean loss L that a training step returns, and the temperature T. T = 1 is the posterior of
Bayes, T < 1 a cold one (Wenzel et al., 2020, arXiv 2002.02405). N and T are explicit, so that what
is sampled depends neither on the batch size nor on a noise scale tuned by hand.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lightning_revflip.sgld import native
from lightning_revflip.sgld.checks import check_gradients, check_group, check_parameters
from lightning_revflip.sgld.flat import flat_view
from lightning_revflip.sgld.noise import NoiseSource, normal


@dataclass
class Moving:
    """What a step moves: parameters of a group, of one dtype and device, or one flat tensor.

    Attributes:
        group: settings.
        params: to be changed in place.
        grads: of the mean loss; to be read only.
        states: lists of tensors by name, to be changed in place.
        steps: how many steps each of `params` has taken before.
        seed: of the noise; None at temperature 0.
    """

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: dict[str, list[Tensor]]
    steps: list[int]
    seed: int | None

    def flatten(self) -> None:
        """Make one tensor of each list, by moving parameters and states, and copying gradients."""
        self.params = [flat_view(self.params)]
        self.grads = [torch.cat([each.reshape(-1) for each in self.grads])]
        self.states = {name: [flat_view(tensors)] for name, tensors in self.states.items()}
        self.steps = self.steps[:1]

    def noise(self) -> list[Tensor] | None:
        """Standard normal numbers for each of `params`, if there is noise."""
        return None if self.seed is None else normal(self.params, self.seed)


class LangevinOptimizer(Optimizer):
    """A sampler of the posterior with the interface of a torch optimizer.

    Settings stand in `param_groups`: groups may differ, and learning rate schedules work. Gradients
    are read and never modified. Parameters without a gradient stay where they are.

    Args:
        params: parameters or groups of them, in float32 or float64.
        lr: step size.
        num_data: number N of training examples.
        temperature: T; 0 leaves out the noise.
        prior_precision: 1 / variance of a Gaussian prior with mean 0 over each weight.
        flat: where steps are not compiled, move the parameters of each group into one piece of
            memory, so that a step takes few operations however many they are.
        generator: CPU generator of the noise, whose state is part of `state_dict`. None: one that
            starts from a draw of torch's global generator.
        settings: further ones of a sampler.

    Raises:
        ValueError: for settings out of range, and parameters that cannot be sampled; in a step, for
            sparse gradients.
        TypeError: for settings that the sampler does not have.
    """

    state_names: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that are kept for each parameter; they start at 0."""
    setting_names: ClassVar[tuple[str, ...]] = ()
    """Names of the settings that only this sampler has."""

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        num_data: int,
        temperature: float = 1.0,
        prior_precision: float = 0.0,
        flat: bool = False,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> None:
        if unknown := set(settings) - set(self.setting_names):
            raise TypeError(
                f"{type(self).__name__} got an unexpected argument: {', '.join(sorted(unknown))}."
            )
        self._flat = flat
        self._noise = NoiseSource(generator)
        defaults = {
            "lr": lr,
            "num_data": num_data,
            "temperature": temperature,
            "prior_precision": prior_precision,
            **settings,
        }
        super().__init__(params, defaults)

    @property
    def generator(self) -> torch.Generator:
        """The generator of the noise."""
        return self._noise.generator

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            check_parameters(self.param_groups[-1]["params"], self._flat)
        except ValueError:
            del self.param_groups[-1]
            raise

    # --- steps -------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: computes the loss and its gradients; optional.

        Returns:
            The loss that the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            check_gradients(group["params"])
        for group in self.param_groups:
            moving = [each for each in group["params"] if each.grad is not None]
            for kind in dict.fromkeys((each.dtype, each.device) for each in moving):
                params = [each for each in moving if (each.dtype, each.device) == kind]
                self.update(self._gather(group, params))
        return loss

    def _gather(self, group: dict[str, Any], params: list[Tensor]) -> Moving:
        grads = [each.grad for each in params if each.grad is not None]
        own = [self._state_of(each) for each in params]
        states = {name: [state[name] for state in own] for name in self.state_names}
        steps = [state["step"] for state in own]
        for state in own:
            state["step"] += 1
        seed = self._noise.seed() if group["temperature"] > 0 else None
        moving = Moving(group, params, grads, states, steps, seed)
        if (
            self._flat
            and len(params) == len(group["params"])
            and len(set(steps)) == 1
            and not native.takes(params, grads, *states.values())
        ):
            moving.flatten()
        return moving

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            state["step"] = 0
            for name in self.state_names:
                state[name] = torch.zeros_like(param, memory_format=torch.contiguous_format)
        return state

    @abstractmethod
    def update(self, moving: Moving) -> None:
        """Change parameters and states of some parameters by one step; a sampler defines this.

        Args:
            moving: what to move, and what by; `moving.noise()` draws.
        """

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, with the state of the generator."""
        return {**super().state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a sampler of the same class was.

        Args:
            state_dict: what its `state_dict` returned.

        Raises:
            ValueError: for the state of another optimizer.
        """
        missing = set(self.defaults) - set(state_dict["param_groups"][0])
        known = {"step", *self.state_names}
        foreign = [name for each in state_dict["state"].values() for name in each.keys() - known]
        if missing or foreign or "generator" not in state_dict:
            lacking = ", ".join(sorted(missing)) or "the generator of the noise"
            found = f"it holds {foreign[0]}" if foreign else f"it lacks {lacking}"
            raise ValueError(
                f"this is not the state of {type(self).__name__}: {found}. To sample "
                "from the weights of another training, load these alone and begin with a new "
                "optimizer."
            )
        super().load_state_dict(state_dict)
        self.generator.set_state(state_dict["generator"].cpu())

    # Generators cannot be copied; a copy of a sampler goes on where the original is.
    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {**state, "flat": self._flat, "generator": self.generator.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "generator" in state:  # else called by `load_state_dict`
            state = dict(state)
            self._flat = state.pop("flat")
            self._noise = NoiseSource(torch.Generator().set_state(state.pop("generator")))
        super().__setstate__(state)
