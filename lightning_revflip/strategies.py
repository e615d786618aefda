"""`IndependentChainsStrategy`: as many runs at once as there are devices, each its own chain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import distributed, nn
from torch.nn.parameter import UninitializedParameter

from lightning_revflip._generators import get_generators, seed_generators, set_generators
from lightning_revflip.flipout.noise import derive

GRADIENT_OPTIONS = (
    "ddp_comm_state",
    "ddp_comm_hook",
    "ddp_comm_wrapper",
    "model_averaging_period",
)


class IndependentChainsStrategy(DDPStrategy):
    """Each process trains a model of its own on all data: Markov chains, or a deep ensemble.

    Nothing is averaged between processes. Each reads all batches, as a run on one device would, and
    draws random numbers of its own: chain k of a run that begins with `seed_everything(seed)` is,
    bit for bit on a CPU, the run on one device that begins with `seed_everything(chain_seed(seed,
    k))`; chain 0 is the run with the seed itself. (Loaders that shuffle by a seed of their own give
    all chains the same order.)

    **Initial weights.** What is drawn in `configure_model` differs between the chains. A model that
    draws its weights in `__init__` starts all chains from the same ones, of which a warning tells,
    unless `different_init` draws them anew.

    **Logged values.** What a LightningModule logs with `sync_dist=True`, and torchmetrics that it
    logs as objects, are means over the chains. Other values are those of each chain, of which
    loggers show chain 0. What `ModelCheckpoint` or `EarlyStopping` monitors should be a mean, so
    that all chains decide alike.

    **Checkpoints.** `last.ckpt` is the checkpoint of chain 0, an ordinary one, and
    `chain-0001/last.ckpt` beside it that of chain 1 (`chain_path`). To resume, test or predict give
    the first; each chain reads its own. All processes must see the folder.

    Chains wait for each other where values are synchronised, for checkpoints and at the end of
    training, at most for the `timeout` (half an hour). If one fails, all end with an error.

    Does not work with `sync_batchnorm` and options of `DistributedDataParallel`, which would have
    no effect and raise.

    Args:
        different_init: draw the weights that exist when fitting starts anew in all chains but
            chain 0: by `reset_parameters` of the LightningModule if it has one, otherwise of all
            modules with weights that require gradients. Weights that were trained or drawn in
            another way before are lost, so this is for models that only `torch.nn` has
            initialised. A checkpoint that is resumed is loaded afterwards.
        options: of `DDPStrategy` that concern processes, such as `timeout`, `start_method` and
            `process_group_backend`.

    Raises:
        TypeError: for other options.
        ValueError: when fitting starts, if `different_init` meets weights that no
            `reset_parameters` draws; with `sync_batchnorm`; for a checkpoint whose files are of
            different steps.
        FileNotFoundError: if a chain's file of a checkpoint is missing.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(
        ...     strategy=IndependentChainsStrategy(), accelerator="cpu", devices=4, logger=False
        ... )
        >>> trainer.world_size
        4

        Once this module is imported, `Trainer(strategy="independent_chains")` does the same.
    """

    def __init__(self, different_init: bool = False, **options: Any) -> None:
        super().__init__(**options)
        without_effect = [
            *self._ddp_kwargs,
            *(name for name in GRADIENT_OPTIONS if name in options),
        ]
        if without_effect:
            raise TypeError(
                f"IndependentChainsStrategy got {', '.join(without_effect)}, but it synchronises "
                "no gradients. Leave out what concerns DistributedDataParallel."
            )
        self.different_init = different_init
        self._is_seeded = False
        self._has_fitted = False

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        strategy_registry.register(
            "independent_chains", cls, description="Each process trains its own chain on all data"
        )

    # --- processes and data ------------------------------------------------------------------

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """One replica: every process reads all data."""
        return {"num_replicas": 1, "rank": 0}

    def setup_environment(self) -> None:
        # DDP seeds all processes alike here, where a run on one device goes on drawing.
        generators = get_generators()
        super().setup_environment()
        set_generators(generators)

        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        # A sampler of Lightning would shuffle by another seed than the loader's own.
        trainer._accelerator_connector.use_distributed_sampler = False
        if self.global_rank > 0 and not self._is_seeded:
            seed_generators(chain_seed(torch.initial_seed(), self.global_rank))
        self._is_seeded = True
        if trainer.state.fn == TrainerFn.FITTING and not self._has_fitted:
            self._has_fitted = True
            if self.different_init:
                self._draw_weights()

    def _draw_weights(self) -> None:
        assert self.lightning_module is not None
        check_resettable(self.lightning_module)  # in all processes, so that all raise
        if self.global_rank > 0:
            reset_parameters(self.lightning_module)

    def setup(self, trainer: Trainer) -> None:
        if self._layer_sync is not None:
            raise ValueError(
                "sync_batchnorm=True would share the statistics of batches between independent "
                "chains. Leave it out."
            )
        if trainer.state.fn == TrainerFn.FITTING and trainer.ckpt_path is None:
            self._warn_of_equal_weights()
        # Not the method of DDPStrategy: it wraps the model to average gradients, or copies the
        # weights of rank 0 to all processes.
        super(DDPStrategy, self).setup(trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        return model

    def on_train_end(self) -> None:
        # Nothing else would tell chain 0 that another one has failed.
        self.barrier()

    def _warn_of_equal_weights(self) -> None:
        assert self.lightning_module is not None
        found = [
            float(parameter.detach().sum(dtype=torch.float64))
            for parameter in self.lightning_module.parameters()
            if not isinstance(parameter, UninitializedParameter)
        ]
        first, *others = self._from_all(found)
        if others and found and all(other == first for other in others):
            rank_zero_warn(
                "All chains start from the same weights, so R-hat may miss that they have not "
                "mixed. Make the layers in `configure_model`, or use "
                "IndependentChainsStrategy(different_init=True)."
            )

    def _from_all(self, value: Any) -> list[Any]:
        """What each process gives here, in the order of the chains."""
        found: list[Any] = [None] * self.world_size
        distributed.all_gather_object(found, value)
        return found

    # --- checkpoints -------------------------------------------------------------------------

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Each process writes its own file, under the name that chain 0 gives."""
        # Names may hold values of metrics, which differ between the chains.
        path = chain_path(self.broadcast(filepath), self.global_rank)
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options=storage_options)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Chain 0 decides which checkpoints are kept, and removes the files of all chains."""
        if self.is_global_zero:
            for chain in range(self.world_size):
                self.checkpoint_io.remove_checkpoint(chain_path(filepath, chain))

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Each process reads its own file; all raise if one of them is missing."""
        checkpoint_path = self.broadcast(checkpoint_path)
        if os.path.islink(checkpoint_path):  # ModelCheckpoint(save_last="link")
            checkpoint_path = os.path.realpath(checkpoint_path)
        path = chain_path(checkpoint_path, self.global_rank)
        missing = self._from_all(None if _exists(path) else path)
        if any(missing):
            raise FileNotFoundError(
                "A checkpoint of independent chains has a file for each chain, but these are "
                f"missing: {', '.join(filter(None, missing))}. Use as many devices as there were "
                "chains. For other chains, or to start all from one checkpoint, load its weights "
                "into the model instead."
            )
        if self.is_global_zero and _exists(chain_path(checkpoint_path, self.world_size)):
            rank_zero_warn(
                f"{checkpoint_path} has more chains than there are devices now, "
                f"{self.world_size}. The others are left alone."
            )
        checkpoint = super().load_checkpoint(path, weights_only)
        steps = self._from_all(checkpoint.get("global_step"))
        if len(set(steps)) > 1:
            raise ValueError(
                f"The chains of the checkpoint {checkpoint_path} are at different steps: {steps}. "
                "The run must have been stopped while it was written. Use an older checkpoint."
            )
        return checkpoint


