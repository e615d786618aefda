"""What `Flipout` says of optimizers that leave spreads alone, or decay them."""

import warnings

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

from lightning_revflip.callbacks import Flipout
from tests.helpers.flipout import Regressor, fitted


class MeansOnly(Regressor):
    """Was written for a plain network: names the parameters to optimize."""

    def configure_optimizers(self) -> Optimizer:
        return SGD([self.net[0].weight, self.net[2].weight], lr=0.1)


class Grouped(Regressor):
    """Decays means alone."""

    def configure_optimizers(self) -> Optimizer:
        named = dict(self.named_parameters())
        spreads = [p for name, p in named.items() if name.endswith("_rho")]
        others = [p for name, p in named.items() if not name.endswith("_rho")]
        return AdamW([{"params": others}, {"params": spreads, "weight_decay": 0.0}])


def test_parameters_that_no_optimizer_has_are_named(tmp_path) -> None:
    with pytest.warns(UserWarning, match="No optimizer has the weight_rho of some layers"):
        fitted(tmp_path, Flipout(), MeansOnly, max_steps=1)


def test_weight_decay_of_spreads_is_noticed(tmp_path) -> None:
    with pytest.warns(UserWarning, match="a rho of 0 is a standard deviation of 0.69"):
        fitted(tmp_path, Flipout(), lambda: Regressor(torch.optim.AdamW), max_steps=1)


@pytest.mark.parametrize("model", [Grouped, Regressor])
def test_no_warning_where_all_is_well(tmp_path, model) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(No optimizer has|Weight decay acts).*")
        fitted(tmp_path, Flipout(), model, max_steps=1)
