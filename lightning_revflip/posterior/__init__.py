"""What sampling leaves: samples on disk, distributions fitted to them, and their predictions.

Plain torch, without Lightning. `protocol.py` says what every posterior can do; `bank.py` and
`writer.py` keep samples in a folder, `gaussian.py` fits distributions to them, `fitted.py` says
what those have in common with a distilled posterior, `predict.py`
computes with many samples at once, and `uncertainty.py` says how sure the predictions are.
"""

from lightning_revflip.posterior.bank import SampleBank
from lightning_revflip.posterior.buffers import reestimate_buffers
from lightning_revflip.posterior.fitted import FittedPosterior
from lightning_revflip.posterior.gaussian import DiagonalGaussian, LowRankGaussian
from lightning_revflip.posterior.layout import Layout, Parameters
from lightning_revflip.posterior.moments import Rows
from lightning_revflip.posterior.predict import predict
from lightning_revflip.posterior.protocol import Posterior
from lightning_revflip.posterior.uncertainty import (
    expected_entropy,
    max_probability,
    mutual_information,
    negative_log_likelihood,
    predictive_entropy,
    variation_ratio,
)
from lightning_revflip.posterior.writer import ChainWriter

__all__ = [
    "ChainWriter",
    "DiagonalGaussian",
    "FittedPosterior",
    "Layout",
    "LowRankGaussian",
    "Parameters",
    "Posterior",
    "Rows",
    "SampleBank",
    "expected_entropy",
    "max_probability",
    "mutual_information",
    "negative_log_likelihood",
    "predict",
    "predictive_entropy",
    "reestimate_buffers",
    "variation_ratio",
]
