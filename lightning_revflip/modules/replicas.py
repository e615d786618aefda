"""Which processes train one model together."""

from lightning.pytorch import Trainer


def replica(trainer: Trainer) -> tuple[int, int]:
    """Number of this process among those that train one model together, and how many they are.

    (0, 1) with one process, and for each of `IndependentChainsStrategy`.
    """
    # What divides data among processes knows which of them share a model.
    shared = trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
    return shared["rank"], shared["num_replicas"]
