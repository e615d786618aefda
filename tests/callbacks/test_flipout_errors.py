"""What `Flipout` refuses, and what it warns of."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader, SubsetRandomSampler

from lightning_revflip.callbacks import Flipout
from lightning_revflip.flipout import DropConnect
from tests.helpers.flipout import Regressor, Stream, data, fitted, loader
from tests.helpers.models import quiet_trainer


@pytest.mark.parametrize(
    ("train_data", "message"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), "a Stream, has no length. Give Flipout"),
        (lambda: [loader(), loader()], "is a list, not one loader with a `dataset`. Give Flipout"),
        (
            lambda: DataLoader(data(), batch_size=4, sampler=SubsetRandomSampler(range(8))),
            "has 16 items, and its SubsetRandomSampler draws 8 of them. Give Flipout",
        ),
    ],
    ids=["stream", "several", "subset"],
)
def test_an_unknown_number_of_examples_is_asked_for(tmp_path, train_data, message) -> None:
    class First(Regressor):
        def loss(self, batch):
            return super().loss(batch[0] if isinstance(batch[0], list) else batch)

    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, callbacks=[Flipout()]).fit(First(), train_data())
    given = [Flipout(num_data=16)]
    quiet_trainer(tmp_path, callbacks=given).fit(First(), train_data())


def test_another_number_of_examples_warns_with_both(tmp_path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout(num_data=4)])
    with pytest.warns(UserWarning, match=r"num_data=4\) differs from the 16 items"):
        trainer.fit(Regressor(), loader())


def test_annealing_needs_the_length_of_an_epoch(tmp_path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout(num_data=16, annealing_epochs=1)])
    with pytest.raises(ValueError, match="annealing_epochs=1 needs to know the number of batches"):
        trainer.fit(Regressor(), DataLoader(Stream(), batch_size=4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kl_weight": -1.0}, "kl_weight must be a number from 0, got -1.0"),
        ({"kl_weight": float("nan")}, "kl_weight must be a number from 0, got nan"),
        ({"annealing_epochs": -2}, "annealing_epochs must be a number from 0, got -2"),
        ({"num_data": 0}, "num_data must be the number of examples"),
        ({"validate_samples": -1}, "validate_samples must be a number of networks"),
        ({"predict_samples": 1.5}, "predict_samples must be a number of networks"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Flipout(**arguments)


def test_settings_of_a_divergence_without_a_prior_are_refused(tmp_path) -> None:
    callback = Flipout(perturbation=DropConnect(), num_data=16, annealing_epochs=1)
    message = r"num_data and annealing_epochs would have no effect: DropConnect\(p=0.5\) has no"
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, callback)


def test_a_fused_optimizer_that_unscales_by_itself_is_refused(tmp_path) -> None:
    def fused() -> Regressor:
        return Regressor(lambda parameters: torch.optim.Adam(parameters, fused=True))

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match="Use fused=False"):
        fitted(tmp_path, Flipout(), fused, plugins=[plugin])
    fitted(tmp_path, Flipout(), fused)


def test_a_line_search_is_refused(tmp_path) -> None:
    def lbfgs(parameters):
        return torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe")

    with pytest.raises(MisconfigurationException, match="The line search of LBFGS"):
        fitted(tmp_path, Flipout(), lambda: Regressor(lbfgs))
