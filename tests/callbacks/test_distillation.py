"""PosteriorDistillation: a generator that follows the samples of SGLDSampler."""

import csv
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_revflip.apd import DistilledPosterior, IdentityCodec, ParameterCodec
from lightning_revflip.callbacks import PosteriorDistillation, RNGState
from lightning_revflip.callbacks._online_distillation import OnlineDistillation
from lightning_revflip.modules import APDModule
from lightning_revflip.posterior import SampleBank
from tests.helpers.distilled import rows_of
from tests.helpers.sampled_models import blobs, fit, loader, sampler, sgd, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
]


def distillation(folder, **changes):
    """Trains a few steps on few samples, of which there is one each second step after four."""
    usual = {
        "rank": 3,
        "buffer_size": 6,
        "every_n_samples": 2,
        "steps": 3,
        "refit_every": 8,
        "batch_size": 8,
        "module": APDModule(hidden=(8,), lr=1e-3),
    }
    return PosteriorDistillation(folder / "distilled", **usual | changes)


def run(folder, epochs=5, ckpt=None, changes=None, **settings):
    """28 steps with 12 samples, and a distillation at samples 6, 8, 10 and 12."""
    callback = distillation(folder, **changes or {})
    callbacks = [sampler(folder), callback, RNGState()]
    model = blobs(sgd, nn.Dropout(0.3))
    model, trainer = fit(
        folder, *callbacks, model=model, epochs=epochs, shuffle=True, ckpt=ckpt, **settings
    )
    return model, trainer, callback


def draw(posterior, n=50):
    return rows_of(posterior.sample(n, torch.Generator().manual_seed(0)))


# --- what it learns --------------------------------------------------------------------------


def test_generated_networks_predict_as_the_samples_do(tmp_path):
    """From the start of training to a saved posterior, on a problem that can be learnt."""
    module = APDModule(hidden=(32, 32), lr=1e-3, gradient_penalty=1.0)
    callback = distillation(
        tmp_path, rank=8, buffer_size=60, every_n_samples=20, steps=30, module=module
    )
    callbacks = [sampler(tmp_path, burn_in=120), callback]
    model, _ = fit(tmp_path, *callbacks, epochs=50)
    bank = SampleBank(tmp_path / "bank")
    distilled = DistilledPosterior.load(tmp_path / "distilled")
    x, y = loader(200).dataset[:]
    recent = bank.rows(range(len(bank) - 60, len(bank)))
    generator = torch.Generator().manual_seed(0)
    expected = torch.stack([_predict(model, row, x) for row in recent]).mean(0)
    found = distilled.predict(model, x, 200, generator=generator).mean(0)
    assert (expected.argmax(1) == y).float().mean() > 0.6
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.95
    # 200 networks of a distribution of 60 samples: probabilities of means differ by some 0.01.
    assert (found - expected).abs().mean() < 0.03


def _predict(model, row, x):
    nn.utils.vector_to_parameters(row, model.parameters())
    with torch.no_grad():
        return model(x).softmax(-1)


def test_the_codec_is_that_of_the_last_samples(tmp_path):
    _, _, callback = run(tmp_path, changes={"refit_every": 1})
    last = SampleBank(tmp_path / "bank").rows()[-6:]
    gaussian = callback.posterior.codec.gaussian
    torch.testing.assert_close(gaussian.mean, last.mean(0))
    variances = callback.posterior.codec.encode(last).var(0)
    torch.testing.assert_close(variances, torch.ones(3), atol=2e-3, rtol=0)  # float16


@pytest.mark.parametrize(("refit_every", "fitted_to"), [(None, 6), (2, 12), (6, 12), (7, 13)])
def test_the_codec_is_fitted_anew_after_so_many_samples(tmp_path, refit_every, fitted_to):
    _, _, callback = run(tmp_path, changes={"refit_every": refit_every})
    rows = SampleBank(tmp_path / "bank").rows()
    assert len(rows) == 13
    mean = rows[fitted_to - 6 : fitted_to].mean(0)
    torch.testing.assert_close(callback.posterior.codec.gaussian.mean, mean)


def test_rank_none_distils_the_weights_themselves(tmp_path):
    _, _, callback = run(tmp_path, changes={"rank": None, "module": None})
    assert isinstance(callback.posterior.codec, IdentityCodec)
    assert callback.posterior.generator.latent_size == 32


def test_a_short_run_is_distilled_at_its_end(tmp_path):
    _, _, callback = run(tmp_path, epochs=2)  # 4 samples for a buffer of 6
    rows = SampleBank(tmp_path / "bank").rows()
    torch.testing.assert_close(callback.posterior.codec.gaussian.mean, rows.mean(0))
    assert len(DistilledPosterior.load(tmp_path / "distilled")) == 4


def test_too_short_a_run_saves_nothing_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="saves nothing: there were 1 samples.*at least 4"):
        _, _, callback = run(tmp_path, epochs=1)
    assert not (tmp_path / "distilled").exists()
    with pytest.raises(RuntimeError, match="nothing has been distilled yet.*6 samples"):
        _ = callback.posterior


# --- the chain -------------------------------------------------------------------------------


def test_the_chain_is_the_same_whether_it_is_distilled_or_not(tmp_path):
    run(tmp_path / "with")
    fit(
        tmp_path / "without",
        sampler(tmp_path / "without"),
        RNGState(),
        model=blobs(sgd, nn.Dropout(0.3)),
        epochs=5,
        shuffle=True,
    )
    found, expected = (SampleBank(tmp_path / each / "bank") for each in ("with", "without"))
    assert torch.equal(found.rows(), expected.rows())


