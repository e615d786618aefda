"""Each callback with settings of the Trainer, and with ways to write a module."""

import pytest

from tests.helpers.compatibility import STEPS, has_trained
from tests.helpers.compatibility_cells import cells, trained
from tests.helpers.compatibility_models import Compiled, Late, Manual, SeveralOptimizers

AXIS = "Trainer and optimization"


@pytest.mark.parametrize("cell", cells(AXIS, "barebones"))
def test_a_barebones_trainer_trains(cell, tmp_path):
    run = trained(cell, tmp_path, barebones=True, log_every_n_steps=0)
    if run is not None:
        cell.subject.promise(run)


@pytest.mark.parametrize("cell", cells(AXIS, "fast_dev_run"))
def test_a_trial_run_leaves_nothing_that_a_real_one_would_meet(cell, tmp_path):
    trial = trained(cell, tmp_path, fast_dev_run=True)
    if trial is not None:
        has_trained(trial)
        assert trial.trainer.global_step == 1
        cell.subject.promise(cell.subject.run(tmp_path).fit())


@pytest.mark.parametrize("cell", cells(AXIS, "manual optimization"))
def test_manual_optimization(cell, tmp_path):
    run = trained(cell, tmp_path, model=Manual())
    if run is not None:
        assert run.trainer.global_step == STEPS
        cell.subject.promise(run)


@pytest.mark.parametrize("cell", cells(AXIS, "several optimizers"))
def test_several_optimizers(cell, tmp_path):
    run = trained(cell, tmp_path, model=SeveralOptimizers())
    if run is not None:
        assert run.trainer.global_step == 2 * STEPS
        cell.subject.promise(run)


@pytest.mark.parametrize("cell", cells(AXIS, "layers of configure_model"))
def test_layers_may_be_made_late(cell, tmp_path):
    run = trained(cell, tmp_path, model=Late())
    if run is not None:
        cell.subject.promise(run)


@pytest.mark.parametrize("cell", cells(AXIS, "compiled layer"))
def test_a_layer_may_be_compiled(cell, tmp_path):
    run = trained(cell, tmp_path, model=Compiled())
    if run is not None:
        cell.subject.promise(run)
