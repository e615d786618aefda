"""Adversarial posterior distillation (APD): Wang et al., 2018, arXiv 1806.10317.

A generator learns the distribution of samples of a network's weights, and takes their place.

Plain torch, without Lightning. `codec.py` makes short codes of weights and back, `networks.py` and
`losses.py` are those of a Wasserstein GAN of codes, `train.py` is how they are trained,
`distances.py` says how far generated samples are from others, and `distilled.py` is the posterior
that results.
"""

from lightning_revflip.apd.codec import Codec, IdentityCodec, ParameterCodec, encode_all
from lightning_revflip.apd.distances import (
    mode_shares,
    modes_covered,
    moment_errors,
    sliced_wasserstein,
)
from lightning_revflip.apd.distilled import DistilledPosterior
from lightning_revflip.apd.losses import (
    critic_loss,
    generator_loss,
    gradient_penalty,
    r1_penalty,
)
from lightning_revflip.apd.networks import Critic, Generator, standardized
from lightning_revflip.apd.offline import distil
from lightning_revflip.apd.train import Adversaries, random_batches

__all__ = [
    "Adversaries",
    "Codec",
    "Critic",
    "DistilledPosterior",
    "Generator",
    "IdentityCodec",
    "ParameterCodec",
    "critic_loss",
    "distil",
    "encode_all",
    "generator_loss",
    "gradient_penalty",
    "mode_shares",
    "modes_covered",
    "moment_errors",
    "r1_penalty",
    "random_batches",
    "sliced_wasserstein",
    "standardized",
]
