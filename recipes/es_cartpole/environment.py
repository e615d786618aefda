"""Episodes of many environments at once, side by side in one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def make_environments(name: str, count: int) -> Any:
    """Environments of gymnasium that step together.

    Args:
        name: an environment with discrete actions and a vector as observation, by its id.
        count: how many.

    Raises:
        ImportError: without gymnasium.
        ValueError: for other actions or observations.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(
            "the recipe es_cartpole needs gymnasium: pip install 'gymnasium>=1.0', or install "
            "the extra lightning-revflip[recipes]."
        ) from error
    environments = gymnasium.make_vec(name, num_envs=count)
    actions, observations = environments.single_action_space, environments.single_observation_space
    if not isinstance(actions, gymnasium.spaces.Discrete) or len(observations.shape or ()) != 1:
        environments.close()
        raise ValueError(
            f"{name} has actions {actions} and observations {observations}; the policy needs "
            "discrete actions and vectors, as CartPole-v1 has."
        )
    return environments


def sizes(environments: Any) -> tuple[int, int]:
    """How many numbers an observation has, and how many actions there are."""
    (features,) = environments.single_observation_space.shape
    return features, int(environments.single_action_space.n)


def episode_returns(environments: Any, policy: Callable[[Tensor], Tensor], seed: int) -> Tensor:
    """Sum of the rewards of one episode in each environment, float32, (environments,).

    Args:
        environments: from `make_environments`; they must end every episode at some time.
        policy: from observations (environments, features) to one score for each action, of which
            the highest is done.
        seed: of the initial states.
    """
    observations, _ = environments.reset(seed=seed)
    total = torch.zeros(environments.num_envs)
    running = torch.ones(environments.num_envs, dtype=torch.bool)
    first = environments.single_action_space.start
    while running.any():
        scores = policy(torch.as_tensor(observations, dtype=torch.float32))
        actions = (scores.argmax(1) + first).cpu().numpy()
        observations, rewards, terminated, truncated, _ = environments.step(actions)
        # What ended starts again by itself; its later rewards do not count.
        total += torch.as_tensor(rewards, dtype=torch.float32) * running
        running &= ~torch.as_tensor(terminated | truncated)
    return total
