"""SGLDSampler: an ordinary module trains as by hand with a sampler, and its weights are kept."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch.optim.lr_scheduler import (
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_revflip.callbacks import SGLDSampler
from lightning_revflip.posterior import SampleBank
from lightning_revflip.sgld import PSGLD, SGHMC, SGLD, CyclicalSchedule
from tests.helpers.sampled_models import (
    BATCH,
    LR,
    POINTS,
    Blobs,
    blobs,
    fit,
    loader,
    sampler,
    steps_by_hand,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")

DECAY = 0.01
STEPS = 6
"""In an epoch."""


def decayed(module):
    return torch.optim.SGD(module.parameters(), lr=LR, weight_decay=DECAY)


def by_hand(module, lr=LR, temperature=1.0, prior_precision=0.0, kind=SGLD, **options):
    """The sampler that a run of `sampler(...)` must equal."""
    return kind(
        module.parameters(),
        lr,
        num_data=POINTS,
        temperature=temperature,
        prior_precision=prior_precision,
        generator=torch.Generator().manual_seed(7),
        **options,
    )


def rows_by_hand(module, optimizer, epochs, wanted, after_step=None, on_epoch_end=None):
    rows = []
    for step in steps_by_hand(module, optimizer, epochs, on_epoch_end):
        if step in wanted:
            rows.append(weights(module))
        if after_step is not None:
            after_step()
    return torch.stack(rows)


# --- configure_optimizers in all forms -------------------------------------------------------


def per_epoch(optimizer):
    return StepLR(optimizer, 1, gamma=0.5)


def per_step(optimizer):
    return OneCycleLR(optimizer, 0.3, total_steps=2 * STEPS, cycle_momentum=False)


def from_zero(optimizer):
    """A warm-up that begins with a step size of 0."""
    return LambdaLR(optimizer, lambda step: min(1.0, step / 4))


def sequential(optimizer):
    parts = [LinearLR(optimizer, 0.1, total_iters=3), StepLR(optimizer, 2, gamma=0.7)]
    return SequentialLR(optimizer, parts, milestones=[4])


FORMS = {
    "optimizer": (decayed, None, None),
    "list": (lambda m: [decayed(m)], None, None),
    "dict": (lambda m: {"optimizer": decayed(m)}, None, None),
    "two_lists": (lambda m: two_lists(m, per_epoch), per_epoch, "epoch"),
    "lists_with_dict": (lambda m: lists_with_dict(m, per_step), per_step, "step"),
    "dict_with_schedule": (lambda m: with_schedule(m, per_epoch, "epoch"), per_epoch, "epoch"),
    "one_cycle": (lambda m: with_schedule(m, per_step, "step"), per_step, "step"),
    "warm_up": (lambda m: with_schedule(m, from_zero, "step"), from_zero, "step"),
    "sequential": (lambda m: with_schedule(m, sequential, "step"), sequential, "step"),
}


def two_lists(module, schedule):
    optimizer = decayed(module)
    return [optimizer], [schedule(optimizer)]


def lists_with_dict(module, schedule):
    optimizer = decayed(module)
    return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]


def with_schedule(module, schedule, interval):
    optimizer = decayed(module)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule(optimizer), "interval": interval},
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_module_trains_as_by_hand_with_a_sampler(tmp_path, form):
    configure, schedule, interval = FORMS[form]
    with warnings.catch_warnings():
        # Torch tells if it thinks that a schedule was stepped before its optimizer.
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        warnings.filterwarnings("error", message=".*optimizer.step.*")
        found, _ = fit(tmp_path, sampler(tmp_path), model=blobs(configure))

    expected = blobs()
    optimizer = by_hand(expected, prior_precision=DECAY * POINTS)
    stepped = None if schedule is None else schedule(optimizer)
    rows = rows_by_hand(
        expected,
        optimizer,
        2,
        range(6, 13, 2),
        after_step=stepped.step if interval == "step" else None,
        on_epoch_end=stepped.step if interval == "epoch" else None,
    )
    assert torch.equal(weights(found), weights(expected))
    bank = SampleBank(tmp_path / "bank")
    assert bank.steps == {0: [6, 8, 10, 12]}
    assert torch.equal(bank.rows(), rows)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [("psgld", PSGLD, {"adaptation_steps": 4}), ("sghmc", SGHMC, {"friction": 0.3})],
)
def test_other_samplers_train_as_by_hand(tmp_path, name, kind, options):
    given = {} if name == "psgld" else options  # PSGLD adapts during the burn-in
    callback = sampler(tmp_path, sampler=name, sampler_options=given, temperature=0.3)
    found, _ = fit(tmp_path, callback, model=blobs())
    expected = blobs()
    optimizer = by_hand(expected, temperature=0.3, kind=kind, **options)
    rows_by_hand(expected, optimizer, 2, [1])
    assert torch.equal(weights(found), weights(expected))


def test_psgld_that_the_module_returns_adapts_as_it_says(tmp_path):
    model = blobs(lambda module: by_hand(module, kind=PSGLD, adaptation_steps=9))
    _, trainer = fit(tmp_path, sampler(tmp_path, sampler="psgld"), model=model)
    assert trainer.optimizers[0].param_groups[0]["adaptation_steps"] == 9


def test_a_sampler_that_the_module_returns_is_kept(tmp_path):
    made = []

    def configure(module):
        made.append(by_hand(module, prior_precision=2.0))
        return made[0]

    found, trainer = fit(tmp_path, sampler(tmp_path), model=blobs(configure))
    expected = blobs()
    rows_by_hand(expected, by_hand(expected, prior_precision=2.0), 2, [1])
    assert trainer.optimizers == made
    assert torch.equal(weights(found), weights(expected))


def test_groups_keep_their_learning_rate_decay_and_other_entries(tmp_path):
    def configure(module):
        groups = [
            {"params": module.net[0].parameters(), "lr": 0.2, "name": "first"},
            {"params": module.net[2].parameters(), "weight_decay": 0.5},
        ]
        return torch.optim.SGD(groups, lr=0.1, weight_decay=0.25)

    _, trainer = fit(tmp_path, sampler(tmp_path), model=blobs(configure))
    first, second = trainer.optimizers[0].param_groups
    assert (first["lr"], first["prior_precision"], first["name"]) == (0.2, 6.0, "first")
    assert (second["lr"], second["prior_precision"]) == (0.1, 12.0)


def test_a_plateau_schedule_lowers_the_step_size_of_the_sampler(tmp_path):
    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=LR)
        plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": plateau, "monitor": "train_loss"},
        }

    _, trainer = fit(tmp_path, sampler(tmp_path), model=blobs(configure), epochs=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == LR / 8


class Gradients(Callback):
    """Checks the gradients that a step leaves."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before = [p.grad.clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *_):
        after = [p.grad for p in pl_module.parameters()]
        assert all(map(torch.equal, self.before, after))


