"""`PosteriorDistillation`: distil the posterior while `SGLDSampler` samples it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_revflip.apd import DistilledPosterior
from lightning_revflip.callbacks._conversion import callbacks_of
from lightning_revflip.callbacks._online_distillation import OnlineDistillation, SampleBuffer
from lightning_revflip.callbacks.loggers import log_settings
from lightning_revflip.callbacks.sampling import SGLDSampler
from lightning_revflip.modules.apd import APDModule


class PosteriorDistillation(Callback):
    """Adversarial posterior distillation (Wang et al., 2018, arXiv 1806.10317), online.

    Beside an `SGLDSampler`, which must come before it in the list of callbacks, it keeps the last
    `buffer_size` samples in memory. When there are as many, a codec is fitted to them, and from
    then on each `every_n_samples` samples a generator is trained on the buffer for `steps` steps.
    At the end of training the generator, with the samples since then, is saved as a
    `DistilledPosterior`.

    The generator stands for the samples in the buffer, not for the whole chain: what has left the
    buffer is forgotten. As the chain moves on, the codec is fitted anew after `refit_every`
    samples. Codes then mean something else, and generator and critic begin anew; with `skip` that
    is as the low-rank Gaussian of the buffer. The chain is the same as without this callback,
    unless it restarts.

    With `restart_every` the chain goes on from a generated network after so many samples ("infinite
    chains"): it jumps to where it could have been much later, and so mixes faster, if the
    generator is good. The state of the optimizer and the buffers of the module stay. The samples
    in the bank right after a restart come from the generator more than from the posterior.

    Logs `apd/wasserstein`, `apd/gradient_penalty` and `apd/generator_loss` of the last step, and of
    generated codes against those of the buffer `apd/sliced_wasserstein`, `apd/mean_error` and
    `apd/covariance_error`.

    Checkpoint: the buffer (4 bytes for each parameter of each sample), codec, networks and
    optimizers. A resumed run goes on bit for bit, as far as that of `SGLDSampler` does.

    Works in one process, there also with `SGLDSampler(chains=...)`, whose chains share the buffer.
    With several processes distil the finished bank by an `APDModule` instead.

    Args:
        dirpath: folder of the `DistilledPosterior`. None: `distilled` beside the bank.
        rank: of the codec; None: no codec, codes are the weights themselves, as in the paper.
        buffer_size: number of samples in the buffer, more than `rank`.
        every_n_samples: samples between two trainings.
        steps: of the generator in each training.
        refit_every: samples after which the codec is fitted anew, at the next training; None:
            never.
        restart_every: samples after which the chain restarts, after the next training; None: never.
        batch_size: codes of a step of the critic.
        module: an `APDModule` without codec, of which the other settings are used; None: the
            defaults, for rank None without `skip`.
        seed: of all random numbers.

    Raises:
        ValueError: for settings out of range; at the start of training, for a checkpoint of another
            architecture; in training, for weights that are not finite.
        MisconfigurationException: in `setup`, without an `SGLDSampler` before it, and with several
            processes.

    Examples:
        >>> sampler = SGLDSampler("runs/bank", num_data=50_000, every_n_steps=20)
        >>> distillation = PosteriorDistillation("runs/distilled", rank=20, buffer_size=100)
        >>> trainer = Trainer(callbacks=[sampler, distillation], logger=False)
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        rank: int | None = 20,
        buffer_size: int = 100,
        every_n_samples: int = 10,
        steps: int = 100,
        *,
        refit_every: int | None = 100,
        restart_every: int | None = None,
        batch_size: int = 100,
        module: APDModule | None = None,
        seed: int = 0,
    ) -> None:
        _check_at_least_1(
            rank=rank,
            every_n_samples=every_n_samples,
            steps=steps,
            refit_every=refit_every,
            restart_every=restart_every,
            batch_size=batch_size,
        )
        least = 2 if rank is None else rank + 1
        if buffer_size < least:
            raise ValueError(
                f"buffer_size must be at least {least}, as the codec of rank {rank} is fitted to "
                f"more samples than its rank, got {buffer_size}. Use a larger buffer, or a smaller "
                "rank."
            )
        if module is not None and hasattr(module, "codec"):
            raise ValueError(
                "the module has a codec already, and PosteriorDistillation fits its own. Give an "
                "APDModule() without codec."
            )
        self.dirpath = dirpath
        self.rank = rank
        self.buffer_size = buffer_size
        self.every_n_samples = every_n_samples
        self.steps = steps
        self.refit_every = refit_every
        self.restart_every = restart_every
        self.batch_size = batch_size
        self.module = APDModule(skip=rank is not None) if module is None else module
        self.seed = seed
        self._least = least
        self._saved: dict[str, Any] = {}
        self._online: OnlineDistillation | None = None
        self._trained_at = self._restarted_at = 0
        self._found: dict[str, float] = {}
        self._stop_listening: Any = None

    @property
    def posterior(self) -> DistilledPosterior:
        """What has been learnt so far.

        Raises:
            RuntimeError: if nothing has.
        """
        if not hasattr(self.module, "codec"):
            raise RuntimeError(
                f"nothing has been distilled yet: that begins with {self.buffer_size} samples. "
                "Train longer, or use a smaller buffer."
            )
        return self.module.posterior()

    # --- training ----------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _sampler_before(trainer, self)
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"PosteriorDistillation works in one process, got {trainer.world_size}. Leave it "
                "out, and distil the finished bank with APDModule, which also trains under DDP."
            )
        log_settings(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._saved = {}  # of another training
        sampler = _sampler_before(trainer, self)
        buffer = SampleBuffer(sampler.collection.layout, self.buffer_size)
        arguments = (self.module, buffer, self.rank, self.batch_size, self.seed)
        self._online = OnlineDistillation(*arguments)
        self._trained_at = self._saved.get("trained_at", 0)
        self._restarted_at = self._saved.get("restarted_at", 0)
        self._found = {}
        if self._saved:
            self._online.load_state_dict(self._saved["online"])
        sampler.listeners.append(buffer.add)
        self._stop_listening = functools.partial(sampler.listeners.remove, buffer.add)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._online is not None
        buffer = self._online.buffer
        if buffer.full and self._since(self._trained_at) >= self.every_n_samples:
            self._train(self._online)
            if self.restart_every and self._since(self._restarted_at) >= self.restart_every:
                collection = _sampler_before(trainer, self).collection
                collection.load(self._online.sample(len(collection.numbers)))
                self._restarted_at = buffer.seen
        if self._found and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self._found, batch_size=1)

    def _since(self, seen: int) -> int:
        """Number of samples since there were so many."""
        assert self._online is not None
        return self._online.buffer.seen - seen

    def _train(self, online: OnlineDistillation) -> None:
        fitted_at = online.fitted_at
        if fitted_at is None or (self.refit_every and self._since(fitted_at) >= self.refit_every):
            online.fit()
        found = online.train(self.steps)
        self._found = {f"apd/{name}": value for name, value in found.items()}
        self._trained_at = online.buffer.seen

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._online is not None
        samples = len(self._online.buffer)
        if samples < self._least:
            rank_zero_warn(
                f"PosteriorDistillation saves nothing: there were {samples} samples, and rank "
                f"{self.rank} needs at least {self._least}. Train longer, or use a smaller rank."
            )
            return
        # A run that is resumed from here goes on as if training had not ended.
        self._saved = copy.deepcopy(self.state_dict())
        if self._since(self._trained_at) > 0:
            self._train(self._online)
        self._online = None
        folder = self._folder(trainer)
        self.posterior.save(folder)
        rank_zero_info(f"PosteriorDistillation: {self.posterior!r}, saved in {folder}")

    def _folder(self, trainer: Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        bank = _sampler_before(trainer, self).folder
        assert bank is not None
        return bank.with_name("distilled")

    # --- afterwards --------------------------------------------------------------------------

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        if self._online is not None:
            self._saved = self.state_dict()
            self._online = None
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self._online is None:
            return dict(self._saved)
        return {
            "trained_at": self._trained_at,
            "restarted_at": self._restarted_at,
            "online": self._online.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = dict(state_dict)


def _sampler_before(trainer: Trainer, callback: Callback) -> SGLDSampler:
    """The sampler whose samples are distilled."""
    callbacks = callbacks_of(trainer)
    for each in callbacks[: callbacks.index(callback)]:
        if isinstance(each, SGLDSampler):
            return each
    raise MisconfigurationException(
        "PosteriorDistillation distils the samples of an SGLDSampler, and there is none before it. "
        "Give Trainer(callbacks=[SGLDSampler(...), PosteriorDistillation(...)])."
    )


def _check_at_least_1(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
