"""torchmetrics classes for the predictions of posterior samples; without Lightning."""

from lightning_revflip.metrics.calibration import EnsembleCalibrationError
from lightning_revflip.metrics.out_of_distribution import OutOfDistributionDetection
from lightning_revflip.metrics.uncertainty import (
    MutualInformation,
    PredictiveEntropy,
    VariationRatio,
)

__all__ = [
    "EnsembleCalibrationError",
    "MutualInformation",
    "OutOfDistributionDetection",
    "PredictiveEntropy",
    "VariationRatio",
]
