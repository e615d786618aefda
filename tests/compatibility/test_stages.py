"""Each callback in every stage of a Trainer, alone and after a checkpoint."""

import pytest
import torch

from tests.helpers.compatibility import EPOCHS, evaluate, results, saved
from tests.helpers.compatibility_cells import cells, trained

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@pytest.mark.parametrize("cell", cells("Stages", "fit"))
def test_training_does_what_the_callback_promises(cell, tmp_path):
    run = trained(cell, tmp_path)
    if run is not None:
        cell.subject.promise(run)


@pytest.mark.parametrize("cell", cells("Stages", "validate", "test"))
def test_a_checkpoint_is_evaluated_as_the_model_that_wrote_it(cell, tmp_path):
    run = trained(cell, tmp_path)
    if run is not None:
        in_training = dict(run.trainer.callback_metrics)
        expected = evaluate(run, cell.value)
        checkpoint = saved(run)
        fresh = cell.subject.run(tmp_path, seed=99)
        found = evaluate(fresh, cell.value, checkpoint)
        assert found == expected
        if cell.value == "validate":
            assert {name: float(in_training[name]) for name in expected} == expected


@pytest.mark.parametrize("cell", cells("Stages", "predict"))
def test_a_checkpoint_predicts_as_the_model_that_wrote_it(cell, tmp_path):
    run = trained(cell, tmp_path)
    if run is not None:
        expected = torch.cat(run.trainer.predict(run.model, datamodule=run.data))
        checkpoint = saved(run)
        fresh = cell.subject.run(tmp_path, seed=99)
        found = fresh.trainer.predict(fresh.model, datamodule=fresh.data, ckpt_path=checkpoint)
        assert torch.equal(torch.cat(found), expected)


@pytest.mark.parametrize("cell", cells("Stages", "resume"))
def test_a_resumed_run_is_the_uninterrupted_one(cell, tmp_path):
    whole = trained(cell, tmp_path / "whole", max_epochs=2 * EPOCHS)
    if whole is not None:
        checkpoint = saved(cell.subject.run(tmp_path / "half").fit())
        resumed = cell.subject.run(tmp_path / "half", seed=99, max_epochs=2 * EPOCHS)
        resumed.fit(ckpt_path=checkpoint)
        for one, other in zip(results(resumed), results(whole), strict=True):
            assert torch.equal(one, other)
