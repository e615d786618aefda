"""What a posterior over weights is for: anomalies, attacks, and which labels to ask for."""

from lightning_revflip.applications.acquisition import ACQUISITIONS, batch_bald, by_score
from lightning_revflip.applications.active_learning import ActiveLearning, Round
from lightning_revflip.applications.adversarial import AdversarialReport, UnderAttack, under_attack
from lightning_revflip.applications.anomaly import (
    AnomalyReport,
    Detection,
    anomaly_scores,
    detect_anomalies,
    detection,
)
from lightning_revflip.applications.attacks import fgsm, pgd
from lightning_revflip.applications.images import gaussian_noise, read_images, uniform_noise
from lightning_revflip.applications.pool import Pool
from lightning_revflip.applications.predictors import (
    DropoutPredictor,
    NetworkPredictor,
    PosteriorPredictor,
    Predictor,
)
from lightning_revflip.applications.training import LightningTraining

__all__ = [
    "ACQUISITIONS",
    "ActiveLearning",
    "AdversarialReport",
    "AnomalyReport",
    "Detection",
    "DropoutPredictor",
    "LightningTraining",
    "NetworkPredictor",
    "Pool",
    "PosteriorPredictor",
    "Predictor",
    "Round",
    "UnderAttack",
    "anomaly_scores",
    "batch_bald",
    "by_score",
    "detect_anomalies",
    "detection",
    "fgsm",
    "gaussian_noise",
    "pgd",
    "read_images",
    "under_attack",
    "uniform_noise",
]
