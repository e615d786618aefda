"""SampleBankCodes: which samples are held out, and which are drawn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_revflip.apd import IdentityCodec
from lightning_revflip.modules import SampleBankCodes, fit_codec
from lightning_revflip.modules.codes import CodeBatches, split_by_time
from lightning_revflip.posterior import ChainWriter, Layout, SampleBank
from tests.helpers.distilled import codes_of, normal_rows, small_apd, write_bank
from tests.helpers.models import quiet_trainer


@given(
    lengths=st.lists(st.integers(0, 60), max_size=4),
    holdout=st.floats(0, 1, exclude_max=True),
)
def test_each_sample_is_on_one_side_and_chains_are_divided_alike(lengths, holdout):
    train, held_out = split_by_time(lengths, holdout)
    # One sample by itself could not be compared with any other.
    alone = 2 if sum(round(holdout * length) for length in lengths) == 1 else 1
    assert sorted(train + held_out) == list(range(sum(lengths)))
    start = 0
    for length in lengths:
        own = [index for index in held_out if start <= index < start + length]
        assert len(own) == min(length, alone * round(holdout * length))
        blocks = sum(index + 1 not in own for index in own)
        assert blocks <= 4
        start += length


def test_codes_of_training_and_validation_are_those_of_the_split(tmp_path):
    bank = write_bank(tmp_path / "bank", normal_rows(40)[0], normal_rows(20, seed=3)[0])
    codec, data = codes_of(bank, holdout=0.25)
    data.setup("fit")
    train, held_out = split_by_time([40, 20], 0.25)
    assert torch.equal(data.train_codes, codec.encode(bank.rows(train)))
    (loader,) = data.val_dataloader()
    assert torch.equal(torch.cat(list(loader)), codec.encode(bank.rows(held_out)))


def test_a_folder_will_do_and_nothing_need_be_held_out(tmp_path):
    bank = write_bank(tmp_path / "bank", normal_rows(10)[0])
    codec, _ = codes_of(bank)
    data = SampleBankCodes(str(tmp_path / "bank"), codec, holdout=0.0)
    data.setup("fit")
    assert len(data.train_codes) == 10
    assert data.val_dataloader() == []


def test_draws_are_uniform_and_each_pass_has_others():
    loader = CodeBatches(torch.arange(10.0)[:, None], 100, 20, seed=0)
    first, second = torch.cat(list(loader)), torch.cat(list(loader))
    assert len(first) == 2000
    assert not torch.equal(first, second)
    counts = torch.cat([first, second]).flatten().long().bincount()
    # 400 expected of each, with a standard deviation of 19.
    assert (counts - 400).abs().max() < 4.5 * 19


@given(given=st.integers(0, 6))
def test_a_loader_goes_on_from_where_it_was(given):
    codes = torch.arange(10.0)[:, None]
    whole, first, rest = (CodeBatches(codes, 4, 6, seed=0) for _ in range(3))
    expected = list(whole)
    iterator = iter(first)
    for _ in range(given):
        next(iterator)
    rest.load_state_dict(first.state_dict())
    found = list(rest)
    if given == 6:  # a pass was over
        expected = list(whole)
        given = 0
    assert torch.equal(torch.stack(found), torch.stack(expected[given:]))


@pytest.mark.parametrize("given", [2, 6])
def test_the_next_loader_goes_on_from_the_state_of_the_data_module(tmp_path, given):
    bank = write_bank(tmp_path / "bank", normal_rows(40)[0])
    whole, first, other = (codes_of(bank, batches_per_epoch=6)[1] for _ in range(3))
    for each in (whole, first, other):
        each.setup("fit")
    loader = whole.train_dataloader()
    expected = [*loader, *loader]
    iterator = iter(first.train_dataloader())
    for _ in range(given):
        next(iterator)
    other.load_state_dict(first.state_dict())
    assert torch.equal(next(iter(other.train_dataloader())), expected[given])


def test_settings_out_of_range_are_refused(tmp_path):
    bank = write_bank(tmp_path / "bank", normal_rows(10)[0])
    for settings, message in [
        ({"holdout": 1.0}, "holdout must be a share.*got 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            codes_of(bank, **settings)
    _, data = codes_of(bank, holdout=0.99)
    with pytest.raises(ValueError, match="no samples to train on: holdout=0.99 keeps 10"):
        data.setup("fit")


@pytest.mark.parametrize("samples", range(6, 15))
def test_a_small_bank_is_divided_by_the_default_share(tmp_path, samples):
    _, data = codes_of(write_bank(tmp_path / "bank", normal_rows(samples)[0]))
    data.setup("fit")
    assert (len(data.train_codes), len(data.val_codes)) == (samples - 2, 2)


def test_a_bank_of_another_architecture_is_refused(tmp_path):
    codec, _ = codes_of(write_bank(tmp_path / "bank", normal_rows(10)[0]))
    layout = Layout.of_parameters(nn.Linear(4, 2))
    with ChainWriter(tmp_path / "other", layout, max_samples=None) as writer:
        writer.append(0, torch.zeros(10))
    data = SampleBankCodes(SampleBank(tmp_path / "other"), codec, holdout=0.0)
    with pytest.raises(ValueError, match=r"'weight' of shape \(2, 4\), expected \(2, 3\)"):
        data.setup("fit")


def test_without_a_codec_it_takes_that_of_the_module(tmp_path):
    bank = write_bank(tmp_path / "bank", normal_rows(20)[0])
    module = small_apd(fit_codec(tmp_path / "bank", 3))
    data = SampleBankCodes(bank, batch_size=20, batches_per_epoch=1)
    quiet_trainer(tmp_path).fit(module, data)
    assert torch.equal(
        data.train_codes, module.codec.encode(bank.rows(split_by_time([20], 0.1)[0]))
    )
    with pytest.raises(ValueError, match="SampleBankCodes has no codec"):
        SampleBankCodes(bank).setup("fit")


def test_the_codec_of_rank_none_is_the_identity(tmp_path):
    bank = write_bank(tmp_path / "bank", normal_rows(20)[0])
    assert isinstance(fit_codec(bank, None), IdentityCodec)