def test_a_chain_restarts_from_a_generated_network(tmp_path, monkeypatch):
    """With steps so small that it stays there."""
    model = blobs(lambda module: torch.optim.SGD(module.parameters(), lr=1e-8))
    generated = iter([torch.full((1, 67), 0.5), torch.full((1, 67), -0.5)])
    monkeypatch.setattr(OnlineDistillation, "sample", lambda self, n: next(generated))
    callback = distillation(tmp_path, restart_every=6, refit_every=None)
    fit(tmp_path, sampler(tmp_path), callback, model=model, epochs=5)
    rows = SampleBank(tmp_path / "bank").rows()
    expected = torch.cat(
        [weights(blobs()).expand(6, -1), torch.full((6, 67), 0.5), -0.5 * torch.ones(1, 67)]
    )
    torch.testing.assert_close(rows, expected, atol=1e-3, rtol=0)


def test_all_chains_of_a_process_share_the_buffer_and_restart(tmp_path):
    callback = distillation(tmp_path, restart_every=2)
    chains = sampler(tmp_path, network="net", chains=2)
    fit(tmp_path, chains, callback, model=blobs(), epochs=4)
    bank = SampleBank(tmp_path / "bank")
    assert callback.posterior.layout == bank.layout
    assert callback.state_dict()["online"]["buffer"]["seen"] == len(bank) == 20
    one, other = bank.rows().chunk(2)
    buffer = callback.state_dict()["online"]["buffer"]["rows"]
    last = torch.cat([one[-3:], other[-3:]])
    assert {tuple(row.tolist()) for row in buffer} == {tuple(row.tolist()) for row in last}


# --- logs and checkpoints --------------------------------------------------------------------


def test_it_logs_what_it_found(tmp_path):
    logger = CSVLogger(tmp_path)
    _, trainer, _ = run(tmp_path, logger=logger, log_every_n_steps=1)
    names = {name for name in trainer.callback_metrics if name.startswith("apd/")}
    assert names == {
        "apd/wasserstein",
        "apd/r1",
        "apd/generator_loss",
        "apd/sliced_wasserstein",
        "apd/mean_error",
        "apd/covariance_error",
    }
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["apd/wasserstein"]]
    assert logged == list(range(15, 30))  # the sixth sample is that of the sixteenth step


@pytest.mark.filterwarnings("ignore:PosteriorDistillation saves nothing")
@pytest.mark.parametrize(("epochs", "restart_every"), [(1, None), (3, None), (3, 4), (4, 4)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, epochs, restart_every):
    """Stopped before the first distillation, after it, and after the codec was fitted anew."""
    changes = {"restart_every": restart_every}
    whole, _, expected = run(tmp_path / "whole", 5, changes=changes)
    _, trainer, _ = run(tmp_path / "resumed", epochs, changes=changes)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _, found = run(tmp_path / "resumed", 5, tmp_path / "half.ckpt", changes=changes)
    assert torch.equal(weights(resumed), weights(whole))
    one, other = (SampleBank(tmp_path / each / "bank") for each in ("resumed", "whole"))
    assert torch.equal(one.rows(), other.rows())
    assert torch.equal(draw(found.posterior), draw(expected.posterior))
    assert torch.equal(
        draw(DistilledPosterior.load(tmp_path / "resumed" / "distilled")),
        draw(expected.posterior),
    )


# --- errors ----------------------------------------------------------------------------------

WRONG = {
    "buffer_size": ({"buffer_size": 3}, "buffer_size must be at least 4.*rank 3.*got 3"),
    "rank": ({"rank": 0}, "rank must be at least 1, got 0"),
    "steps": ({"steps": 0}, "steps must be at least 1, got 0"),
    "restart_every": ({"restart_every": 0}, "restart_every must be at least 1, got 0"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_settings_out_of_range_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        distillation(tmp_path, **changes)


def test_a_module_with_a_codec_of_its_own_is_refused(tmp_path):
    _, _, callback = run(tmp_path, epochs=2)
    codec = callback.posterior.codec
    assert isinstance(codec, ParameterCodec)
    with pytest.raises(ValueError, match="the module has a codec already"):
        distillation(tmp_path, module=APDModule(codec))


@pytest.mark.parametrize("with_sampler", [False, True])
def test_without_a_sampler_before_it_training_does_not_start(tmp_path, with_sampler):
    callbacks = [distillation(tmp_path)]
    if with_sampler:
        callbacks.append(sampler(tmp_path))
    with pytest.raises(MisconfigurationException, match="SGLDSampler, and there is none before it"):
        fit(tmp_path, *callbacks)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    _, trainer, callback = run(tmp_path, epochs=3)
    state = callback.state_dict()
    state["online"]["buffer"]["layout"]["shapes"][0] = [9, 4]
    other = distillation(tmp_path)
    other.load_state_dict(state)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    checkpoint["callbacks"][callback.state_key] = state
    torch.save(checkpoint, tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match=r"net.0.weight.*shape \(9, 4\), expected \(8, 4\)"):
        run(tmp_path, 4, tmp_path / "half.ckpt")


def test_a_checkpoint_of_another_buffer_size_is_refused(tmp_path):
    _, trainer, _ = run(tmp_path, epochs=3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="a buffer of 6 samples.*buffer_size=5"):
        run(tmp_path, 4, tmp_path / "half.ckpt", {"buffer_size": 5})
