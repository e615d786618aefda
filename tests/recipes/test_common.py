"""Metric, figures and callbacks that recipes share."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_revflip.reversible import RevGRU, RevLSTM, memory_report
from recipes.common.figures import (
    ReversibleFigures,
    bits_figure,
    gate_shares,
    gates_figure,
)
from recipes.common.perplexity import Perplexity
from recipes.common.throughput import TokensPerSecond
from tests.helpers.loggers import RecordingWandb


def test_perplexity_weights_batches_by_their_tokens():
    perplexity = Perplexity()
    nll = torch.rand(30) * 5
    for part in nll.split([3, 20, 7]):
        perplexity.update(part.sum(), len(part))
    torch.testing.assert_close(perplexity.compute(), nll.mean().exp())


# --- figures ---------------------------------------------------------------------------------


@pytest.fixture
def layers():
    module = nn.ModuleDict({"a": RevLSTM(4, 6), "b": RevGRU(4, 6, max_forget_bits=1.0)})
    for rnn in module.values():
        rnn(torch.randn(9, 2, 4))[0].sum().backward()
    return memory_report(module).layers


def test_bits_figure_has_a_bar_as_long_as_the_bits_of_each_layer(layers):
    (axes,) = bits_figure(layers).axes
    assert [bar.get_width() for bar in axes.patches] == [la.bits_per_unit_step for la in layers]
    assert [label.get_text() for label in axes.get_yticklabels()] == [la.name for la in layers]


def test_gates_figure_shows_the_share_of_each_interval(layers):
    (axes,) = gates_figure(layers, bins=16).axes
    for stairs, layer in zip(axes.patches, layers, strict=True):
        gates = torch.arange(1025).repeat_interleave(layer.gate_counts) / 1024
        expected = torch.histc(gates, bins=16, min=0, max=1) / len(gates)
        torch.testing.assert_close(torch.tensor(stairs.get_data().values), expected)


def test_shares_of_nothing_are_zero():
    assert gate_shares(torch.zeros(1025, dtype=torch.int64), 8).tolist() == [0] * 8


def test_bins_that_do_not_fit_are_rejected():
    with pytest.raises(ValueError, match=r"divides 1024, got counts of shape \(1025,\) and 10"):
        gate_shares(torch.zeros(1025), 10)


def drawn_steps(callback: ReversibleFigures, module: nn.Module, loggers: list, steps: list) -> set:
    for step in steps:
        trainer = SimpleNamespace(loggers=loggers, global_step=step, is_global_zero=True)
        callback.on_train_batch_end(trainer, module, None, None, 0)
    return {step for logger in loggers for _, step, _ in getattr(logger, "figures", [])}


def test_callback_draws_at_the_first_step_and_then_regularly_once_each():
    rnn = RevLSTM(4, 6)
    rnn(torch.randn(9, 2, 4))
    logger = RecordingWandb()
    steps = [0, 1, 1, 2, 3, 4, 4, 5, 6, 7]  # a step repeats where gradients are accumulated
    assert drawn_steps(ReversibleFigures(3), rnn, [logger], steps) == {1, 4, 7}
    names = ["reversible/bits_per_layer", "reversible/forget_gates"]
    assert [name for name, *_ in logger.figures] == names * 3


def test_callback_leaves_ordinary_models_and_other_loggers_alone(tmp_path):
    assert not drawn_steps(ReversibleFigures(1), nn.LSTM(4, 6), [RecordingWandb()], [1, 2])
    assert not drawn_steps(ReversibleFigures(1), RevLSTM(4, 6), [CSVLogger(tmp_path)], [1, 2])
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        ReversibleFigures(0)


# --- throughput ------------------------------------------------------------------------------


def test_tokens_per_second_counts_training_time_alone(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("recipes.common.throughput.perf_counter", lambda: clock.now)
    trainer = SimpleNamespace(world_size=2)
    logged = []
    module = SimpleNamespace(log=lambda name, value, **_: logged.append(value))
    callback = TokensPerSecond(batches=2)
    for tokens, seconds in [(10, 1), (20, 1), (30, 2), (40, 2), (None, 100), (50, 1), (60, 2)]:
        clock.now += seconds
        if tokens is None:
            callback.on_validation_end(trainer, module)
            continue
        batch = SimpleNamespace(targets=torch.zeros(tokens))
        callback.on_train_batch_end(trainer, module, None, batch, 0)
    # Of two processes; over the last two batches, and not over the validation.
    assert logged == [2 * 20 / 1, 2 * 50 / 3, 2 * 70 / 4, 2 * 60 / 2]