IndependentChainsStrategy.register_strategies(StrategyRegistry)


def chain_path(path: str | Path, chain: int) -> str:
    """The file of one chain of a checkpoint.

    Args:
        path: of the checkpoint, which is the file of chain 0.
        chain: number of the chain.

    Examples:
        >>> chain_path("checkpoints/last.ckpt", 2)
        'checkpoints/chain-0002/last.ckpt'
    """
    # A folder of its own: Lightning takes all files beside it that begin with `last` for the last.
    folder, name = os.path.split(path)
    return os.path.join(folder, f"chain-{chain:04d}", name) if chain > 0 else str(path)


def chain_seed(seed: int, chain: int) -> int:
    """The seed of one chain of a run.

    Args:
        seed: of the run.
        chain: number of the chain.

    Returns:
        `seed` for chain 0; for others a number from 0 to 2^32 - 1, as `seed_everything` takes.
    """
    return seed if chain == 0 else derive(seed, chain) % 2**32


def check_resettable(model: nn.Module) -> None:
    """Raise if `reset_parameters` would leave some weights of a model as they are.

    Raises:
        ValueError: naming the modules, if these have weights that require gradients and no
            `reset_parameters`, or if some of their weights require gradients and others do not.
    """
    if hasattr(model, "reset_parameters"):
        return
    wrong = []
    for name, module in model.named_modules():
        needs = {parameter.requires_grad for parameter in module.parameters(recurse=False)}
        if True in needs and (False in needs or _reset_of(module) is None):
            wrong.append(f"{name or 'the LightningModule'} ({type(module).__name__})")
    if wrong:
        raise ValueError(
            "different_init=True cannot draw all weights anew: these modules have no "
            f"`reset_parameters`, or are frozen in part: {', '.join(wrong)}. Make the layers in "
            "`configure_model`, or give the LightningModule a method `reset_parameters`."
        )


def reset_parameters(model: nn.Module) -> None:
    """Draw the weights of a model that require gradients anew, in the order of construction."""
    own = getattr(model, "reset_parameters", None)
    if own is not None:
        own()
        return
    done: set[nn.Module] = set()

    def reset(module: nn.Module) -> None:
        trained = any(p.requires_grad for p in module.parameters(recurse=False))
        draw = _reset_of(module)
        if trained and draw is not None and module not in done:
            done.add(module)
            draw()

    model.apply(reset)  # layers before those that contain them, as when they were made


def _reset_of(module: nn.Module) -> Any:
    """The method that draws a module's weights; nn.MultiheadAttention's begins with `_`."""
    return getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))


def _exists(path: str) -> bool:
    return bool(get_filesystem(path).exists(path))
