"""The CartPole recipe: episodes are counted right, the policy learns, the run can be resumed."""

import builtins

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_revflip.cli import RevflipCLI
from tests.helpers.loggers import RecordingWandb
from tests.helpers.models import quiet_trainer
from tests.helpers.recipe_runs import config_args, fit

gymnasium = pytest.importorskip("gymnasium")

from recipes.es_cartpole.data import Generations  # noqa: E402
from recipes.es_cartpole.environment import (  # noqa: E402
    episode_returns,
    make_environments,
    sizes,
)
from recipes.es_cartpole.figures import ReturnsFigure  # noqa: E402
from recipes.es_cartpole.module import EvolvedPolicy  # noqa: E402


def to_the_right(observations):
    """Scores that always choose the second action."""
    return torch.tensor([0.0, 1.0]).expand(len(observations), 2)


def towards_the_fall(observations):
    """Push the cart to where the pole leans."""
    lean = observations[:, 2] + observations[:, 3]
    return torch.stack([-lean, lean], 1)


def small(**settings) -> EvolvedPolicy:
    torch.manual_seed(0)
    return EvolvedPolicy(
        **{"population": 16, "base_perturbations": 2, "eval_episodes": 4, **settings}
    )


@pytest.mark.parametrize("policy", [to_the_right, towards_the_fall])
def test_returns_are_the_lengths_of_the_first_episodes(policy):
    environments = make_environments("CartPole-v1", 5)
    returns = episode_returns(environments, policy, seed=3)

    observations, _ = environments.reset(seed=3)
    single = gymnasium.make("CartPole-v1")
    for start, expected in zip(observations, returns, strict=True):
        single.reset()
        single.unwrapped.state = start.astype("float64")
        observation, total, over = start, 0.0, False
        while not over:
            action = int(policy(torch.as_tensor(observation)[None]).argmax())
            observation, reward, terminated, truncated, _ = single.step(action)
            total += reward
            over = terminated or truncated
        assert total == pytest.approx(float(expected), abs=1)  # states are float32 in a batch


def test_seeds_choose_the_initial_states():
    environments = make_environments("CartPole-v1", 8)
    first, again, other = (episode_returns(environments, to_the_right, seed) for seed in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
    assert sizes(environments) == (4, 2)


def test_policy_learns_to_balance(tmp_path):
    policy = small(population=64, base_perturbations=8, eval_episodes=20)
    trainer = quiet_trainer(tmp_path, max_epochs=1, log_every_n_steps=1)
    trainer.validate(policy, Generations(), verbose=False)
    before = trainer.callback_metrics["val/return"]
    trainer.fit(policy, Generations(per_epoch=5))
    metrics = trainer.callback_metrics
    assert metrics["val/return"] > max(60.0, 2 * before)
    assert metrics["evolution/fitness_best"] >= metrics["evolution/fitness_mean"]
    assert metrics["evolution/members_per_second"] > 0


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    whole, first, rest = (small() for _ in range(3))
    data = Generations(per_epoch=2)
    quiet_trainer(tmp_path, max_epochs=2).fit(whole, data)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(first, data)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    quiet_trainer(tmp_path, max_epochs=2).fit(rest, data, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert value.equal(rest.state_dict()[name]), name


def test_configuration_trains_and_is_tested_from_its_checkpoint(cwd):
    smaller = ["--model.population=16", "--model.eval_episodes=4", "--data.per_epoch=1"]
    cli = fit(*config_args("es_cartpole", "base", "csv"), *smaller, "--trainer.max_epochs=1")
    assert cli.trainer.global_step == 1
    (folder,) = (cwd / "runs" / "es_cartpole").iterdir()
    args = ["test", f"--config={folder / 'config.yaml'}", "--trainer.logger=false"]
    tested = RevflipCLI([*args, f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"]).trainer
    assert tested.callback_metrics["test/return"] > 0


def test_figure_shows_the_returns_of_the_last_generation(tmp_path):
    logger, policy = RecordingWandb(tmp_path), small()
    trainer = quiet_trainer(tmp_path, logger=logger, callbacks=[ReturnsFigure()], max_epochs=2)
    trainer.fit(policy, Generations(per_epoch=1))
    assert [entry[:2] for entry in logger.figures] == [("evolution/returns", s) for s in (1, 2)]
    (axes,) = logger.figures[1][2][0].axes
    assert sum(bar.get_height() for bar in axes.patches) == 16
    edges = [bar.get_x() for bar in axes.patches]
    assert edges[0] == pytest.approx(float(policy.fitness.min()), abs=1)
    returned = float(trainer.callback_metrics["val/return"])
    assert axes.lines[0].get_xdata()[0] == pytest.approx(returned)
    with pytest.raises(TypeError, match="an EvolvedPolicy, got BoringModel"):
        ReturnsFigure().on_validation_end(trainer, BoringModel())


def test_bad_input_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="episodes must be at least 1"):
        small(episodes=0)
    with pytest.raises(ValueError, match="hidden sizes must be at least 1"):
        small(hidden=[0])
    with pytest.raises(ValueError, match="per_epoch must be at least 1"):
        Generations(per_epoch=0)
    with pytest.raises(ValueError, match="discrete actions"):
        make_environments("Pendulum-v1", 2)

    original = builtins.__import__

    def without_gymnasium(name, *args, **kwargs):
        if name == "gymnasium":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_gymnasium)
    with pytest.raises(ImportError, match="pip install 'gymnasium>=1.0'"):
        make_environments("CartPole-v1", 2)
