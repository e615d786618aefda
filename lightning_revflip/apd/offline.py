"""`distil`: from samples to a generator in one call, without a Trainer."""

from __future__ import annotations

import time
from itertools import islice
from os import PathLike

import torch

from lightning_revflip.apd.codec import Codec, IdentityCodec, ParameterCodec, encode_all
from lightning_revflip.apd.distilled import DistilledPosterior
from lightning_revflip.apd.networks import Critic, Generator
from lightning_revflip.apd.train import Adversaries, random_batches
from lightning_revflip.posterior.bank import SampleBank
from lightning_revflip.posterior.moments import Rows


def distil(
    bank: Rows | str | PathLike[str],
    rank: int | None = 20,
    *,
    steps: int = 8000,
    seconds: float | None = None,
    skip: bool | None = None,
    critic_steps: int = 1,
    batch_size: int = 100,
    gradient_penalty: float = 0.0,
    r1: float = 1.0,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.0, 0.9),
    seed: int = 0,
) -> DistilledPosterior:
    """Adversarial posterior distillation of all samples, with the networks of the paper.

    For logs, checkpoints and held-out samples train an `APDModule` instead.

    Args:
        bank: samples, such as a `SampleBank`, or the folder of a bank.
        rank: of the `ParameterCodec`; None: the weights themselves are the codes, as in the paper.
        steps: of the generator; 0 leaves it as it was made.
        seconds: stop earlier, after this time; the codec is fitted before.
        skip: whether the generator learns a correction of a normal distribution, see `Generator`;
            None: of codes of a `ParameterCodec`.
        critic_steps: of the critic for one of the generator; the paper has 5.
        batch_size: codes of a step of the critic.
        gradient_penalty: see `Adversaries`; the paper has 10, and no R1 penalty.
        r1: see `Adversaries`.
        lr: of Adam; the paper has 1e-4.
        betas: of Adam; the paper has (0.5, 0.9).
        seed: of the initial networks and of training; torch's global generator is left alone.

    Raises:
        ValueError: for a rank out of range, negative steps, and samples that are not finite.
        FileNotFoundError: for a folder that is not there.

    Examples:
        >>> distil("runs/mnist/bank", rank=20).export("mnist.safetensors")  # doctest: +SKIP
    """
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}.")
    if isinstance(bank, str | PathLike):
        bank = SampleBank(bank)
    codec: Codec = IdentityCodec.fit(bank) if rank is None else ParameterCodec.fit(bank, rank)
    skip = rank is not None if skip is None else skip
    codes = encode_all(codec, bank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = Generator(codec.size if skip else 32, codec.size, skip=skip)
        critic = Critic(codec.size)
    networks = Adversaries(generator, critic, gradient_penalty=gradient_penalty, r1=r1)
    optimizers = networks.optimizers(lr, betas)
    random = torch.Generator().manual_seed(seed)
    batches = random_batches(codes, batch_size, random)
    end = float("inf") if seconds is None else time.monotonic() + seconds
    for _ in range(steps):
        if time.monotonic() > end:
            break
        networks.step(islice(batches, critic_steps), *optimizers, random)
    return DistilledPosterior.of_trained(codec, networks.averaged)
