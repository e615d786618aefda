"""Each callback where the Trainer accumulates or clips gradients."""

import pytest
import torch

from tests.helpers.compatibility import STEPS, precision
from tests.helpers.compatibility_cells import cells, trained

CLIP = 1e-3
"""Below the gradients of all models here."""
STILL = 1e-12
"""A learning rate that leaves the weights as they are."""

ACCUMULATE = {"accumulate_grad_batches": 2}
NORM = {"gradient_clip_val": CLIP}
VALUES = {"gradient_clip_val": CLIP, "gradient_clip_algorithm": "value"}
SETTINGS = {
    "accumulate": (ACCUMULATE, "32-true"),
    "clip the norm": (NORM, "32-true"),
    "clip values": (VALUES, "32-true"),
    "both, bf16-mixed": (ACCUMULATE | NORM, "bf16-mixed"),
    "both, 16-mixed": (ACCUMULATE | NORM, "16-mixed"),
}

pytestmark = pytest.mark.filterwarnings("ignore:gradient_clip_val=0.001 changes gradients")


def clipped(gradient: torch.Tensor, gradient_clip_val=None, gradient_clip_algorithm="norm", **_):
    if gradient_clip_val is None:
        return gradient
    if gradient_clip_algorithm == "value":
        return gradient.clamp(-gradient_clip_val, gradient_clip_val)
    return gradient * (gradient_clip_val / gradient.norm()).clamp(max=1)


@pytest.mark.parametrize("cell", cells("Accumulation and clipping"))
def test_the_optimizer_gets_the_clipped_mean_of_the_gradients_of_batches(cell, tmp_path):
    settings, name = SETTINGS[cell.value]
    accumulate = settings.get("accumulate_grad_batches", 1)
    run = trained(cell, tmp_path / "run", **settings, **precision(name))
    if run is not None:
        cell.subject.promise(run)
        assert run.trainer.global_step == STEPS // accumulate

        def gradients(**changes):
            folder = tmp_path / str(len(changes))
            still = cell.subject.run(folder, max_epochs=1, **changes, **precision(name))
            still.model.lr = STILL
            return still.fit().watch.gradients

        # Neither weights nor noise depend on the settings, so the gradients of batches are these.
        single = gradients()[:accumulate]
        expected = clipped(torch.stack(single).mean(0), **settings)
        torch.testing.assert_close(gradients(**settings)[0], expected, rtol=2e-3, atol=1e-5)
