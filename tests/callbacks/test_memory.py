"""`MemoryMonitor` against counts made by hand."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

from lightning_revflip.callbacks import MemoryMonitor, ReversibleRNN
from lightning_revflip.reversible import memory_report
from tests.helpers.models import Tagger, loader, quiet_trainer


def test_saved_bytes_are_those_that_autograd_keeps(tmp_path) -> None:
    class TwoProducts(Tagger):
        """Keeps exactly its input (4 x 10 floats) and one product (4 x 6 floats)."""

        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.embedding, self.head = None, None, None
            self.first, self.second = nn.Linear(10, 6, bias=False), nn.Linear(6, 1, bias=False)

        def loss(self, tokens: Tensor) -> Tensor:
            return self.second(self.first(tokens.float())).sum()

    trainer = quiet_trainer(tmp_path, callbacks=[MemoryMonitor()], log_every_n_steps=1)
    trainer.fit(TwoProducts(), loader())
    assert trainer.callback_metrics["memory/saved_for_backward_bytes"] == 4 * (4 * 10 + 4 * 6)


def test_reversible_layers_keep_less_than_the_layers_that_they_replace(tmp_path) -> None:
    saved = {}
    for callbacks in ([], [ReversibleRNN()]):
        trainer = quiet_trainer(
            tmp_path, callbacks=[*callbacks, MemoryMonitor()], log_every_n_steps=1
        )
        trainer.fit(Tagger(hidden_size=64), loader())
        saved[bool(callbacks)] = trainer.callback_metrics["memory/saved_for_backward_bytes"]
    assert saved[True] < 0.6 * saved[False]


def test_logged_figures_are_those_of_the_memory_report(tmp_path) -> None:
    model = Tagger()
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(
        tmp_path, callbacks=[ReversibleRNN(), MemoryMonitor()], logger=logger, log_every_n_steps=2
    )
    trainer.fit(model, loader())
    report = memory_report(model)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["reversible/stored_bits"]]
    assert len(rows) == 2  # four batches, logged at every second
    last = {name: float(value) for name, value in rows[-1].items() if value}
    assert last["reversible/stored_bits"] == report.stored_bits
    assert last["reversible/kept_bytes"] == report.kept_bytes
    assert last["reversible/savings"] == pytest.approx(report.savings, rel=1e-5)
    for layer in report.layers:
        logged = last[f"reversible/bits_per_unit_step/{layer.name}"]
        assert logged == pytest.approx(layer.bits_per_unit_step, rel=1e-5)


def test_the_monitor_leaves_training_as_it_is(tmp_path) -> None:
    results = []
    for callbacks in ([], [MemoryMonitor()]):
        torch.manual_seed(0)
        model = Tagger()
        quiet_trainer(tmp_path, callbacks=callbacks, log_every_n_steps=1).fit(model, loader())
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_skipped_batch_leaves_no_hook_behind(tmp_path) -> None:
    class Skipping(Tagger):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

    trainer = quiet_trainer(tmp_path, callbacks=[MemoryMonitor()], log_every_n_steps=1)
    trainer.fit(Skipping(), loader())
    with disable_saved_tensors_hooks("a hook is left"):  # raises if there is one
        pass


def test_a_failing_step_leaves_no_hook_behind(tmp_path) -> None:
    class Failing(Tagger):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise KeyError("from the model")

    trainer = quiet_trainer(tmp_path, callbacks=[MemoryMonitor()], log_every_n_steps=1)
    with pytest.raises(KeyError, match="from the model"):
        trainer.fit(Failing(), loader())
    with disable_saved_tensors_hooks("a hook is left"):  # raises if there is one
        pass
