"""Flipout: pseudo-independent perturbations of weights (Wen et al., 2018, arXiv 1803.04386).

Plain torch, without Lightning. Layers stand in for those of torch.nn; `perturbations.py` has the
distributions, `elbo.py` the divergence from the prior, `sampling.py` predictions, and `evolution/`
gradients from the fitness of perturbed members.
"""

from torch import nn

from lightning_revflip.flipout.conv import FlipoutConv1d, FlipoutConv2d, FlipoutConv3d
from lightning_revflip.flipout.elbo import add_kl_gradient, elbo_loss, kl
from lightning_revflip.flipout.embedding import FlipoutEmbedding
from lightning_revflip.flipout.evolution import FlipoutES, shape_fitness
from lightning_revflip.flipout.layer import PerturbedLayer
from lightning_revflip.flipout.linear import FlipoutLinear
from lightning_revflip.flipout.noise import NoiseSource
from lightning_revflip.flipout.perturbations import (
    DropConnect,
    Gaussian,
    MultiplicativeGaussian,
    Perturbation,
)
from lightning_revflip.flipout.recurrent import FlipoutGRU, FlipoutLSTM
from lightning_revflip.flipout.sampling import sample_n, sampling

FLIPOUT_LAYERS: dict[type[nn.Module], type[PerturbedLayer]] = {
    nn.Linear: FlipoutLinear,
    nn.Conv1d: FlipoutConv1d,
    nn.Conv2d: FlipoutConv2d,
    nn.Conv3d: FlipoutConv3d,
    nn.Embedding: FlipoutEmbedding,
    nn.LSTM: FlipoutLSTM,
    nn.GRU: FlipoutGRU,
}
"""The flipout layer of each plain layer: rules for `lightning_revflip.convert.convert`."""

__all__ = [
    "FLIPOUT_LAYERS",
    "DropConnect",
    "FlipoutConv1d",
    "FlipoutConv2d",
    "FlipoutConv3d",
    "FlipoutES",
    "FlipoutEmbedding",
    "FlipoutGRU",
    "FlipoutLSTM",
    "FlipoutLinear",
    "Gaussian",
    "MultiplicativeGaussian",
    "NoiseSource",
    "Perturbation",
    "PerturbedLayer",
    "add_kl_gradient",
    "elbo_loss",
    "kl",
    "sample_n",
    "sampling",
    "shape_fitness",
]
