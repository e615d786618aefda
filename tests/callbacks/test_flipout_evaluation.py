"""`Flipout` in validation, test and prediction: mean weights, or several networks."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from torch import Tensor
from torchmetrics import MeanSquaredError

from lightning_revflip.callbacks import Flipout
from lightning_revflip.convert import convert
from lightning_revflip.flipout import FLIPOUT_LAYERS, Gaussian, sampling
from tests.helpers.flipout import Regressor, data, loader, weights
from tests.helpers.models import quiet_trainer


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_is_by_the_mean_weights(tmp_path, stage: str) -> None:
    model = Regressor()
    x, y = data().tensors
    expected = 0.5 * (model.net(x) - y).square().mean()
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout(perturbation=Gaussian(init_std=1.0))])
    (results,) = getattr(trainer, stage)(model, loader(), verbose=False)
    assert list(results.values()) == pytest.approx([float(expected)], rel=1e-5)


class Measuring(Regressor):
    """Logs a torchmetrics metric beside the loss, and takes notes of every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()
        self.passes: list[tuple[Tensor, Tensor]] = []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.error(self(batch[0]), batch[1])
        self.log("val_error", self.error)
        self.passes.append((batch[0], self(batch[0])))
        return {"number": len(self.passes)}

    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)
        self.validation_step(batch, batch_idx)


def test_validation_averages_metrics_over_networks(tmp_path) -> None:
    model = Measuring()
    callback = Flipout(perturbation=Gaussian(init_std=0.5), validate_samples=3)
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    # 3 batches of which the last is shorter
    (results,) = trainer.validate(model, loader(6), verbose=False)
    assert len(model.passes) == 9
    y = data().tensors[1]
    # Pass 3 * batch + k is that of network k.
    networks = [torch.cat([output for _, output in model.passes[k::3]]) for k in range(3)]
    assert not torch.allclose(networks[0], networks[1])
    losses = [0.5 * (output - y).square().mean() for output in networks]
    expected = float(torch.stack(losses).mean())
    assert results["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert results["val_error"] == pytest.approx(2 * expected, rel=1e-5)
    assert "validation_step" not in vars(model)


def test_each_draw_is_one_network_in_all_batches_and_evaluations(tmp_path) -> None:
    outputs = []
    for batch_size in (4, 16):
        model = Measuring()
        seed_everything(0)
        for layer in (model.net[0], model.net[2]):
            layer.reset_parameters()
        seed_everything(batch_size)
        trainer = quiet_trainer(tmp_path, callbacks=[Flipout(validate_samples=2)])
        for _ in range(2):
            trainer.test(model, loader(batch_size), verbose=False)
            outputs.append(torch.cat([output for _, output in model.passes[1::2]]))
            model.passes.clear()
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("samples", [0, 4])
def test_evaluation_does_not_disturb_training(tmp_path, samples: int) -> None:
    results = []
    for validation in (None, loader()):
        seed_everything(1)
        model = Regressor()
        trainer = quiet_trainer(
            tmp_path, callbacks=[Flipout(validate_samples=samples)], max_epochs=3
        )
        trainer.fit(model, loader(), validation)
        results.append(weights(model))
    assert torch.equal(*results)


def test_prediction_returns_every_network(tmp_path) -> None:
    class Pair(Regressor):
        def predict_step(self, batch, batch_idx):
            output = self(batch[0])
            return {"output": output, "sizes": (output.abs(), batch[0])}

    model = Pair()
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout(predict_samples=5)])
    predictions = trainer.predict(model, loader(4))
    outputs = torch.cat([part["output"] for part in predictions], dim=1)
    assert outputs.shape == (5, 16, 1)
    assert torch.equal(predictions[0]["sizes"][0], predictions[0]["output"].abs())
    assert outputs.std(dim=0).min() > 0
    # The mean weights are as before, and predict without a draw.
    x = data().tensors[0]
    plain = quiet_trainer(tmp_path, callbacks=[Flipout()]).predict(model, loader(16))
    assert torch.equal(plain[0]["output"], model.net.eval()(x))


def test_predictions_have_the_spread_of_the_weights(tmp_path) -> None:
    """Var y = std^2 * |x|^2 for one linear layer."""

    class Linear(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(3, 1)

    callback = Flipout(perturbation=Gaussian(init_std=0.3), predict_samples=2000)
    model = Linear()
    outputs = quiet_trainer(tmp_path, callbacks=[callback]).predict(model, loader(16))[0]
    x = data().tensors[0]
    expected = 0.3 * x.norm(dim=1, keepdim=True)
    # Relative standard error of a standard deviation: 1 / sqrt(2 * 2000) = 1.6 %; 16 of them.
    torch.testing.assert_close(outputs.std(dim=0), expected, rtol=0.07, atol=0)
    assert ((outputs.mean(dim=0) - model.net.eval()(x)).abs() < 5 * expected / 2000**0.5).all()


def test_predictions_that_cannot_be_stacked_are_refused(tmp_path) -> None:
    class Named(Regressor):
        def predict_step(self, batch, batch_idx):
            return "a string"

    trainer = quiet_trainer(tmp_path, callbacks=[Flipout(predict_samples=2)])
    with pytest.raises(ValueError, match=r"predict_step must return tensors .*, got str"):
        trainer.predict(Named(), loader())


def test_a_step_that_fetches_its_batches_cannot_be_repeated(tmp_path) -> None:
    class Fetching(Regressor):
        def validation_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            self.log("val_loss", self.loss(batch), batch_size=4)

    trainer = quiet_trainer(tmp_path, callbacks=[Flipout(validate_samples=2)])
    with pytest.raises(ValueError, match="each of its batches can be fetched only once"):
        trainer.validate(Fetching(), loader())
    quiet_trainer(tmp_path, callbacks=[Flipout()]).validate(Fetching(), loader(), verbose=False)


def test_the_step_is_itself_again_after_an_error(tmp_path) -> None:
    class Failing(Regressor):
        def validation_step(self, batch, batch_idx):
            raise KeyError("enough")

    model = Failing()
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout(validate_samples=2)])
    with pytest.raises(KeyError, match="enough"):
        trainer.validate(model, loader())
    assert "validation_step" not in vars(model)


def test_one_callback_samples_for_all(tmp_path) -> None:
    callbacks = [
        Flipout(["net.0"], validate_samples=2),
        Flipout(["net.2"], validate_samples=2),
    ]
    with pytest.raises(MisconfigurationException, match="Give it to one of them alone"):
        quiet_trainer(tmp_path, callbacks=callbacks).validate(Regressor(), loader())
    callbacks[1].validate_samples = 0
    model = Measuring()
    quiet_trainer(tmp_path, callbacks=callbacks).validate(model, loader(16), verbose=False)
    first, second = (output for _, output in model.passes)
    assert not torch.equal(first, second)


def test_a_step_may_draw_by_itself(tmp_path) -> None:
    """The other way: the metric of the mean prediction, by `sample_n` or `sampling` in the step."""

    class Own(Regressor):
        def validation_step(self, batch, batch_idx):
            with sampling(self, "shared"):
                self.log("val_loss", self.loss(batch))

    model = Own()
    convert(model, FLIPOUT_LAYERS)
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout()])
    values = [trainer.validate(model, loader(), verbose=False)[0]["val_loss"] for _ in range(2)]
    assert values[0] != values[1]
