"""An ordinary classifier of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from recipes.mnist.batches import Batch
from recipes.mnist.networks import Shape, cnn, mlp

UNKNOWN_SIZES = (
    "The network does not exist yet. Give Classifier(image_shape=..., num_classes=...), or let a "
    "Trainer with a data module that has these run it."
)


class Classifier(LightningModule):
    """An MLP or a CNN that is trained on the mean negative log-likelihood of the labels.

    Logs `train/loss`; `val/accuracy` and `val/nll`; `test/accuracy`, `test/nll` and `test/ece`, the
    expected calibration error over 15 bins of confidence (Guo et al., 2017, arXiv 1706.04599).
    `nll` is in nats per image.

    Args:
        image_shape: channels, height and width of an image. None: those of the data module.
        num_classes: number of classes. None: that of the data module.
        network: `mlp` or `cnn`.
        hidden: units of each hidden layer, of a `cnn` those behind the convolutions.
        channels: output channels of each convolution of a `cnn`; None is (32, 64).
        dropout: probability with which a unit of a hidden layer is dropped in training.
        optimizer: `sgd` or `adam`.
        lr: learning rate.
        momentum: of `sgd`.
        weight_decay: of all parameters.

    Raises:
        ValueError: for an unknown network or optimizer, for values out of range or that would have
            no effect, and if the sizes are neither given nor known from the data module, or differ
            from those of its images.
    """

    def __init__(
        self,
        image_shape: Shape | None = None,
        num_classes: int | None = None,
        network: Literal["mlp", "cnn"] = "mlp",
        hidden: Sequence[int] = (100,),
        channels: Sequence[int] | None = None,
        dropout: float = 0.0,
        optimizer: Literal["sgd", "adam"] = "adam",
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if network not in ("mlp", "cnn"):
            raise ValueError(f"network must be 'mlp' or 'cnn', got {network!r}.")
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be 'sgd' or 'adam', got {optimizer!r}.")
        if channels is not None and network == "mlp":
            raise ValueError(
                f"channels belong to a cnn, but network is 'mlp'; got {list(channels)}. Leave them "
                "out, or set network: cnn."
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}.")
        if dropout > 0 and not hidden:
            raise ValueError(
                f"dropout drops units of hidden layers, but there are none; got {dropout}. Leave "
                "it out, or give hidden layers."
            )
        if momentum != 0 and optimizer == "adam":
            raise ValueError(
                f"momentum belongs to sgd, but optimizer is 'adam'; got {momentum}. Leave it out, "
                "or set optimizer: sgd."
            )
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be a positive number, got {lr}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}.")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least 0, got {weight_decay}.")
        if (image_shape is None) != (num_classes is None):
            raise ValueError(
                "Give both image_shape and num_classes, or neither to take them from the data "
                f"module; got {image_shape} and {num_classes}."
            )
        self.network_name = network
        self.hidden = hidden
        self.channels = (32, 64) if channels is None else channels
        self.dropout = dropout
        self.optimizer_name = optimizer
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay

        self.image_shape: Shape | None = None
        self.network: nn.Sequential | None = None
        if image_shape is not None and num_classes is not None:
            self._make_network(image_shape, num_classes)

    # --- network and metrics -----------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check that a network that exists already fits the data."""
        found = self._sizes_of_the_data()
        if self.network is not None and found not in (None, (self.image_shape, self.num_classes)):
            raise ValueError(
                f"The model is made for images of shape {self.image_shape} in {self.num_classes} "
                f"classes, but the data module has other images and classes: {found}. Use the data "
                "that it was trained on (--data.source), or another checkpoint."
            )

    def configure_model(self) -> None:
        """Make the network once shape and classes are known."""
        if self.network is None:
            found = self._sizes_of_the_data()
            if found is None:
                raise ValueError(
                    "The sizes of the network are not known: the data module has no `image_shape` "
                    "and `num_classes`. Give Classifier(image_shape=..., num_classes=...)."
                )
            image_shape, num_classes = found
            self.save_hyperparameters({"image_shape": image_shape, "num_classes": num_classes})
            self._make_network(image_shape, num_classes)

    def _sizes_of_the_data(self) -> tuple[Shape, int] | None:
        """Shape and number of classes of the data module's images, if it tells them."""
        data = getattr(self.trainer, "datamodule", None)
        shape, classes = (getattr(data, name, None) for name in ("image_shape", "num_classes"))
        return None if shape is None or classes is None else (shape, classes)

    def _make_network(self, image_shape: Shape, num_classes: int) -> None:
        channels, height, width = image_shape  # a list, if it comes from a file
        self.image_shape, self.num_classes = (channels, height, width), num_classes
        self.network = self.new_network()
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_nll = MeanMetric()
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_nll = MeanMetric()
        self.test_ece = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1")

    def new_network(self) -> nn.Sequential:
        """A network like that of the model, with initial weights of its own.

        Callbacks may have put something else in the place of `network`.
        """
        if self.image_shape is None:
            raise RuntimeError(UNKNOWN_SIZES)
        if self.network_name == "mlp":
            inputs = math.prod(self.image_shape)
            return mlp(inputs, self.hidden, self.num_classes, self.dropout)
        return cnn(self.image_shape, self.num_classes, self.channels, self.hidden, self.dropout)

    # --- forward and loss --------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: float32, shape (batch, channels, height, width).

        Returns:
            Logits, shape (batch, classes).
        """
        if self.network is None:
            raise RuntimeError(UNKNOWN_SIZES)
        return self.network(images)

    # --- steps -------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch.images), batch.labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self(batch.images)
        self.val_accuracy.update(logits, batch.labels)
        self.val_nll.update(F.cross_entropy(logits, batch.labels, reduction="none"))
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)
        self.log("val/nll", self.val_nll, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self(batch.images)
        self.test_accuracy.update(logits, batch.labels)
        self.test_nll.update(F.cross_entropy(logits, batch.labels, reduction="none"))
        self.test_ece.update(logits.softmax(-1), batch.labels)
        self.log("test/accuracy", self.test_accuracy)
        self.log("test/nll", self.test_nll)
        self.log("test/ece", self.test_ece)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities of the classes, shape (batch, classes)."""
        return self(batch.images).softmax(-1)

    # --- optimization ------------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer:
        if self.optimizer_name == "adam":
            return Adam(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return SGD(
            self.parameters(),
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
