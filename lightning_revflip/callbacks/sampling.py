"""`SGLDSampler`: train any LightningModule by sampling its posterior, and collect the samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_revflip.callbacks._collection import Collection, finished_bank
from lightning_revflip.callbacks._configured_optimizer import swap_optimizer
from lightning_revflip.callbacks._ensemble import Combine, EnsembleEvaluation
from lightning_revflip.callbacks._mixing import Mixing, Outputs, report
from lightning_revflip.callbacks._network import check_not_averaged_before, copy_part, part_of
from lightning_revflip.callbacks._sampled_run import (
    collects,
    independent,
    noise_seed,
    sampler_of,
    training_examples,
)
from lightning_revflip.callbacks._sampler_settings import (
    DTYPES,
    check_schedule,
    check_settings,
    check_trainer,
    warn_of_no_samples,
)
from lightning_revflip.callbacks._sampler_swap import SAMPLERS, Target, check_agrees, sampler_from
from lightning_revflip.callbacks.loggers import log_settings
from lightning_revflip.callbacks.run_folder import run_folder
from lightning_revflip.posterior import SampleBank
from lightning_revflip.sgld import LangevinOptimizer, log_mean_softmax


class SGLDSampler(Callback):
    """Makes a module's optimizer sample from the posterior, and collects its weights as samples.

    The module trains on the mean loss of its batches with `torch.optim.SGD`. Its learning rates and
    schedules are kept, its weight decay becomes the precision of the prior, and every step gets the
    noise that makes the weights a sample: `lightning_revflip.sgld` states of which distribution.
    One step of the sampler moves half as far along the gradient as one of SGD.

    After `burn_in` optimizer steps, the weights of every `every_n_steps`-th step are offered to a
    `SampleBank` in `dirpath`. During validation, test and prediction the module answers for
    `eval_samples` of them, spread evenly: calls of the network return the logarithm of the mean of
    the samples' probabilities, so that accuracy and cross-entropy are those of the ensemble. While
    there are none in training, and for its sanity check, the current weights answer.

    Logs `sgld/samples` and `sgld/temperature`; after a validation or test `sgld/entropy` and
    `sgld/mutual_information` (means over the data, in nats), and `sgld/ess_weights`,
    `sgld/ess_function`, `sgld/rhat_weights`, `sgld/rhat_function` (smallest effective sample size,
    largest split R-hat; see `lightning_revflip.sgld.diagnostics`). At the end of training it says
    whether the chains have mixed.

    Checkpoint: number of steps and of samples, and in the optimizer's state the noise. All samples
    that a checkpoint counts are on the disk before it is. Resuming drops samples that came after
    it and goes on; with `RNGState` and a checkpoint from the end of an epoch, bit by bit.

    Several chains, each with a number of its own in the bank: `chains` of them in one process,
    whose network then stays a `ParallelChains`, or one in each process with
    `IndependentChainsStrategy`, which validates each chain by itself and merges them afterwards.
    Under plain DDP all processes hold the same chain, and the first one writes.

    Does not work with several optimizers, with optimizers other than plain SGD or one of
    `lightning_revflip.SGLD`, `PSGLD`, `SGHMC`, with `Flipout`, with evolution strategies, and with
    Trainer strategies that cut up parameters.

    Args:
        dirpath: folder of the bank. None: `posterior` beside the folder of the checkpoints.
        num_data: number N of training examples; "auto": that of the training data loader.
        temperature: T; 1 for the posterior, 0 for training without noise, as in a deep ensemble.
        burn_in: number of optimizer steps before the first sample.
        every_n_steps: distance of samples in optimizer steps.
        max_samples: of each chain; None keeps all.
        policy: which samples stay: `spread` evenly over the chain, a random `reservoir`, or the
            `latest`.
        sampler: `sgld`, `psgld` (steps adapted to each weight in the burn-in) or `sghmc` (with a
            momentum).
        sampler_options: further arguments of `SGLD`, `PSGLD` or `SGHMC`.
        prior_precision: 1 / variance of the prior; None: weight decay * N.
        schedule: makes a schedule of the optimizer, which is called after each step; for modules
            that return none. With `CyclicalSchedule`, samples are collected while it samples.
        network: path of the module whose outputs are combined, and which is copied for `chains`.
            None: the module itself, whose `forward` the steps must call.
        chains: number of chains in each process; see `lightning_revflip.sgld.ParallelChains`. Each
            batch is divided among them.
        dtype: of stored samples.
        eval_samples: number of samples that the module answers for; 0: its current weights.
        combine: makes one output of those of the samples, (samples, batch, ...) to (batch, ...). By
            default for logits with the classes in the last dimension; regression needs another.
        seed: of the noise, as in `torch.Generator().manual_seed`; of independent chain k
            `chain_seed(seed, k)`. None: a draw of torch's global generator.

    Raises:
        ValueError: for settings out of range; at the start of training, for a folder that holds the
            samples of another run, and for a checkpoint without its bank; in training, for weights
            that are not finite, with the step.
        MisconfigurationException: in `setup`, when the optimizer is made or at the start of
            training, if module, checkpoint or Trainer do not fit.
        OSError: in training, if samples cannot be written; they wait in memory for `close`.

    Examples:
        >>> sampler = SGLDSampler("runs/bank", num_data=50_000, burn_in=500, every_n_steps=20)
        >>> trainer = Trainer(callbacks=[sampler], logger=False)
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        num_data: int | Literal["auto"] | None = None,
        temperature: float = 1.0,
        burn_in: int = 500,
        every_n_steps: int = 20,
        max_samples: int | None = 100,
        policy: Literal["spread", "reservoir", "latest"] = "spread",
        *,
        sampler: Literal["sgld", "psgld", "sghmc"] = "sgld",
        sampler_options: Mapping[str, Any] | None = None,
        prior_precision: float | None = None,
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        network: str | None = None,
        chains: int = 1,
        dtype: Literal["float32", "float16", "bfloat16"] = "float16",
        eval_samples: int = 20,
        combine: Combine = log_mean_softmax,
        seed: int | None = None,
    ) -> None:
        check_settings(locals())
        self.dirpath = dirpath
        self.num_data = num_data
        self.temperature = temperature
        self.burn_in = burn_in
        self.every_n_steps = every_n_steps
        self.max_samples = max_samples
        self.policy = policy
        self.sampler = sampler
        self.sampler_options = dict(sampler_options or {})
        self.prior_precision = prior_precision
        self.schedule = schedule
        self.network = network
        self.chains = chains
        self.dtype = dtype
        self.eval_samples = eval_samples
        self.combine = combine
        self.seed = seed

        self.steps = 0
        """Steps that the sampler has taken."""
        self.folder: Path | None = None
        """Where the bank is, from the start of training on."""
        self.mixing: Mixing | None = None
        """Diagnostics of the last validation or test, and at the end of training of all samples."""
        self.listeners: list[Callable[[Tensor], None]] = []
        """Called with the weights that are offered to the bank, shape (chains, P), float32."""
        self._target: Target | None = None
        self._saved: dict[str, Any] = {}
        self._collection: Collection | None = None
        self._hook: Any = None
        self._evaluation: EnsembleEvaluation | None = None
        self._outputs: Outputs | None = None
        self._undo: list[Callable[[], None]] = []

    # --- before training ---------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_trainer(trainer, pl_module)
        log_settings(trainer, self)
        if self.chains > 1:
            assert self.network is not None
            check_not_averaged_before(trainer, self)
            copy_part(pl_module, self.network, self.chains, self.combine)
        if stage == "fit":
            self.close()  # what an earlier training could not write
            if self.schedule is not None:
                check_schedule(pl_module)
            make = functools.partial(self._make_sampler, trainer)
            self._undo.append(swap_optimizer(pl_module, make, self.schedule))

    def _make_sampler(self, trainer: Trainer, optimizer: Optimizer) -> LangevinOptimizer:
        num_data = training_examples(trainer, self.num_data)
        self._target = Target(num_data, self.temperature, self.prior_precision)
        options = dict(self.sampler_options)
        if self.sampler == "psgld" and not isinstance(optimizer, LangevinOptimizer):
            options.setdefault("adaptation_steps", self.burn_in)
        generator = torch.Generator().manual_seed(noise_seed(trainer, self.seed))
        return sampler_from(optimizer, SAMPLERS[self.sampler], self._target, generator, **options)

    # --- training ----------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        part_of(pl_module, self.network)  # raises if there is none
        if trainer.gradient_clip_val:
            rank_zero_warn(
                f"gradient_clip_val={trainer.gradient_clip_val} changes gradients, and so the "
                "distribution that is sampled. Leave it out, or use a smaller learning rate."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:
            self._saved = {}  # of another training
        optimizer = sampler_of(trainer)
        assert self._target is not None
        check_agrees(optimizer, "of the checkpoint", self._target)
        self.steps = self._saved.get("steps", 0)
        self.folder = self.bank_folder(trainer)
        self.mixing = None
        if trainer.global_rank == 0 or independent(trainer):
            self._collection = self._open(trainer, pl_module)
        self._hook = optimizer.register_step_post_hook(functools.partial(self._collect, trainer))
        warn_of_no_samples(trainer, pl_module, self._first_step)

    @property
    def _first_step(self) -> int:
        return self.burn_in + self.every_n_steps

    @property
    def collection(self) -> Collection:
        """The chains of this process, while it trains."""
        assert self._collection is not None
        return self._collection

    def _open(self, trainer: Trainer, pl_module: LightningModule) -> Collection:
        assert self.folder is not None
        optimizer = sampler_of(trainer)
        group = optimizer.param_groups[0]
        described = ("lr", "num_data", "temperature", "prior_precision")
        return Collection(
            self.folder,
            pl_module,
            first_chain=trainer.global_rank * self.chains,
            chains=self.network if self.chains > 1 else None,
            seen=self._saved.get("seen"),
            max_samples=self.max_samples,
            policy=self.policy,
            dtype=DTYPES[self.dtype],
            metadata={
                "sampler": type(optimizer).__name__,
                "burn_in": self.burn_in,
                "every_n_steps": self.every_n_steps,
                **{name: group.get(f"initial_{name}", group[name]) for name in described},
            },
        )

    def _collect(self, trainer: Trainer, *_: Any) -> None:
        """Runs after each step of the optimizer; not for steps that a gradient scaler skips."""
        self.steps += 1
        after = self.steps - self.burn_in
        if self._collection is None or after <= 0 or after % self.every_n_steps != 0:
            return
        if collects(trainer):
            self._collection.append(self.steps)
            if self.listeners:
                rows = self._collection.rows()
                for listener in self.listeners:
                    listener(rows)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._collection is None or not trainer._logger_connector.should_update_logs:
            return
        temperature = sampler_of(trainer).param_groups[0]["temperature"]
        log = functools.partial(pl_module.log, batch_size=1, rank_zero_only=True)
        log("sgld/samples", float(len(self._collection)), prog_bar=True)
        log("sgld/temperature", float(temperature))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._hook is None:
            return  # there was nothing to train
        if self._collection is not None:
            self._collection.flush()
        trainer.strategy.barrier()
        assert self.folder is not None
        if not trainer.is_global_zero:
            return
        bank = SampleBank(self.folder)
        rank_zero_info(f"SGLDSampler: {bank!r}")
        found = report(bank, self._outputs)
        if isinstance(found, Mixing):
            self.mixing = found
        if found is not None:
            rank_zero_info(str(found))

    # --- evaluation --------------------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.eval_samples == 0:
            return
        if trainer.state.fn == TrainerFn.FITTING:
            bank = self._bank_so_far(trainer)
        else:
            bank = finished_bank(self.bank_folder(trainer), self._first_step)
        if bank is None:
            return
        count = min(self.eval_samples, len(bank))
        self._evaluation = EnsembleEvaluation(bank, pl_module, self.network, count, self.combine)

    on_test_start = on_predict_start = on_validation_start

    def _bank_so_far(self, trainer: Trainer) -> SampleBank | None:
        """The samples of this training, of independent chains its own; None while there are none.

        The other independent chains may be at another step, and are not waited for.
        """
        assert self.folder is not None
        kept = 0
        if self._collection is not None:
            self._collection.flush()
            kept = len(self._collection)
        if independent(trainer):
            assert self._collection is not None
            return SampleBank(self.folder, chains=self._collection.numbers) if kept else None
        return SampleBank(self.folder) if trainer.strategy.broadcast(kept) else None

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._evaluation is not None:
            self.mixing = self._evaluation.finish(trainer, pl_module)
            self._outputs = self._evaluation.outputs if self._evaluation.calls else None

    on_test_epoch_end = on_validation_epoch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_evaluation()

    on_test_end = on_predict_end = on_validation_end

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.remove()
            self._evaluation = None

    # --- afterwards --------------------------------------------------------------------------

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()
        try:
            self.close()
        except OSError as error:
            rank_zero_warn(f"{error} This object keeps them until its close() succeeds.")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        self.close()

    def _release(self) -> None:
        """Leave the module as one that no Trainer holds."""
        self._end_evaluation()
        self._outputs = None
        while self._undo:
            self._undo.pop()()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def close(self) -> None:
        """Write what is in memory, and let others write the bank.

        The end of training does this. Call it again where that failed, for example because the disk
        was full.

        Raises:
            OSError: if writing fails; nothing is lost.
        """
        if self._collection is not None:
            self._saved = self.state_dict()
            self._collection.close()
            self._collection = None

    # --- state -------------------------------------------------------------------------------

    def bank_folder(self, trainer: Trainer) -> Path:
        """The folder of the bank, also where nothing is trained."""
        if self.dirpath is not None:
            return Path(self.dirpath)
        if "folder" in self._saved:
            return Path(self._saved["folder"])
        folder = run_folder(trainer) if trainer.loggers else Path(trainer.default_root_dir)
        return Path(trainer.strategy.broadcast(str(folder / "posterior")))

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._collection is not None:
            self._collection.flush()  # a killed run resumes from here with all samples

    def state_dict(self) -> dict[str, Any]:
        if self._collection is None:
            return dict(self._saved)
        return {"steps": self.steps, "seen": self._collection.seen, "folder": str(self.folder)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = dict(state_dict)
