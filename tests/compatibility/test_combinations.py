"""The callbacks with each other: two in both orders, and many at once."""

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_revflip.callbacks import (
    Flipout,
    MemoryMonitor,
    PosteriorDistillation,
    ReversibleRNN,
    RNGState,
    SGLDSampler,
)
from tests.helpers.compatibility import EPOCHS, SUBJECTS, Subject, distillation, results, saved
from tests.helpers.compatibility_cells import cells, trained
from tests.helpers.compatibility_models import Data, Late, Sequences


@pytest.mark.parametrize("cell", cells("Followed by"))
def test_each_of_two_callbacks_does_what_it_promises(cell, tmp_path):
    other = SUBJECTS[cell.value]
    run = trained(cell, tmp_path, beside=other)
    if run is not None:
        cell.subject.promise(run)
        other.promise(run)


SAMPLED = [ReversibleRNN, distillation, MemoryMonitor, RNGState]
PERTURBED = [RNGState, Flipout, ReversibleRNN, MemoryMonitor]


def together(*makers) -> Subject:
    """Many callbacks at once, with dropout and shuffled data."""

    def make():
        made = [maker() for maker in makers]
        return [part for each in made for part in (each if isinstance(each, list) else [each])]

    def keep_their_promises(run):
        for callback in run.callbacks:
            SUBJECTS[type(callback).__name__].promise(run)

    return Subject(
        "many",
        make,
        keep_their_promises,
        model=lambda folder: Sequences(dropout=0.3),
        data=lambda folder: Data(shuffle=True),
    )


@pytest.mark.parametrize("makers", [SAMPLED, PERTURBED], ids=["sampled", "perturbed"])
@pytest.mark.parametrize(
    "precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)]
)
def test_many_together_keep_their_promises_and_resume(makers, precision, tmp_path):
    subject = together(*makers)
    settings = {"precision": precision, "accumulate_grad_batches": 2}
    whole = subject.run(tmp_path / "whole", max_epochs=2 * EPOCHS, **settings).fit()
    subject.promise(whole)
    checkpoint = saved(subject.run(tmp_path / "half", **settings).fit())
    resumed = subject.run(tmp_path / "half", seed=99, max_epochs=2 * EPOCHS, **settings)
    resumed.fit(ckpt_path=checkpoint)
    for one, other in zip(results(resumed), results(whole), strict=True):
        assert torch.equal(one, other)


def test_layers_that_are_made_late_are_converted_and_averaged(tmp_path):
    run = together(*PERTURBED).run(tmp_path, EMAWeightAveraging(decay=0.5), model=Late()).fit()
    names = ("rnn.weight_hh_l0", "rnn.weight_hh_l0_rho", "head.weight", "head.weight_rho")
    assert set(names) <= {name for name, _ in run.model.named_parameters()}
    expected = run.watch.weights[1]
    for each in run.watch.weights[2:]:
        expected = (expected + each) / 2
    torch.testing.assert_close(results(run)[0], expected)


def test_reversible_perturbed_and_sampled_at_once_is_refused(tmp_path):
    subject = together(ReversibleRNN, Flipout, lambda: distillation()[:1])
    with pytest.raises(MisconfigurationException, match="two posteriors of one module"):
        subject.run(tmp_path).fit()


def test_the_posterior_of_a_reversible_network_is_one_of_its_weights(tmp_path):
    run = together(ReversibleRNN, distillation).run(tmp_path).fit()
    kinds = [type(each) for each in run.callbacks]
    assert kinds == [ReversibleRNN, SGLDSampler, PosteriorDistillation]
    posterior = run.callback(PosteriorDistillation).posterior
    assert posterior.layout.names == tuple(name for name, _ in run.model.named_parameters())
