"""The networks of the MNIST recipe, and how the classifier trains and reports."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from recipes.mnist.batches import Batch
from recipes.mnist.data import HandwrittenDigits
from recipes.mnist.module import Classifier
from recipes.mnist.networks import cnn, mlp
from tests.helpers.models import quiet_trainer

REAL = os.environ.get("REVFLIP_DATA")


# --- networks --------------------------------------------------------------------------------


def sizes(network: nn.Module, kind: type[nn.Module]) -> list[tuple[int, ...]]:
    return [tuple(layer.weight.shape) for layer in network if isinstance(layer, kind)]


@pytest.mark.parametrize(
    ("hidden", "layers"),
    [
        ([100], [(100, 784), (10, 100)]),
        ([400, 400], [(400, 784), (400, 400), (10, 400)]),
        ([], [(10, 784)]),
    ],
)
def test_mlp_has_the_layers_it_is_asked_for(hidden, layers):
    network = mlp(784, hidden, 10)
    assert sizes(network, nn.Linear) == layers
    assert [type(layer) for layer in network] == [nn.Flatten, nn.Linear] + [
        nn.ReLU,
        nn.Linear,
    ] * len(hidden)
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_mlp_computes_what_its_formula_says():
    network = mlp(6, [4], 3).double()
    images = torch.randn(5, 1, 2, 3, dtype=torch.float64)
    weights = [p.detach() for p in network.parameters()]
    hidden = (images.reshape(5, 6) @ weights[0].T + weights[1]).clamp(min=0)
    torch.testing.assert_close(network(images), hidden @ weights[2].T + weights[3])


@pytest.mark.parametrize(
    ("shape", "features"), [((1, 28, 28), 64 * 7 * 7), ((1, 8, 8), 64 * 2 * 2), ((3, 5, 9), 128)]
)
def test_cnn_reads_images_of_any_size(shape, features):
    network = cnn(shape, 7)
    assert sizes(network, nn.Conv2d) == [(32, shape[0], 5, 5), (64, 32, 5, 5)]
    assert sizes(network, nn.Linear) == [(1024, features), (7, 1024)]
    assert network(torch.zeros(2, *shape)).shape == (2, 7)


def test_cnn_has_the_sizes_it_is_asked_for():
    network = cnn((1, 8, 8), 10, channels=[4], hidden=[])
    assert sizes(network, nn.Conv2d) == [(4, 1, 5, 5)]
    assert sizes(network, nn.Linear) == [(10, 4 * 4 * 4)]


def test_impossible_networks_are_rejected():
    with pytest.raises(ValueError, match=r"3x8 pixels cannot be halved 2 times.*than \[32, 64\]"):
        cnn((1, 3, 8), 10)
    with pytest.raises(ValueError, match=r"at least 1, got \[784, 0, 10\]"):
        mlp(784, [0], 10)


def test_units_of_every_hidden_layer_are_dropped_in_training_alone():
    torch.manual_seed(0)
    network = mlp(6, [400, 400], 3, dropout=0.25)
    assert [type(layer) for layer in network] == [nn.Flatten] + [
        nn.Linear,
        nn.ReLU,
        nn.Dropout,
    ] * 2 + [nn.Linear]
    images = torch.randn(50, 1, 2, 3)
    plain = network[:3](images)  # before the first dropout
    dropped = network[:4](images)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], plain[kept] / 0.75)
    # About 10,000 active units: the standard error of the share is 0.0043, and 5 of these 0.022.
    share = kept.sum() / (plain != 0).sum()
    assert share.item() == pytest.approx(0.75, abs=0.022)
    network.eval()
    assert torch.equal(network[:4](images), plain)


def test_cnn_drops_units_behind_its_convolutions():
    network = cnn((1, 8, 8), 10, hidden=[20, 20], dropout=0.5)
    kinds = [type(layer) for layer in network]
    assert kinds[-7:] == [nn.Linear, nn.ReLU, nn.Dropout] * 2 + [nn.Linear]
    assert kinds.count(nn.Dropout) == 2


def test_weights_of_networks_without_dropout_keep_their_names():
    assert list(mlp(6, [4], 3).state_dict()) == ["1.weight", "1.bias", "3.weight", "3.bias"]


# --- training --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        ("mlp", {"optimizer": "adam", "lr": 1e-2}),
        ("mlp", {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}),
        ("mlp", {"dropout": 0.5, "lr": 1e-2}),
        ("cnn", {"channels": [8, 16], "lr": 3e-3}),
    ],
    ids=["mlp-adam", "mlp-sgd", "mlp-dropout", "cnn-adam"],
)
def test_digits_are_learned_to_95_per_cent(tmp_path, network, arguments):
    seed_everything(1, verbose=False)
    model = Classifier(network=network, hidden=[100], **arguments)
    trainer = quiet_trainer(tmp_path, max_epochs=20, limit_val_batches=0)
    data = HandwrittenDigits(source="digits", batch_size=32)
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    assert found["test/accuracy"] >= 0.95
    assert found["test/nll"] < 0.25
    assert found["test/ece"] < 0.05


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="needs REVFLIP_DATA")
def test_real_mnist_is_learned_to_95_per_cent_in_two_epochs(tmp_path):
    seed_everything(1, verbose=False)
    model = Classifier(optimizer="sgd", lr=0.1, momentum=0.9)
    trainer = quiet_trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    data = HandwrittenDigits(source="mnist", root=REAL)
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    assert found["test/accuracy"] >= 0.95


def test_loss_is_the_mean_negative_log_likelihood_of_an_example():
    torch.manual_seed(0)
    model = Classifier((1, 2, 3), 4, hidden=[]).double()
    model.log = lambda *args, **kwargs: None
    images, labels = torch.randn(5, 1, 2, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3])
    scores = images.flatten(1) @ model.network[1].weight.T + model.network[1].bias
    likelihood = scores.exp()[range(5), labels] / scores.exp().sum(1)
    loss = model.training_step(Batch(images, labels), 0)
    torch.testing.assert_close(loss, -likelihood.log().sum() / 5)


# --- reports ---------------------------------------------------------------------------------


class Fixed(LightningDataModule):
    """Four images of two pixels, which are the logits of two classes, in batches of 3 and 1."""

    image_shape = (1, 1, 2)
    num_classes = 2
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0], [0.0, 3.0]])
    labels = torch.tensor([0, 1, 1, 1])

    def _batches(self) -> DataLoader:
        images = self.logits.view(4, 1, 1, 2)
        batches = [Batch(images[:3], self.labels[:3]), Batch(images[3:], self.labels[3:])]
        return DataLoader(batches, batch_size=None)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _batches


class Identity(Classifier):
    """A classifier whose logits are the pixels."""

    def configure_model(self) -> None:
        super().configure_model()
        with torch.no_grad():
            self.network[1].weight.copy_(torch.eye(2))
            self.network[1].bias.zero_()


def test_validation_and_test_report_over_all_images(tmp_path):
    trainer, model = quiet_trainer(tmp_path), Identity(hidden=[])
    data = Fixed()
    (validated,) = trainer.validate(model, data, verbose=False)
    (tested,) = trainer.test(model, data, verbose=False)
    probs = data.logits.softmax(-1)
    nll = -probs[range(4), data.labels].log().mean().item()
    # Every confidence has a bin of its own, so that the error is the mean distance to 0 or 1.
    confidence, right = probs.max(-1).values, torch.tensor([1.0, 1.0, 0.0, 1.0])
    ece = (confidence - right).abs().mean().item()
    assert validated == pytest.approx({"val/accuracy": 0.75, "val/nll": nll}, rel=1e-6)
    expected = {"test/accuracy": 0.75, "test/nll": nll, "test/ece": ece}
    assert tested == pytest.approx(expected, rel=1e-5)


def test_prediction_gives_probabilities(tmp_path):
    found = quiet_trainer(tmp_path).predict(Identity(hidden=[]), Fixed())
    assert [len(batch) for batch in found] == [3, 1]
    torch.testing.assert_close(torch.cat(found), Fixed.logits.softmax(-1))


def test_training_logs_the_loss_of_each_step(tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(tmp_path, max_epochs=1, logger=logger, log_every_n_steps=1)
    trainer.fit(Classifier(hidden=[]), Fixed())
    assert (Path(logger.log_dir) / "metrics.csv").read_text().count("\n") == 1 + 2 + 1
    assert set(trainer.callback_metrics) == {"train/loss", "val/accuracy", "val/nll"}


# --- sizes and checkpoints -------------------------------------------------------------------


def test_sizes_come_from_the_data_module_and_stand_in_the_checkpoint(tmp_path):
    model, data = Classifier(hidden=[20]), HandwrittenDigits(source="digits", batch_size=400)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "model.ckpt")
    assert (loaded.image_shape, loaded.num_classes) == ((1, 8, 8), 10)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(loaded(images), model(images))


def test_run_stopped_within_an_epoch_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    def train(ckpt_path: Path | None = None) -> Classifier:
        seed_everything(1, verbose=False)
        model, data = Classifier(hidden=[5]), HandwrittenDigits(source="digits", batch_size=300)
        checkpoint = ModelCheckpoint(
            tmp_path / "saved", "{step}", every_n_train_steps=6, save_top_k=-1
        )
        trainer = quiet_trainer(
            tmp_path,
            max_epochs=-1,
            max_steps=10,
            limit_val_batches=0,
            enable_checkpointing=True,
            callbacks=[checkpoint],
        )
        trainer.fit(model, data, ckpt_path=ckpt_path)
        return model

    unbroken = train()
    resumed = train(tmp_path / "saved" / "step=6.ckpt")  # in the second epoch of 4 steps
    for p, q in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_network_is_made_once(tmp_path):
    model, data = Classifier([1, 8, 8], 10), HandwrittenDigits(source="digits")
    network = model.network
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert model.network is network


def test_new_network_is_like_that_of_the_model_with_weights_of_its_own():
    for model in (
        Classifier((1, 8, 8), 10, hidden=[5], dropout=0.5),
        Classifier((1, 8, 8), 3, "cnn"),
    ):
        network = model.new_network()
        assert str(network) == str(model.network)
        assert not torch.equal(network[-1].weight, model.network[-1].weight)
    with pytest.raises(RuntimeError, match="The network does not exist yet"):
        Classifier().new_network()


def test_images_of_another_shape_than_the_model_are_explained(tmp_path):
    model, data = Classifier((1, 28, 28), 10), HandwrittenDigits(source="digits")
    with pytest.raises(
        ValueError, match=r"shape \(1, 28, 28\) in 10 .*: \(\(1, 8, 8\), 10\)\. Use"
    ):
        quiet_trainer(tmp_path).test(model, data, verbose=False)


def test_unknown_sizes_are_explained(tmp_path):
    with pytest.raises(ValueError, match=r"not known.*Give Classifier\(image_shape="):
        quiet_trainer(tmp_path).validate(Classifier(), Fixed().val_dataloader())
    with pytest.raises(RuntimeError, match="The network does not exist yet"):
        Classifier()(torch.zeros(1, 1, 8, 8))


def test_optimizer_has_the_values_it_is_given():
    model = Classifier((1, 8, 8), 10, optimizer="sgd", lr=0.5, momentum=0.8, weight_decay=1e-4)
    (group,) = model.configure_optimizers().param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.8, 1e-4)
    model = Classifier((1, 8, 8), 10, optimizer="adam", lr=0.5, weight_decay=1e-4)
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 1e-4)


def test_adam_decays_weights_as_a_penalty_on_their_squares():
    model = Classifier((1, 1, 2), 2, hidden=[], lr=0.1, weight_decay=0.3)
    penalized = Classifier((1, 1, 2), 2, hidden=[], lr=0.1)
    penalized.load_state_dict(model.state_dict())
    images, labels = torch.ones(1, 1, 1, 2), torch.tensor([0])

    def loss(of: Classifier) -> Tensor:
        return F.cross_entropy(of(images), labels)

    squares = sum(p.square().sum() for p in penalized.parameters())
    loss(model).backward()
    (loss(penalized) + 0.3 / 2 * squares).backward()
    for each in (model, penalized):
        each.configure_optimizers().step()
    for p, q in zip(model.parameters(), penalized.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"network": "rnn"}, "network must be 'mlp' or 'cnn', got 'rnn'"),
        ({"optimizer": "adamw"}, "optimizer must be 'sgd' or 'adam', got 'adamw'"),
        ({"channels": [8]}, r"channels belong to a cnn, but network is 'mlp'; got \[8\]"),
        ({"momentum": 0.9}, "momentum belongs to sgd, but optimizer is 'adam'"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1\.0"),
        (
            {"dropout": 0.5, "hidden": []},
            "dropout drops units of hidden layers, but there are none",
        ),
        ({"lr": 0.0}, r"lr must be a positive number, got 0\.0"),
        ({"optimizer": "sgd", "momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"num_classes": 10}, "Give both image_shape and num_classes, or neither"),
    ],
    ids=[
        "network",
        "optimizer",
        "channels",
        "adam",
        "dropout",
        "linear",
        "lr",
        "momentum",
        "decay",
        "sizes",
    ],
)
def test_arguments_that_make_no_sense_are_rejected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Classifier(**kwargs)
