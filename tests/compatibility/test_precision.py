"""Each callback in each precision."""

import pytest
import torch

from tests.helpers.compatibility import evaluate, precision, saved
from tests.helpers.compatibility_cells import cells, trained

DTYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16}
"""Of the parameters, if not float32."""


@pytest.mark.parametrize("cell", cells("Precision"))
def test_training_and_checkpoints_work_in_each_precision(cell, tmp_path):
    settings = precision(cell.value)
    run = trained(cell, tmp_path, **settings)
    if run is not None:
        cell.subject.promise(run)
        dtype = DTYPES.get(cell.value, torch.float32)
        assert {each.dtype for each in run.model.parameters()} == {dtype}
        checkpoint = saved(run)
        fresh = cell.subject.run(tmp_path, seed=99, **precision(cell.value))
        # Lightning restores the weights first, and makes them float64 or bfloat16 then.
        exact = None if cell.value != "64-true" else 1e-6
        expected = pytest.approx(evaluate(run, "validate"), rel=exact)
        assert evaluate(fresh, "validate", checkpoint) == expected


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_computes_in_16_bits(name, tmp_path):
    """The Trainer takes bfloat16 where float16 is asked for, unless it is given a plugin."""
    run = cells("Precision")[0].values[0].subject.run(tmp_path, **precision(name))
    dtypes = set()
    run.model.head.register_forward_hook(lambda *call: dtypes.add(call[2].dtype))
    run.fit()
    assert dtypes == {torch.float16 if name == "16-mixed" else torch.bfloat16}
