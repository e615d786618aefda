r"""Evolution strategies with flipout: the gradient of a smoothed function from its values alone.

Of a function F and parameters theta, evolution strategies (Salimans et al., 2017, arXiv 1703.03864)
follow the gradient of E_e[F(theta + sigma e)], e ~ N(0, 1), which is E_e[F(theta + sigma e) e] /
sigma. It is estimated from members n, each perturbed by its own dW_n = sigma e_n. Flipout makes
many members from few perturbations dW_m and signs (Wen et al., 2018, arXiv 1803.04386),

    dW_n = dW_m * (r_n s_n^T)
    gradient = 1 / (N sigma^2) * sum_m (R_m^T diag(F_m) S_m) * dW_m

so that all of them are evaluated in one batch, and the estimate is one matrix product for each
layer; N counts the members of all M base perturbations together. No member is ever formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_revflip.flipout.evolution.fitness import SHAPINGS, Shaping, shape_fitness
from lightning_revflip.flipout.evolution.noise import (
    PerturbedParameter,
    PopulationNoise,
    estimate,
    perturbation,
)
from lightning_revflip.flipout.evolution.parameters import (
    MEMBER_LAYERS,
    Targets,
    perturbed_modules,
)
from lightning_revflip.flipout.evolution.population import Population
from lightning_revflip.flipout.evolution.processes import gather_fitness, sum_over_processes
from lightning_revflip.flipout.evolution.rows import Rows
from lightning_revflip.flipout.evolution.settings import (
    check_examples,
    check_sigma,
    check_whole,
)
from lightning_revflip.flipout.noise import NoiseSource, derive

T = TypeVar("T")


class FlipoutES:
    """A population of perturbed copies of a model, which exist only as rows of a batch.

    Within `members` the layers of the model compute each row with the weights of its member. All
    parameters that require a gradient are perturbed; those of nn.Linear, nn.Conv1d to nn.Conv3d,
    nn.Embedding, nn.LSTM and nn.GRU can be. Layers must be called to take part: the perturbation
    of a weight that the model reads itself, as `F.linear(x, self.embedding.weight)` does, is missed
    there.

    Fitness is maximised: `gradient` writes minus the estimate to `.grad`, for any optimizer that
    minimises. Whatever an optimizer does to the parameters by itself, such as weight decay, it does
    here as ever.

    Args:
        model: an ordinary model, which this does not change.
        sigma: standard deviation of the perturbation of each parameter.
        population: number of members.
        base_perturbations: how many independent dW they are made from. More have less variance,
            and cost a weight's worth of noise each.
        antithetic: members come in pairs that are perturbed in opposite directions; what is even
            in the perturbation, such as a constant, then cancels.
        shaping: what the fitness of a member counts, see `shape_fitness`.
        targets: glob patterns of the names of modules, or module types, whose own parameters are
            perturbed; those of other modules stay as they are. None: all modules.
        seed: all random numbers follow from it and from `generation`; None draws one from torch's
            global generator.

    Raises:
        ValueError: for settings that do not fit together, and for parameters that cannot be
            perturbed, naming them.

    Examples:
        >>> model, target = nn.Linear(3, 1, bias=False), torch.tensor([[1.0, -2.0, 0.5]])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        >>> es = FlipoutES(model, sigma=0.05, population=64, shaping="none", seed=0)
        >>> for _ in range(60):
        ...     with es.members():
        ...         rows = model(es.repeat(torch.eye(3)))
        ...     fitness = -(rows.view(64, 3) - target).square().sum(1)
        ...     _ = es.gradient(fitness)
        ...     optimizer.step()
        ...     es.next_generation()
        >>> torch.allclose(model.weight, target, atol=0.05)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float,
        population: int,
        base_perturbations: int = 1,
        antithetic: bool = True,
        *,
        shaping: Shaping = "rank",
        targets: Targets | None = None,
        seed: int | None = None,
    ) -> None:
        check_sigma(sigma)
        if shaping not in SHAPINGS:
            raise ValueError(f"shaping must be one of {SHAPINGS}, got {shaping!r}.")
        if seed is not None:
            check_whole("seed", seed, least=None)
        self.model = model
        self.sigma = sigma
        self.shaping: Shaping = shaping
        self.population = Population(population, base_perturbations, antithetic)
        self.seed = NoiseSource().seed() if seed is None else seed
        self.generation = 0
        self._modules = perturbed_modules(model, targets)
        self._open = False
        self._rows_checked = False

    def __repr__(self) -> str:
        """The settings."""
        population = self.population
        return (
            f"{type(self).__name__}(sigma={self.sigma}, population={population.size}, "
            f"base_perturbations={population.groups}, antithetic={population.antithetic}, "
            f"shaping={self.shaping!r})"
        )

    @property
    def parameters(self) -> list[PerturbedParameter]:
        """The parameters that are perturbed, each once."""
        found = {p.number: p for module in self._modules for p in module.parameters.values()}
        return list(found.values())

    @property
    def local_population(self) -> int:
        """Number of members that this process evaluates."""
        return self.population.local_size

    def share(self, rank: int, world_size: int) -> None:
        """Divide the members over processes, of which this is number `rank`.

        From here on, `members`, `repeat` and the fitness that `gradient` takes are those of this
        process; `gradient` exchanges them by torch.distributed, and its result is that of one
        process with the same seed, up to rounding.

        Args:
            rank: number of this process.
            world_size: number of processes.

        Raises:
            ValueError: if the members cannot be divided equally.
        """
        old = self.population
        self.population = Population(old.size, old.groups, old.antithetic, rank, world_size)

    # --- one generation ----------------------------------------------------------------------

    def repeat(self, batch: T, examples: int | None = None) -> T:
        """The rows of the members, from a batch of examples.

        Without `examples` every member gets the whole batch. With it, each direction gets so many,
        those after the previous one's, and the batch is read from its start again where it ends; so
        the two members of an antithetic pair see the same ones.

        Args:
            batch: tensors of (batch, ...), in whatever structure.
            examples: number of examples of each member.

        Returns:
            The same structure, with tensors (local_population * examples, ...); those of one
            member are neighbours.

        Raises:
            ValueError: for tensors of different lengths, or `examples` below 1.
        """
        check_examples(examples)
        leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        lengths = {len(leaf) if leaf.dim() else 0 for leaf in leaves}
        if len(lengths) != 1 or 0 in lengths:
            shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves) or "none"
            raise ValueError(
                f"repeat needs tensors with equally many examples first, at least one; got "
                f"{shapes}."
            )
        (length,) = lengths
        count = length if examples is None else examples
        first = torch.zeros(1) if examples is None else self.population.direction_numbers() * count
        rows = (first.long().unsqueeze(1) + torch.arange(count)) % length
        rows = rows.expand(self.local_population, count).flatten()

        def take(leaf: Any) -> Any:
            return leaf[rows.to(leaf.device)] if isinstance(leaf, Tensor) else leaf

        repeated: T = pytree.tree_map(take, batch)
        return repeated

    @contextmanager
    def members(self, keep_draws: bool = False) -> Iterator[None]:
        """Within the context the model computes each row of a batch with its member's weights.

        The first dimension of the input of every perturbed layer must hold the rows of all members
        of this process, equally many neighbouring ones of each, see `repeat`; for a recurrent layer
        without batch_first it is the second. The first context follows the rows from layer to layer
        to check that, through the functions of torch that keep them or move them as a whole
        (transpose, flatten, activations and the like); what it cannot follow it does not refuse.

        There are no gradients. Members are the same until `next_generation`.

        Args:
            keep_draws: hold the random numbers instead of drawing them again at each call of a
                layer: for many calls, as in an environment of many steps. They take as much memory
                as inputs and outputs of all layers for one row of each direction.

        Raises:
            ValueError: if the context is open already, or a layer in training mode mixes rows; in
                the context, for a layer whose input does not have the rows of members in place.
        """
        if self._open:
            raise ValueError("the context `members` of this FlipoutES is open already.")
        self._check_rows_stay_apart()
        noise = self._noise(keep_draws)
        rows = Rows(self.local_population, follow=not self._rows_checked)
        fast_path = torch.backends.mha.get_fastpath_enabled()
        before = [vars(module).get("forward") for _, module, _ in self._modules]
        self._open = True
        try:
            # Encoder layers of torch compute without calling their parts where they think it is
            # faster.
            torch.backends.mha.set_fastpath_enabled(False)
            for path, module, parameters in self._modules:
                layer = MEMBER_LAYERS[type(module)](module, path, noise, rows, parameters)
                module.forward = layer
            with torch.no_grad(), rows.following():
                yield
            self._rows_checked |= rows.used
        finally:
            self._open = False
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for (_, module, _), forward in zip(self._modules, before, strict=True):
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    module.forward = forward

    def fitness_of_losses(self, losses: Tensor) -> Tensor:
        """Minus the mean loss of each member of this process, (local_population,).

        Args:
            losses: (rows,), in the order of the rows of a batch; of each row may be several.

        Raises:
            ValueError: if there are not equally many for each member.
        """
        if losses.dim() != 1 or len(losses) == 0 or len(losses) % self.local_population:
            raise ValueError(
                "losses must have one dimension with equally many numbers for each of "
                f"{self.local_population} members, got shape {tuple(losses.shape)}"
                + ("" if losses.dim() else ", one number for all of them")
                + ". Use a loss of single examples, as losses of torch with reduction='none' are."
            )
        mean: Tensor = losses.view(self.local_population, -1).mean(1)
        return -mean

    def gradient(self, fitness: Tensor, accumulate: bool = False, scale: float = 1.0) -> Tensor:
        """Write minus the estimate of the fitness's gradient to `.grad` of the parameters.

        Args:
            fitness: of the members of this process, (local_population,); more is better.
            accumulate: add to what `.grad` holds.
            scale: of the estimate.

        Returns:
            The fitness of all members, (population,), at least in float32.

        Raises:
            ValueError: for another shape, or fitness that is not finite, naming the members.
        """
        # Ranks of many members need more digits than 16-bit numbers have.
        fitness = fitness.detach().to(torch.promote_types(fitness.dtype, torch.float32))
        if fitness.shape != (self.local_population,):
            raise ValueError(
                f"fitness must be one number for each of {self.local_population} members, got "
                f"shape {tuple(fitness.shape)}."
            )
        everyone = gather_fitness(self.population, fitness, (self.seed, self.generation))
        shaped = shape_fitness(everyone, self.shaping)
        if self.population.world_size > 1:
            shaped = shaped[self.population.member_numbers().to(shaped.device)]
        weights = [
            way[0] - way[1] if self.population.antithetic else way[0]
            for way in self.population.by_direction(shaped)
        ]
        noise = self._noise()
        estimates = [estimate(parameter, noise, weights) for parameter in self.parameters]
        sum_over_processes(self.population, estimates)
        factor = -scale / (self.population.size * self.sigma**2)
        for parameter, total in zip(self.parameters, estimates, strict=True):
            value = parameter.value
            if accumulate and value.grad is not None:
                value.grad.add_(total, alpha=factor)
            else:
                value.grad = total.mul_(factor)
        return everyone

    def gradient_norm(self) -> Tensor:
        """Euclidean norm of what `gradient` wrote, a scalar.

        Raises:
            ValueError: if there is no gradient, because `gradient` has not been called yet, or
                `zero_grad` has been since.
        """
        grads = [p.value.grad for p in self.parameters if p.value.grad is not None]
        if not grads:
            raise ValueError("there is no gradient to take the norm of. Call `gradient` before.")
        norms = torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
        total: Tensor = torch.linalg.vector_norm(norms)
        return total

    def next_generation(self) -> None:
        """Draw new perturbations for the members."""
        self.generation += 1

    def member(self, number: int) -> dict[str, Tensor]:
        """The perturbed parameters of one member, in full, by their names in the model.

        Args:
            number: of the member in the population, which is its place among the fitness values
                that `gradient` returns; negative ones count from the end.

        Raises:
            ValueError: if there is no such member.
        """
        size = self.population.size
        if not -size <= number < size:
            raise ValueError(f"there is no member {number} in a population of {size}.")
        everyone = Population(size, self.population.groups, self.population.antithetic)
        noise = PopulationNoise(everyone, self.sigma, self._seed_of_generation())
        return {
            p.name: p.value.detach() + perturbation(p, noise, number % size)
            for p in self.parameters
        }

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """Seed and generation, from which all random numbers follow."""
        return {"seed": self.seed, "generation": self.generation}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken.

        Args:
            state: what it returned.
        """
        self.seed = state["seed"]
        self.generation = state["generation"]

    # --- inside ------------------------------------------------------------------------------

    def _noise(self, keep: bool = False) -> PopulationNoise:
        return PopulationNoise(self.population, self.sigma, self._seed_of_generation(), keep)

    def _seed_of_generation(self) -> int:
        return derive(self.seed, self.generation)

    def _check_rows_stay_apart(self) -> None:
        mixing = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        ]
        if mixing:
            raise ValueError(
                f"{', '.join(mixing)} would normalise over the rows of all members together. Call "
                "eval() on it, or use a normalisation of single examples."
            )
