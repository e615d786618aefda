"""`APDModule`: distil samples of a posterior into a generator of networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, distributed
from torch.optim import Optimizer

from lightning_revflip.apd import (
    Adversaries,
    Codec,
    Critic,
    DistilledPosterior,
    Generator,
    moment_errors,
    sliced_wasserstein,
)
from lightning_revflip.apd.train import Steps
from lightning_revflip.flipout.noise import derive
from lightning_revflip.modules.replicas import replica

_GENERATED = 256
"""Codes that are generated for a validation, if fewer are held out."""


class APDModule(LightningModule):
    """Adversarial posterior distillation (Wang et al., 2018, arXiv 1806.10317), offline.

    Trains a generator on code vectors of posterior samples: a Wasserstein GAN, by default with the
    R1 penalty, which gets nearer to the samples in the same time than the settings of the paper,
    `critic_steps=5, gradient_penalty=10, r1=0, lr=1e-4, betas=(0.5, 0.9)`. A batch holds the codes
    of all critic steps, shape (critic_steps * n, size), and makes `critic_steps` steps of the
    critic and one of the generator, which alone counts as a step of the Trainer. `SampleBankCodes`
    makes such batches of a bank; `posterior` is the result.

    Logs `apd/wasserstein` (the critic's estimate), the penalties and `apd/generator_loss`; in
    validation, of generated codes against held-out ones, `apd/sliced_wasserstein`, `apd/mean_error`
    and `apd/covariance_error`, before `posterior` standardizes the codes. The callback
    `DistillationReport` adds what the generated networks predict.

    Checkpoint: the networks, their optimizers and the codec, so that it is loaded without the bank:
    `APDModule.load_from_checkpoint(path).posterior()`. The random numbers of a step follow from
    `seed` and the number of the step. With the loader of `SampleBankCodes`, which says where it is,
    a run resumes bit for bit, also within an epoch.

    Under DDP the gradients of each step are means over the processes, which is the step that one
    process makes with their joint batch; but each process draws latent vectors and interpolations
    of its own, others than those that one process would draw.

    Does not work with 16-bit mixed precision, whose scaling is for one loss and one optimizer, nor
    with strategies that cut up parameters; use bf16-mixed, DDP.

    Args:
        codec: what codes mean. None is for `load_from_checkpoint`, which finds it there.
        latent_size: numbers that the generator makes a code of. None: as many as a code has with
            `skip`, else 32, as in the paper.
        hidden: units of the hidden layers of the generator, and of the critic.
        skip: see `Generator`; for whitened codes.
        critic_steps: of the critic for one of the generator.
        gradient_penalty: weight of the gradient penalty of Gulrajani et al.
        r1: weight of the R1 penalty.
        spectral_norm: see `Critic`.
        lr: learning rate of Adam, for both.
        betas: of Adam.
        ema: decay of the average of the generator, which is what `posterior` samples from; None:
            no average.
        seed: of latent vectors and interpolations.

    Raises:
        ValueError: for settings out of range; in training, for batches that cannot be cut into
            equal parts; when a checkpoint is loaded that belongs to another codec.
        MisconfigurationException: at the start of training, without codec, and for 16-bit mixed
            precision.

    Examples:
        >>> bank = SampleBank("runs/mnist/bank")  # doctest: +SKIP
        >>> codec = ParameterCodec.fit(bank, rank=20)  # doctest: +SKIP
        >>> module = APDModule(codec)  # doctest: +SKIP
        >>> Trainer(max_steps=3000).fit(module, SampleBankCodes(bank, codec))  # doctest: +SKIP
        >>> module.posterior().save("runs/mnist/distilled")  # doctest: +SKIP
    """

    codec: Codec
    networks: Adversaries

    def __init__(
        self,
        codec: Codec | None = None,
        latent_size: int | None = None,
        hidden: Sequence[int] = (100, 100, 100),
        skip: bool = True,
        critic_steps: int = 1,
        gradient_penalty: float = 0.0,
        r1: float = 1.0,
        spectral_norm: bool = False,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.0, 0.9),
        ema: float | None = 0.999,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters(ignore=["codec"])
        if critic_steps < 1:
            raise ValueError(f"critic_steps must be at least 1, got {critic_steps}.")
        self.latent_size = latent_size
        self.hidden = tuple(hidden)
        self.skip = skip
        self.critic_steps = critic_steps
        self.penalties = {"gradient_penalty": gradient_penalty, "r1": r1}
        self.spectral_norm = spectral_norm
        self.lr = lr
        self.betas = betas
        self.ema = ema
        self.seed = seed
        self.validation_codes: tuple[Tensor, Tensor] | None = None
        """Held-out and generated codes of the last validation, on the CPU."""
        self._held_out: list[Tensor] = []
        if codec is not None:
            self.build(codec)

    def build(self, codec: Codec) -> None:
        """Make new networks for the codes of a codec."""
        latent_size = self.latent_size
        if latent_size is None:
            latent_size = codec.size if self.skip else 32
        generator = Generator(latent_size, codec.size, self.hidden, self.skip)
        critic = Critic(codec.size, self.hidden, self.spectral_norm)
        self.codec = codec
        self.networks = Adversaries(generator, critic, ema=self.ema, **self.penalties)

    def forward(self, latents: Tensor) -> Tensor:
        """Codes, shape (n, size), of latent vectors, shape (n, latent_size)."""
        codes: Tensor = self.networks.averaged(latents)
        return codes

    def posterior(self) -> DistilledPosterior:
        """What has been learnt: networks of generated codes. A copy, on the CPU."""
        return DistilledPosterior.of_trained(self.codec, self.networks.averaged)

    # --- training ----------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if not hasattr(self, "networks"):
            raise MisconfigurationException(
                "APDModule has no codec. Give it one: ParameterCodec.fit(bank, rank=20). Only "
                "load_from_checkpoint finds it in the checkpoint."
            )

    def on_fit_start(self) -> None:
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "APDModule has two losses and two optimizers, which the gradient scaling of 16-bit "
                "mixed precision is not for. Use precision='bf16-mixed' or '32-true'."
            )

    def configure_optimizers(self) -> tuple[list[Optimizer], list[Any]]:
        critic, generator = self.networks.optimizers(self.lr, self.betas)
        return [critic, generator], []

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """Steps of the critic on equal parts of a batch of codes, then one of the generator."""
        if len(batch) % self.critic_steps:
            raise ValueError(
                f"a batch holds the codes of critic_steps={self.critic_steps} steps, and cannot be "
                f"cut into as many equal parts: it has {len(batch)} codes. Use batches of a "
                f"multiple of {self.critic_steps}, and drop_last=True if only the last is smaller."
            )
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        critic, generator = optimizers
        found = self.networks.step(
            batch.chunk(self.critic_steps),
            # Not Lightning's wrapper: the Trainer counts the steps of that as its own.
            self._averaging(critic.optimizer),
            self._averaging(generator),
            self._random(),
        )
        self.log_dict({f"apd/{name}": value for name, value in found.items()}, batch_size=1)

    def _random(self) -> torch.Generator:
        """Random numbers of this step in this process."""
        step = int(self.networks.generator_steps)
        return torch.Generator().manual_seed(derive(self.seed, step, replica(self.trainer)[0]))

    def _averaging(self, optimizer: Any) -> Steps:
        _, processes = replica(self.trainer)
        return _Averaging(optimizer) if processes > 1 else optimizer

    # --- validation --------------------------------------------------------------------------

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self._held_out.append(batch)

    def on_validation_epoch_end(self) -> None:
        """Compare generated codes with those held out, of all processes."""
        real, self._held_out = torch.cat(self._held_out), []
        if replica(self.trainer)[1] > 1:
            gathered = self.all_gather(real)
            assert isinstance(gathered, Tensor)
            real = gathered.reshape(-1, real.shape[1])
        real = real.float().cpu()
        random = torch.Generator().manual_seed(self.seed)
        latents = self.networks.averaged.draw_latents(max(_GENERATED, len(real)), random)
        generated = self(latents).float().cpu()
        self.validation_codes = real, generated
        mean_error, covariance_error = moment_errors(generated, real)
        self.log_dict(
            {
                "apd/sliced_wasserstein": sliced_wasserstein(generated, real, generator=random),
                "apd/mean_error": mean_error,
                "apd/covariance_error": covariance_error,
            },
            batch_size=1,
            prog_bar=True,
        )

    # --- checkpoint --------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        settings, tensors = self.codec.settings(), self.codec.to_tensors()
        checkpoint["apd_codec"] = {"settings": settings, "tensors": tensors}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        codec = Codec.from_tensors(**checkpoint["apd_codec"])
        if not hasattr(self, "networks"):
            self.build(codec)
        elif not _same(codec, self.codec):
            raise ValueError(
                f"the checkpoint was trained on codes of another codec: {codec!r}, and this module "
                f"has {self.codec!r}. Resume with the bank as it was then, or go on with the codec "
                "of APDModule.load_from_checkpoint(path).codec."
            )


class _Averaging:
    """An optimizer whose steps take the mean of the gradients over all processes.

    DDP itself expects that each backward pass reaches all parameters, and those of critic and
    generator do not.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def step(self) -> None:
        groups = self._optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        joint = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(joint)
        joint /= distributed.get_world_size()
        parts = torch.split(joint, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        self._optimizer.step()


def _same(one: Codec, other: Codec) -> bool:
    if one.settings() != other.settings():
        return False
    tensors = other.to_tensors()
    return all(tensor.equal(tensors[name]) for name, tensor in one.to_tensors().items())
