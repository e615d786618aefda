"""A policy whose fitness is what it earns in an environment: no loss, no gradient."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_revflip.flipout.evolution import FlipoutES
from lightning_revflip.flipout.noise import derive
from recipes.es_cartpole.environment import episode_returns, make_environments, sizes

_EVALUATION = 2**31


class EvolvedPolicy(LightningModule):
    """Trains a policy by `FlipoutES`; each member plays episodes in environments of its own.

    All members act in one batched forward pass at each step. A batch of the data module stands for
    a generation.

    Logs `evolution/fitness_mean` and `evolution/fitness_best`, the mean return of all members and
    of the best; `evolution/gradient_norm` and `evolution/members_per_second`; `val/return` and
    `test/return`, the mean return of the policy without perturbation.

    Checkpoint: seed and generation, so that a resumed run goes on as the other would have done.

    Args:
        environment: id in gymnasium, with discrete actions and vectors as observations.
        hidden: units of each hidden layer of the policy, which has tanh between layers.
        sigma: standard deviation of the perturbations.
        population: number of members.
        base_perturbations: how many independent perturbations members are made from.
        episodes: how many each member plays.
        eval_episodes: how many the policy without perturbation plays.
        lr: learning rate of Adam.
        weight_decay: of all parameters.
        seed: of perturbations and initial states.

    Raises:
        ImportError: without gymnasium.
        ValueError: for an unsuitable environment, sizes below 1, and a population that cannot be
            divided.
    """

    def __init__(
        self,
        environment: str = "CartPole-v1",
        hidden: Sequence[int] = (16,),
        sigma: float = 0.1,
        population: int = 128,
        base_perturbations: int = 8,
        episodes: int = 1,
        eval_episodes: int = 100,
        lr: float = 0.05,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        for name, value in {"episodes": episodes, "eval_episodes": eval_episodes}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.environment = environment
        self.episodes = episodes
        self.eval_episodes = eval_episodes
        self.lr = lr
        self.weight_decay = weight_decay

        self._evaluation = make_environments(environment, eval_episodes)
        self._training: Any = None
        self.fitness: Tensor | None = None
        """Mean return of each member of the last generation, shape (population,)."""
        features, actions = sizes(self._evaluation)
        self.policy = make_policy([features, *hidden, actions])
        self.evolution = FlipoutES(self.policy, sigma, population, base_perturbations, seed=seed)

    def forward(self, observations: Tensor) -> Tensor:
        """Scores (rows, actions) of observations (rows, features)."""
        return self.policy(observations.to(self.device))

    # --- training ----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Divide the members over the processes, and make their environments."""
        self.evolution.share(self.global_rank, self.trainer.world_size)
        count = self.evolution.local_population * self.episodes
        self._training = make_environments(self.environment, count)

    def training_step(self, batch: int, batch_idx: int) -> None:
        """One generation."""
        start = time.perf_counter()
        seed = derive(self.evolution.seed, self.evolution.generation, self.global_rank)
        with self.evolution.members(keep_draws=True):
            returns = episode_returns(self._training, self, seed)
        fitness = returns.view(-1, self.episodes).mean(1)
        self.fitness = everyone = self.evolution.gradient(fitness.to(self.device))
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.step()
        norm = self.evolution.gradient_norm()
        self.evolution.next_generation()
        self.log("evolution/fitness_mean", everyone.mean(), prog_bar=True, batch_size=1)
        metrics: dict[str, Any] = {
            "evolution/fitness_best": everyone.max(),
            "evolution/gradient_norm": norm,
            "evolution/members_per_second": len(everyone) / (time.perf_counter() - start),
        }
        self.log_dict(metrics, batch_size=1)

    def configure_optimizers(self) -> Optimizer:
        return Adam(self.policy.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    # --- evaluation --------------------------------------------------------------------------

    def validation_step(self, batch: int, batch_idx: int) -> None:
        self.log("val/return", self._evaluate(0), prog_bar=True, batch_size=1)

    def test_step(self, batch: int, batch_idx: int) -> None:
        self.log("test/return", self._evaluate(1), batch_size=1)

    def _evaluate(self, part: int) -> Tensor:
        """Mean return of the policy itself; initial states are the same in every validation."""
        seed = derive(self.evolution.seed, _EVALUATION + part)
        return episode_returns(self._evaluation, self, seed).mean()

    # --- checkpoint --------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["evolution"] = self.evolution.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.evolution.load_state_dict(checkpoint["evolution"])


def make_policy(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers from each size to the next, with tanh between them."""
    if min(sizes) < 1:
        raise ValueError(f"hidden sizes must be at least 1, got {list(sizes)[1:-1]}.")
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])
