"""`ReversibleRNN` in everything that a Trainer does."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.demos.lstm import LightningLSTM
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_revflip.callbacks import ReversibleRNN
from lightning_revflip.convert import load_from_checkpoint, recorded_spec
from lightning_revflip.reversible import RevGRU, RevLSTM, memory_report
from tests.helpers.models import LateTagger, SetupTagger, Tagger, loader, quiet_trainer, tokens


def weights(model: LightningModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("model_class", [Tagger, LateTagger, SetupTagger])
def test_layers_are_reversible_wherever_they_are_made(tmp_path, model_class) -> None:
    model = model_class()
    quiet_trainer(tmp_path, callbacks=[ReversibleRNN()]).fit(model, loader())
    assert type(model.rnn) is RevLSTM
    assert memory_report(model).stored_bits > 0
    assert len(recorded_spec(model).conversions) == 1
    assert "configure_model" not in vars(model)
    assert "setup" not in vars(model)


@pytest.mark.parametrize("rnn", ["GRU", "LSTM"])
def test_training_reduces_the_loss_and_reaches_the_optimizer(tmp_path, rnn: str) -> None:
    seed_everything(0)
    model = Tagger(rnn)
    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN()], max_epochs=15)
    trainer.fit(model, loader(), loader())
    assert trainer.callback_metrics["val_loss"] < 0.5
    optimized = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == set(model.parameters())


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_alone_converts_and_restores(tmp_path, stage: str) -> None:
    model = Tagger()
    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN(2.0)])
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = Tagger()
    other = quiet_trainer(tmp_path, callbacks=[ReversibleRNN(2.0)])
    run = {"validate": other.validate, "test": other.test, "predict": other.predict}[stage]
    run(fresh, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert torch.equal(weights(fresh), weights(model))


def test_resumed_training_ends_where_uninterrupted_training_does(tmp_path) -> None:
    seed_everything(1)
    whole = Tagger()
    quiet_trainer(tmp_path, callbacks=[ReversibleRNN()], max_epochs=4).fit(whole, loader())
    seed_everything(1)
    first = Tagger()
    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN()], max_epochs=2)
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = Tagger()
    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN()], max_epochs=4)
    trainer.fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(weights(second), weights(whole))


def test_fitting_twice_converts_once(tmp_path) -> None:
    model, callback = Tagger(), ReversibleRNN()
    quiet_trainer(tmp_path, callbacks=[callback]).fit(model, loader())
    layer = model.rnn
    quiet_trainer(tmp_path, callbacks=[callback]).fit(model, loader())
    assert model.rnn is layer
    assert len(callback.spec.conversions) == 1


def test_a_model_loaded_from_a_checkpoint_can_be_trained_saved_and_loaded_again(tmp_path) -> None:
    for name in ("one", "two"):
        previous = tmp_path / "one.ckpt"
        model = load_from_checkpoint(Tagger, previous) if name == "two" else Tagger()
        trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN()])
        trainer.fit(model, loader())
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
    assert type(load_from_checkpoint(Tagger, tmp_path / "two.ckpt").rnn) is RevLSTM


def test_accumulated_gradients_equal_those_of_the_whole_batch(tmp_path) -> None:
    results = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        seed_everything(2)
        model = Tagger().double()
        trainer = quiet_trainer(
            tmp_path, callbacks=[ReversibleRNN()], accumulate_grad_batches=accumulate
        )
        trainer.fit(model, loader(batch_size))
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


def test_clipping_scales_the_gradient_to_the_given_norm(tmp_path) -> None:
    class PlainDescent(Tagger):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    seed_everything(2)
    model = PlainDescent().double()
    callback = ReversibleRNN()
    callback.setup(quiet_trainer(tmp_path, callbacks=[callback]), model, "fit")
    start = weights(model)
    trainer = quiet_trainer(
        tmp_path, callbacks=[ReversibleRNN()], gradient_clip_val=0.01, limit_train_batches=1
    )
    trainer.fit(model, loader())
    # One step of length lr * norm.
    assert (weights(model) - start).norm().item() == pytest.approx(0.01, rel=1e-4)


def test_bf16_mixed_trains_with_float32_weights(tmp_path) -> None:
    seed_everything(0)
    model = Tagger()
    trainer = quiet_trainer(
        tmp_path, callbacks=[ReversibleRNN()], max_epochs=15, precision="bf16-mixed"
    )
    trainer.fit(model, loader(), loader())
    assert trainer.callback_metrics["val_loss"] < 0.7
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_two_processes_end_with_the_weights_of_one(tmp_path) -> None:
    ends = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "tests.helpers.train", str(tmp_path), str(processes)]
        subprocess.run(command, check=True, capture_output=True, timeout=240)
        ends.append(torch.load(tmp_path / f"{processes}.pt"))
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=0, atol=1e-9)


def test_a_strategy_that_spawns_needs_a_model_that_was_converted_before(tmp_path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN()], strategy="ddp_spawn", devices=2)
    with pytest.raises(Exception, match="Use strategy='ddp', or call .*convert"):
        trainer.fit(Tagger(), loader())


def test_weight_averaging_must_come_after(tmp_path) -> None:
    for averaging in (WeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)):
        trainer = quiet_trainer(tmp_path, callbacks=[averaging, ReversibleRNN()])
        message = f"Put ReversibleRNN before {type(averaging).__name__}"
        with pytest.raises(MisconfigurationException, match=message):
            trainer.fit(Tagger(), loader())
    model = Tagger()
    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN(), WeightAveraging()])
    trainer.fit(model, loader())
    assert type(model.rnn) is RevLSTM


def test_two_callbacks_with_different_targets_share_a_model(tmp_path) -> None:
    model = Tagger()
    model.extra = nn.Sequential(nn.GRU(8, 4))
    callbacks = [
        ReversibleRNN(1.0, targets=["rnn"]),
        ReversibleRNN(5.0, targets=["extra.*"]),
    ]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks)
    trainer.fit(model, loader())
    assert (model.rnn.max_forget_bits, model.extra[0].max_forget_bits) == (1.0, 5.0)
    assert type(model.extra[0]) is RevGRU
    assert len({callback.state_key for callback in callbacks}) == 2
    trainer.save_checkpoint(tmp_path / "two.ckpt")

    class Bigger(Tagger):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Sequential(nn.GRU(8, 4))

    loaded = load_from_checkpoint(Bigger, tmp_path / "two.ckpt")
    assert (loaded.rnn.max_forget_bits, loaded.extra[0].max_forget_bits) == (1.0, 5.0)


def test_a_target_may_be_made_later_than_other_layers(tmp_path) -> None:
    class Late(Tagger):
        def configure_model(self) -> None:
            if not hasattr(self, "late"):
                self.late = nn.GRU(8, 4)

    model = Late()
    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN(targets=["late"])])
    trainer.fit(model, loader())
    assert (type(model.rnn), type(model.late)) == (nn.LSTM, RevGRU)


def test_a_compiled_layer_reverses_exactly(tmp_path) -> None:
    """Lightning's advice is to compile submodules."""

    class Compiled(Tagger):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            self.rnn.compile(backend="aot_eager")
            return super().configure_optimizers()

    results = []
    for model_class in (Tagger, Compiled):
        seed_everything(0)
        model = model_class()
        quiet_trainer(tmp_path, callbacks=[ReversibleRNN()]).fit(model, loader())
        results.append(weights(model))
    assert torch.equal(*results)


