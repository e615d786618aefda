"""Each callback beside those of Lightning."""

from datetime import timedelta
from itertools import accumulate

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    RichModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger

from lightning_revflip.callbacks import SGLDSampler
from tests.helpers.compatibility import STEPS, evaluate, results, weights
from tests.helpers.compatibility_cells import cells, trained

AXIS = "Callbacks of Lightning"
BATCHES = 4
"""In an epoch."""


@pytest.mark.parametrize("cell", cells(AXIS, "ModelCheckpoint"))
def test_checkpoints_of_steps_and_epochs_hold_what_was_trained(cell, tmp_path):
    subject = cell.subject
    best = ModelCheckpoint(tmp_path / "best", monitor=subject.monitor)
    last = ModelCheckpoint(tmp_path / "last", "{epoch}")
    steps = ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=3, save_top_k=-1)
    run = trained(cell, tmp_path, best, last, steps, enable_checkpointing=True)
    if run is not None:
        subject.promise(run)
        names = sorted(path.name for path in (tmp_path / "steps").iterdir())
        assert names == ["step=3.ckpt", "step=6.ckpt"]
        (path,) = (tmp_path / "last").iterdir()
        saved = torch.load(path)["state_dict"]
        for name, value in run.model.state_dict().items():
            assert torch.equal(saved[name], value), name
        if not any(isinstance(each, SGLDSampler) for each in run.callbacks):  # the bank answers
            found = evaluate(run, "validate", best.best_model_path)[subject.monitor]
            assert found == pytest.approx(best.best_model_score.item())


@pytest.mark.parametrize("cell", cells(AXIS, "EarlyStopping"))
def test_training_stops_early_and_ends_as_usual(cell, tmp_path):
    stop = EarlyStopping(cell.subject.monitor, min_delta=1e9, patience=1)
    run = trained(cell, tmp_path, stop, max_epochs=5)
    if run is not None:
        assert run.trainer.current_epoch == 2
        cell.subject.promise(run)


@pytest.mark.parametrize("cell", cells(AXIS, "WeightAveraging", "WeightAveraging before it"))
def test_averaged_weights_are_the_mean_over_steps(cell, tmp_path):
    averaging = [WeightAveraging()]
    first = cell.value.endswith("before it")
    order = {"before": averaging} if first else {}
    run = trained(cell, tmp_path, *([] if first else averaging), **order)
    if run is not None:
        cell.subject.promise(run)
        mean = torch.stack(run.watch.weights[1:]).mean(0)
        torch.testing.assert_close(weights(run.model), mean)


@pytest.mark.parametrize("cell", cells(AXIS, "EMAWeightAveraging"))
def test_averaged_weights_are_the_exponential_mean_over_steps(cell, tmp_path):
    run = trained(cell, tmp_path, EMAWeightAveraging(decay=0.5))
    if run is not None:
        cell.subject.promise(run)
        *_, mean = accumulate(run.watch.weights[1:], lambda mean, each: (mean + each) / 2)
        torch.testing.assert_close(weights(run.model), mean)


@pytest.mark.parametrize("cell", cells(AXIS, "StochasticWeightAveraging"))
def test_stochastic_averaging_is_the_mean_over_starts_of_epochs(cell, tmp_path):
    averaging = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2)
    run = trained(cell, tmp_path, averaging, max_epochs=3)
    if run is not None:
        cell.subject.promise(run)
        mean = (run.watch.weights[BATCHES] + run.watch.weights[2 * BATCHES]) / 2
        torch.testing.assert_close(weights(run.model), mean)


@pytest.mark.parametrize("cell", cells(AXIS, "GradientAccumulationScheduler"))
def test_accumulation_may_change_between_epochs(cell, tmp_path):
    run = trained(cell, tmp_path, GradientAccumulationScheduler({0: 1, 1: 2}))
    if run is not None:
        assert run.trainer.global_step == BATCHES + BATCHES // 2
        cell.subject.promise(run)


@pytest.mark.parametrize("cell", cells(AXIS, "LearningRateFinder"))
def test_the_learning_rate_finder_leaves_no_trace_in_the_run(cell, tmp_path):
    finder = LearningRateFinder(num_training_steps=5, early_stop_threshold=None, update_attr=False)
    run = trained(cell, tmp_path / "run", finder)
    if run is not None:
        assert len(finder.optimal_lr.results["lr"]) == 5
        cell.subject.promise(run)
        without = cell.subject.run(tmp_path / "without").fit()
        for one, other in zip(results(run), results(without), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("cell", cells(AXIS, "BatchSizeFinder"))
def test_the_batch_size_finder_leaves_the_run_of_the_batch_size_found(cell, tmp_path):
    finder = BatchSizeFinder(steps_per_trial=2, init_val=2, max_trials=2)
    run = trained(cell, tmp_path / "run", finder)
    if run is not None:
        assert run.data.batch_size == 4
        assert run.trainer.global_step == STEPS
        cell.subject.promise(run)
        without = cell.subject.run(tmp_path / "without", max_epochs=0).fit()
        torch.testing.assert_close(run.watch.weights[0], weights(without.model))


@pytest.mark.parametrize("cell", cells(AXIS, "LearningRateMonitor"))
def test_learning_rates_are_logged(cell, tmp_path):
    monitor = LearningRateMonitor(logging_interval="step")
    run = trained(cell, tmp_path, monitor, logger=CSVLogger(tmp_path))
    if run is not None:
        cell.subject.promise(run)
        lr = run.trainer.optimizers[0].param_groups[0]["lr"]
        assert monitor.lrs
        assert all(set(each) == {lr} for each in monitor.lrs.values())


class OneStep(Timer):
    """Finds that its time is over after a step."""

    def setup(self, trainer, pl_module, stage):
        self.trainer = trainer

    def time_elapsed(self, stage=None):
        return 0.0 if self.trainer.global_step == 0 else 9.0


@pytest.mark.parametrize("cell", cells(AXIS, "Timer"))
def test_a_timer_ends_training(cell, tmp_path):
    run = trained(cell, tmp_path, OneStep(timedelta(seconds=1)))
    if run is not None:
        assert run.trainer.global_step == 1


@pytest.mark.parametrize("cell", cells(AXIS, "RichProgressBar, RichModelSummary"))
def test_rich_output_shows_the_layers_that_are_trained(cell, tmp_path, capsys):
    settings = {"enable_progress_bar": True, "enable_model_summary": True}
    run = trained(cell, tmp_path, RichProgressBar(), RichModelSummary(max_depth=2), **settings)
    if run is not None:
        cell.subject.promise(run)
        shown = capsys.readouterr().out
        assert all(type(part).__name__ in shown for part in run.model.children())
