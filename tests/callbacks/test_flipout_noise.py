"""The noise of `Flipout` in training: its streams, resuming, recomputed layers."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_revflip.callbacks import Flipout
from lightning_revflip.callbacks._noise import RecomputableNoise, fresh_generator, resumed_generator
from lightning_revflip.convert import convert
from lightning_revflip.flipout import (
    FLIPOUT_LAYERS,
    FlipoutEmbedding,
)
from tests.helpers.flipout import (
    SEED,
    Regressor,
    assert_same_weights,
    fitted,
    loader,
    perturbed_layers,
    weights,
)
from tests.helpers.models import quiet_trainer
from tests.helpers.sequences import language_model, tokens


def trainer_of(tmp_path, epochs: int, **kwargs):
    callbacks = [Flipout(annealing_epochs=3)]
    return quiet_trainer(tmp_path, callbacks=callbacks, max_epochs=epochs, **kwargs)


def test_resumed_training_ends_where_uninterrupted_training_does(tmp_path) -> None:
    seed_everything(1)
    whole = Regressor()
    trainer_of(tmp_path, 4).fit(whole, loader(), loader())
    seed_everything(1)
    first = trainer_of(tmp_path, 2)
    first.fit(Regressor(), loader(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    seed_everything(77)
    resumed = Regressor()
    trainer_of(tmp_path, 4).fit(resumed, loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(weights(resumed), weights(whole))


def test_training_can_be_repeated_by_its_seed(tmp_path) -> None:
    callback = Flipout()
    first, second = (fitted(tmp_path, callback) for _ in range(2))
    assert torch.equal(weights(first), weights(second))
    seed_everything(SEED + 1)
    third = copy.deepcopy(second)
    quiet_trainer(tmp_path, callbacks=[Flipout()]).fit(third, loader())
    assert not torch.equal(weights(third), weights(second))


def test_ranks_resume_their_streams_and_further_ones_begin_others() -> None:
    states = [fresh_generator(rank).get_state() for rank in range(2)]
    resumed = [resumed_generator(states, rank) for rank in range(4)]
    for state, generator in zip(states, resumed, strict=False):
        assert torch.equal(generator.get_state(), state)
    draws = {int(torch.randint(2**62, (), generator=each)) for each in resumed}
    assert len(draws) == 4
    again = [resumed_generator(states, rank) for rank in range(4)]
    assert {int(torch.randint(2**62, (), generator=each)) for each in again} == draws


def test_a_checkpoint_that_holds_the_state_of_the_first_rank_alone_is_resumed() -> None:
    callback, state = Flipout(), fresh_generator(rank=0).get_state()
    callback.load_state_dict({**callback.state_dict(), "noise": state})
    assert torch.equal(callback._saved_noise[0], state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_see_the_noise_of_the_forward_pass(tmp_path, reentrant: bool) -> None:
    class Checkpointed(Regressor):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                return self.net(x)
            x = x.detach().requires_grad_()
            hidden = checkpoint(self.net[:2], x, use_reentrant=reentrant)
            return checkpoint(self.net[2], hidden, use_reentrant=reentrant)

    plain = fitted(tmp_path, Flipout())
    assert_same_weights(fitted(tmp_path, Flipout(), Checkpointed), plain, atol=1e-7)


def test_a_reversible_sequence_draws_nothing_in_its_backward_pass() -> None:
    sequence = language_model(chunk_steps=3)
    convert(sequence, {nn.Embedding: FlipoutEmbedding})
    generator = fresh_generator(rank=0)
    sequence.read_in.noise_source = RecomputableNoise(generator)
    loss, _ = sequence(tokens(9, 4), None, tokens(9, 4, seed=1))
    state = generator.get_state()
    loss.backward()
    assert torch.equal(generator.get_state(), state)


def test_recomputing_without_random_states_is_refused(tmp_path) -> None:
    class Careless(Regressor):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False, preserve_rng_state=False)

    with pytest.raises(RuntimeError, match="use preserve_rng_state=True"):
        fitted(tmp_path, Flipout(), Careless)


def test_layers_have_their_own_noise_source_back_after_fitting(tmp_path) -> None:
    class Failing(Callback):
        def on_train_batch_end(self, *args) -> None:
            raise KeyError("enough")

    model = Regressor()
    convert(model, FLIPOUT_LAYERS)
    before = [layer.noise_source for layer in perturbed_layers(model)]
    fitted(tmp_path, Flipout(), lambda: model)
    assert [layer.noise_source for layer in perturbed_layers(model)] == before
    trainer = quiet_trainer(tmp_path, callbacks=[Flipout(), Failing()])
    with pytest.raises(KeyError, match="enough"):
        trainer.fit(model, loader())
    assert [layer.noise_source for layer in perturbed_layers(model)] == before