def test_bf16_true_returns_states_that_the_model_can_use(tmp_path) -> None:
    class Last(Tagger):
        def forward(self, tokens: Tensor) -> Tensor:
            _, (h_n, _) = self.rnn(self.embedding(tokens))
            return self.head(h_n[-1])[:, None].expand(-1, tokens.shape[1], -1)

    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN()], precision="bf16-true")
    trainer.fit(Last(), loader())
    assert trainer.callback_metrics["train_loss"].isfinite()


def test_a_checkpoint_of_other_settings_warns(tmp_path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN(2.0)])
    trainer.fit(Tagger(), loader())
    trainer.save_checkpoint(tmp_path / "two_bits.ckpt")
    other = quiet_trainer(tmp_path, callbacks=[ReversibleRNN(5.0)])
    with pytest.warns(UserWarning, match="written with other settings of ReversibleRNN"):
        other.test(Tagger(), loader(), ckpt_path=tmp_path / "two_bits.ckpt")


def test_what_cannot_be_converted_is_reported_before_training(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot convert 'rnn': hidden_size must be .* even.* 7"):
        quiet_trainer(tmp_path, callbacks=[ReversibleRNN()]).fit(Tagger(hidden_size=7), loader())
    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN(targets=["decoder"])])
    with pytest.raises(ValueError, match="target 'decoder' matches no GRU or LSTM"):
        trainer.fit(Tagger(), loader())
    model = Tagger()
    model.rnn = nn.Identity()
    with pytest.raises(ValueError, match="Tagger holds no GRU or LSTM to convert"):
        quiet_trainer(tmp_path, callbacks=[ReversibleRNN()]).fit(model, loader())


def test_lightnings_own_lstm_demo_trains_resumes_and_predicts(tmp_path: Path) -> None:
    """A module that this project did not write, with nothing added but the callback."""
    seed_everything(0)
    text = tokens(sequences=20, length=13)
    batches = DataLoader([(row[:-1], row[1:]) for row in text], batch_size=5)

    class Demo(LightningLSTM):
        """Lightning's demo of a usable size, without its download, and with a predict step."""

        def __init__(self) -> None:
            super().__init__(vocab_size=11)
            self.model = type(self.model)(vocab_size=11, ninp=16, nhid=16, nlayers=2, dropout=0.0)

        def prepare_data(self) -> None: ...

        def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return self.model(batch[0], self.model.init_hidden(len(batch[0])))[0]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.02)

    def trainer(epochs: int):
        return quiet_trainer(tmp_path, callbacks=[ReversibleRNN()], max_epochs=epochs)

    first = trainer(10)
    first.fit(Demo(), batches)
    first.save_checkpoint(tmp_path / "demo.ckpt")
    model = Demo()
    second = trainer(20)
    second.fit(model, batches, ckpt_path=tmp_path / "demo.ckpt")
    assert type(model.model.rnn) is RevLSTM
    assert second.callback_metrics["train_loss"] < 0.5 * torch.tensor(11.0).log()
    predictions = second.predict(model, batches)
    right = torch.cat(predictions).argmax(-1) == text[:, 1:].flatten()
    assert right.float().mean() > 0.8
