"""`distil`: samples to a generator in one call."""

from itertools import count

import pytest
import torch

from lightning_revflip.apd import IdentityCodec, mode_shares
from lightning_revflip.apd.offline import distil
from tests.helpers.distilled import MODE, SPREAD, normal_rows, rows_of, two_mode_rows, write_bank


def draw(posterior, n=500):
    return rows_of(posterior.sample(n, torch.Generator().manual_seed(0)))


def test_both_modes_are_found(tmp_path):
    bank = write_bank(tmp_path / "bank", two_mode_rows(400))
    found = distil(bank, 4, steps=300, batch_size=32)
    assert len(found) == 400
    shares = mode_shares(draw(found), torch.stack([MODE, -MODE]), 2 * SPREAD * 8**0.5)
    assert shares.min() > 0.3
    assert shares.sum() > 0.6


def test_a_seed_gives_the_same_generator_and_leaves_the_global_one_alone(tmp_path):
    bank = write_bank(tmp_path / "bank", normal_rows(40)[0])
    torch.manual_seed(0)
    first = draw(distil(bank, 4, steps=3, seed=1))
    after = torch.rand(())
    torch.manual_seed(0)
    assert after == torch.rand(())
    assert torch.equal(draw(distil(bank, 4, steps=3, seed=1)), first)
    assert not torch.equal(draw(distil(bank, 4, steps=3, seed=2)), first)


def test_it_stops_after_the_seconds_it_was_given(tmp_path, monkeypatch):
    bank = write_bank(tmp_path / "bank", normal_rows(40)[0])
    clock = count()  # a second passes from one look at it to the next
    monkeypatch.setattr("lightning_revflip.apd.offline.time.monotonic", lambda: next(clock))
    stopped = draw(distil(bank, 4, steps=10**9, seconds=3))
    monkeypatch.undo()
    assert torch.equal(stopped, draw(distil(bank, 4, steps=3)))


def test_rank_none_is_the_paper(tmp_path):
    bank = write_bank(tmp_path / "bank", normal_rows(40)[0])
    found = distil(bank, None, steps=2)
    assert isinstance(found.codec, IdentityCodec)
    assert found.generator.settings() == {
        "latent_size": 32,
        "code_size": 8,
        "hidden": [100, 100, 100],
        "skip": False,
    }


def test_a_folder_is_the_bank_in_it(tmp_path):
    bank = write_bank(tmp_path / "bank", normal_rows(40)[0])
    expected = draw(distil(bank, 4, steps=2))
    for folder in (tmp_path / "bank", str(tmp_path / "bank")):
        assert torch.equal(draw(distil(folder, 4, steps=2)), expected)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        distil(tmp_path / "nowhere", 4)


def test_a_rank_that_the_samples_do_not_have_is_refused(tmp_path):
    bank = write_bank(tmp_path / "bank", normal_rows(5)[0])
    with pytest.raises(ValueError, match="rank must be from 1 to 4.*got 5"):
        distil(bank, 5)
