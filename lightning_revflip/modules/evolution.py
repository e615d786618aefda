"""`EvolutionModule`: train any network by evolution strategies, without a backward pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torchmetrics import MeanMetric

from lightning_revflip.flipout.evolution import FlipoutES
from lightning_revflip.flipout.evolution.fitness import Shaping
from lightning_revflip.flipout.evolution.parameters import perturbed_modules
from lightning_revflip.flipout.evolution.settings import check_examples, check_loss
from lightning_revflip.modules.replicas import replica

Batch = Sequence[Any]
"""Inputs of the network, and targets."""


class EvolutionModule(LightningModule):
    """Trains a network on pairs of inputs and targets by `FlipoutES`.

    The fitness of a member is minus its mean loss over some examples. Each batch makes one
    generation, and one step of the optimizer.

    Logs `evolution/fitness_mean`, `evolution/fitness_best`, `evolution/gradient_norm` and
    `evolution/members_per_second`; `val/loss` and `test/loss` of the network without perturbation,
    and with the default loss `val/accuracy` and `test/accuracy`.

    Checkpoint: seed and generation, so that a resumed run has the members that the other would have
    had, and the arguments but for `network`, `loss` and `optimizer`. Give these again to load one:
    `EvolutionModule.load_from_checkpoint(path, network=...)`. Only checkpoints of a LightningCLI,
    such as `revflip`, hold the configuration of these three as well, and are loaded without them.

    Under DDP each process evaluates its share of the members. Processes with the same batch, or
    with the parts of one batch in order, train as one process with this batch does.

    Does not work with 16-bit mixed precision, whose scaling is for backward passes, nor with
    strategies that cut up parameters; use bf16-mixed, DDP.

    Args:
        network: any network of the layers that `FlipoutES` supports.
        sigma: standard deviation of the perturbations.
        population: number of members, of all processes together.
        base_perturbations: how many independent perturbations members are made from.
        antithetic: whether members come in pairs.
        shaping: what the fitness of a member counts: `rank`, `standardized` or `none`.
        examples: number of examples of each member. They follow one another through the batch,
            which is read again from its start where it ends; None: the whole batch.
        targets: glob patterns that name the modules to perturb; None: all.
        loss: from outputs and targets to one loss for each example; None: cross-entropy.
        optimizer: makes an optimizer of the parameters.
        seed: of the perturbations; the same in all processes.

    Raises:
        ValueError: for settings that do not fit together and parameters that cannot be perturbed;
            at the start of training, for layers that are compiled or that a callback has converted;
            in training, if losses are not equally many for each member.
        MisconfigurationException: at the start of training, with 16-bit mixed precision.

    Examples:
        >>> module = EvolutionModule(nn.Linear(64, 10), sigma=0.05, population=256, examples=4)
        >>> module.evolution
        FlipoutES(sigma=0.05, population=256, base_perturbations=1, antithetic=True, shaping='rank')
    """

    def __init__(
        self,
        network: nn.Module,
        sigma: float = 0.05,
        population: int = 1024,
        base_perturbations: int = 1,
        antithetic: bool = True,
        shaping: Shaping = "rank",
        examples: int | None = None,
        targets: Sequence[str] | None = None,
        loss: nn.Module | Callable[[Tensor, Tensor], Tensor] | None = None,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = Adam,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters(ignore=["network", "loss", "optimizer"])
        if "_instantiator" in self.hparams:  # of a LightningCLI: configurations, not the objects
            self.save_hyperparameters()
        check_examples(examples)
        check_loss(loss)
        self.network = network
        self.examples = examples
        self.targets = targets
        self.loss = loss
        self.make_optimizer = optimizer
        self.evolution = FlipoutES(
            network,
            sigma,
            population,
            base_perturbations,
            antithetic,
            shaping=shaping,
            targets=targets,
            seed=seed,
        )
        means = {"val/loss": MeanMetric(), "test/loss": MeanMetric()}
        if loss is None:
            means |= {"val/accuracy": MeanMetric(), "test/accuracy": MeanMetric()}
        self.means = nn.ModuleDict({name.replace("/", "_"): mean for name, mean in means.items()})

    def forward(self, *inputs: Any) -> Any:
        """The network without perturbation."""
        return self.network(*inputs)

    def per_example_loss(self, batch: Batch) -> Tensor:
        """Losses, (examples,)."""
        inputs, targets = batch
        return self._losses(self.network(inputs), targets)

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.loss is None:
            return F.cross_entropy(outputs, targets, reduction="none")
        losses: Tensor = self.loss(outputs, targets)
        return losses

    # --- training ----------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Divide the members over the processes."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "EvolutionModule has no backward pass whose loss could be scaled, as 16-bit mixed "
                "precision does. Use precision='bf16-mixed' or '32-true'."
            )
        self.evolution.share(*replica(self.trainer))

    def on_train_start(self) -> None:
        """Look at the layers once more, which callbacks may have changed."""
        check_layers(self.network, self.targets)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One generation, evaluated on one batch."""
        start = time.perf_counter()
        evolution = self.evolution
        rows = evolution.repeat(batch, self.examples)
        with evolution.members():
            losses = self.per_example_loss(rows)
        everyone = evolution.gradient(evolution.fitness_of_losses(losses))
        norm = evolution.gradient_norm()
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.step()
        evolution.next_generation()
        self.log_dict(
            {
                "evolution/fitness_mean": everyone.mean(),
                "evolution/fitness_best": everyone.max(),
                "evolution/gradient_norm": norm,
                "evolution/members_per_second": len(everyone) / (time.perf_counter() - start),
            },
            batch_size=1,
        )

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(p for p in self.network.parameters() if p.requires_grad)

    # --- evaluation --------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, part: str, batch: Batch) -> None:
        inputs, targets = batch
        outputs = self.network(inputs)
        values = {"loss": self._losses(outputs, targets)}
        if self.loss is None:
            values["accuracy"] = (outputs.argmax(1) == targets).float()
        for name, value in values.items():
            mean = self.means[f"{part}_{name}"]
            assert isinstance(mean, MeanMetric)
            mean.update(value)
            self.log(f"{part}/{name}", mean, prog_bar=True, batch_size=len(targets))

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Outputs of the network for a batch of inputs, or of pairs of inputs and targets."""
        return self.network(batch if isinstance(batch, Tensor) else batch[0])

    # --- checkpoint --------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["evolution"] = self.evolution.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.evolution.load_state_dict(checkpoint["evolution"])


def check_layers(network: nn.Module, targets: Sequence[str] | None) -> None:
    """Raise unless members can differ in the layers of a network, as these are now.

    Raises:
        ValueError: for layers of other types, and for perturbed layers that are compiled.
    """
    perturbed = {module for _, module, _ in perturbed_modules(network, targets)}
    for path, part in network.named_modules():
        compiled = part._compiled_call_impl is not None or hasattr(part, "_orig_mod")
        if compiled and perturbed.intersection(part.modules()):
            raise ValueError(
                f"{path or 'the network'} is compiled, and members compute with other weights in "
                "each generation, for which it would be compiled anew each time. Do not compile "
                "what evolution strategies perturb."
            )