def test_gradients_are_not_modified(tmp_path):
    def configure(module):
        return torch.optim.SGD(module.parameters(), lr=LR, weight_decay=0.5)

    fit(tmp_path, sampler(tmp_path), Gradients(), model=blobs(configure))


def test_the_module_has_its_own_optimizer_back_afterwards(tmp_path):
    model, _ = fit(tmp_path, sampler(tmp_path))
    assert type(model.configure_optimizers()) is torch.optim.SGD
    assert "configure_optimizers" not in vars(model)


# --- which samples are kept ------------------------------------------------------------------


def test_accumulated_gradients_count_as_one_step(tmp_path):
    callback = sampler(tmp_path, burn_in=2)
    fit(tmp_path, callback, accumulate_grad_batches=2)
    assert callback.steps == 6
    assert SampleBank(tmp_path / "bank").steps == {0: [4, 6]}


class Manual(Blobs):
    """Steps every third batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]) / 3)
        if batch_idx % 3 == 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_manual_optimization_counts_the_steps_it_takes(tmp_path):
    torch.manual_seed(0)
    model = Manual()
    callback = sampler(tmp_path, burn_in=1, every_n_steps=3)
    fit(tmp_path, callback, model=model, epochs=4)
    bank = SampleBank(tmp_path / "bank")
    assert callback.steps == 8
    assert bank.steps == {0: [4, 7]}
    assert not torch.equal(bank.rows([1])[0], weights(model))


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("latest", [20, 22, 24]), ("spread", [12, 20]), ("reservoir", None)],
)
def test_at_most_max_samples_are_kept_as_the_policy_says(tmp_path, policy, kept):
    offered = list(range(6, 25, 2))
    everything = sampler(tmp_path / "all")
    fit(tmp_path, everything, epochs=4)
    callback = sampler(tmp_path, max_samples=3, policy=policy)
    fit(tmp_path, callback, epochs=4)
    bank, whole = SampleBank(tmp_path / "bank"), SampleBank(tmp_path / "all" / "bank")
    assert whole.steps[0] == offered
    found = bank.steps[0]
    assert len(found) <= 3
    if kept is not None:
        assert found == kept
    assert torch.equal(bank.rows(), whole.rows([offered.index(step) for step in found]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_samples_are_rounded_to_the_dtype_of_storage(tmp_path, dtype):
    fit(tmp_path, sampler(tmp_path / "full"))
    fit(tmp_path, sampler(tmp_path, dtype=dtype))
    exact = SampleBank(tmp_path / "full" / "bank").rows()
    rounded = exact.to(getattr(torch, dtype)).float()
    assert torch.equal(SampleBank(tmp_path / "bank").rows(), rounded)


@pytest.mark.parametrize("place", ["callback", "module", "within_another"])
def test_cyclical_schedules_collect_only_where_they_sample(tmp_path, place):
    def cyclical(optimizer):
        return CyclicalSchedule(optimizer, cycle_steps=6, exploration=0.5)

    def behind_warm_up(optimizer):
        parts = [LinearLR(optimizer, 0.1, total_iters=6), cyclical(optimizer)]
        return SequentialLR(optimizer, parts, milestones=[6])

    temperatures = []

    class Temperatures(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            temperatures.append(optimizer.param_groups[0]["temperature"])

    changes = {"burn_in": 0, "every_n_steps": 1}
    if place == "callback":
        callback, model = sampler(tmp_path, schedule=cyclical, **changes), blobs()
    else:
        schedule = cyclical if place == "module" else behind_warm_up
        callback = sampler(tmp_path, **changes)
        model = blobs(lambda module: with_schedule(module, schedule, "step"))
    fit(tmp_path, callback, Temperatures(), model=model, epochs=2)
    sampling = [4, 5, 6, 10, 11, 12] if place != "within_another" else [10, 11, 12]
    assert SampleBank(tmp_path / "bank").steps == {0: sampling}
    assert [i + 1 for i, each in enumerate(temperatures) if each > 0] == sampling


def test_the_bank_notes_how_its_samples_were_drawn(tmp_path):
    fit(tmp_path, sampler(tmp_path, temperature=0.5, prior_precision=3.0))
    assert SampleBank(tmp_path / "bank").metadata == {
        "sampler": "SGLD",
        "burn_in": 4,
        "every_n_steps": 2,
        "lr": LR,
        "num_data": POINTS,
        "temperature": 0.5,
        "prior_precision": 3.0,
    }


def test_frozen_weights_are_no_part_of_a_sample(tmp_path):
    model = blobs()
    model.net[0].requires_grad_(False)
    fit(tmp_path, sampler(tmp_path), model=model)
    assert SampleBank(tmp_path / "bank").layout.names == ("net.2.weight", "net.2.bias")


# --- how many training examples there are ----------------------------------------------------


def test_auto_counts_the_training_examples(tmp_path):
    _, trainer = fit(tmp_path, sampler(tmp_path, num_data="auto"))
    assert trainer.optimizers[0].param_groups[0]["num_data"] == POINTS


def test_another_number_is_warned_of_with_both(tmp_path):
    with pytest.warns(UserWarning, match=r"SGLDSampler\(num_data=100\) differs from the 24 items"):
        fit(tmp_path, sampler(tmp_path, num_data=100))


def test_the_right_number_gives_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*num_data.*")
        fit(tmp_path, sampler(tmp_path))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(loader().dataset)


def test_auto_needs_data_of_known_length(tmp_path):
    stream = torch.utils.data.DataLoader(Stream(), BATCH)
    with pytest.raises(ValueError, match=r"a Stream, has no length. Give SGLDSampler\(num_data"):
        fit(tmp_path, sampler(tmp_path, num_data="auto"), train=stream)


def test_a_given_number_needs_no_length(tmp_path):
    callback = sampler(tmp_path)
    fit(tmp_path, callback, train=torch.utils.data.DataLoader(Stream(), BATCH))
    assert callback.steps == 2 * STEPS


def test_the_noise_follows_from_the_seed_or_the_global_generator(tmp_path):
    found = [
        weights(fit(tmp_path, sampler(tmp_path / str(i), seed=seed))[0])
        for i, seed in enumerate((1, 1, 2, None, None))
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[3], found[4])  # `fit` seeds the global one
    assert isinstance(sampler(tmp_path), SGLDSampler)
