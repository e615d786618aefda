"""What a writer refuses, and that nothing is lost then."""

import multiprocessing
import resource

import pytest
import torch

from lightning_revflip.posterior.bank import SampleBank
from lightning_revflip.posterior.layout import Layout
from lightning_revflip.posterior.writer import ChainWriter
from tests.helpers.banks import (
    LAYOUT,
    append,
    files,
    fill,
    full_disk,
    make_writer,
    row,
    rows,
    serials,
)

WITH_BUFFER = Layout(("count",), ((),))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("as_row", [True, False])
def test_a_sample_that_is_not_finite_is_refused_with_step_and_parameter(tmp_path, value, as_row):
    bad = row(1)
    bad[7] = value
    named = {name: values[0] for name, values in LAYOUT.unflatten(bad[None]).items()}
    with make_writer(tmp_path) as writer:
        append(writer, 1)
        with pytest.raises(ValueError, match=r"step 123 has NaN or infinite values in 'bias'"):
            writer.append(123, bad if as_row else named)
        assert writer.seen == 1
        append(writer, 2)
    assert serials(SampleBank(tmp_path)) == [0, 1, 2]


def test_values_too_large_for_float16_are_refused_with_the_way_out(tmp_path):
    with make_writer(tmp_path, dtype=torch.float16) as writer:
        with pytest.raises(
            ValueError, match=r"up to 7e\+04 in 'weight', more than float16.*bfloat"
        ):
            writer.append(5, torch.full((9,), 7e4))
        append(writer, 1)


def test_large_values_whose_sum_overflows_are_kept(tmp_path):
    large = torch.full((9,), 3e38)
    with make_writer(tmp_path, dtype=torch.float32) as writer:
        writer.append(0, large)
    assert torch.equal(SampleBank(tmp_path).rows()[0], large)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (torch.zeros(8), r"must have shape \(9,\), got \(8,\)"),
        ({"weight": torch.zeros(3, 2)}, "'bias' of shape .* is missing"),
    ],
    ids=["row", "names"],
)
def test_samples_of_another_layout_are_refused(tmp_path, parameters, message):
    with make_writer(tmp_path) as writer, pytest.raises(ValueError, match=message):
        writer.append(0, parameters)
    assert writer.seen == 0


@pytest.mark.parametrize(
    ("layout", "given", "message"),
    [
        (None, {"count": torch.tensor(1)}, "the bank was made without"),
        (WITH_BUFFER, None, "the buffers count are missing"),
        (WITH_BUFFER, {}, "'count' of shape .* is missing"),
        (WITH_BUFFER, {"count": torch.tensor(1.5)}, "'count' is float32, but was int64"),
    ],
    ids=["unexpected", "missing", "names", "dtype"],
)
def test_buffers_other_than_agreed_are_refused(tmp_path, layout, given, message):
    with make_writer(tmp_path, buffer_layout=layout) as writer:
        writer.append(0, row(0), layout and {"count": torch.tensor(1)})
        with pytest.raises(ValueError, match=message):
            writer.append(1, row(1), given)
    assert len(SampleBank(tmp_path)) == 1


def test_buffers_of_a_dtype_without_a_file_format_are_refused(tmp_path):
    with make_writer(tmp_path, buffer_layout=WITH_BUFFER) as writer:
        with pytest.raises(ValueError, match="'count' is complex64, which cannot be stored"):
            writer.append(0, row(0), {"count": torch.tensor(1j)})
        writer.append(0, row(0), {"count": torch.tensor(True)})
    assert SampleBank(tmp_path).buffers()["count"].tolist() == [True]


def test_a_closed_writer_refuses_samples(tmp_path):
    writer = make_writer(tmp_path)
    writer.close()
    writer.close()
    for call in (lambda: writer.append(0, row(0)), writer.flush, lambda: writer.rewind(0)):
        with pytest.raises(ValueError, match="the writer of chain 0 of .* is closed"):
            call()


@pytest.mark.parametrize("seen", [-1, 4])
def test_a_chain_cannot_be_rewound_to_what_it_has_not_seen(tmp_path, seen):
    with make_writer(tmp_path) as writer:
        append(writer, 3)
        with pytest.raises(ValueError, match=f"to {seen} samples: 3 have been offered"):
            writer.rewind(seen)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"policy": "latest"}, "has policy='spread', expected 'latest'"),
        ({"max_samples": 7}, "has max_samples=None, expected 7"),
        ({"dtype": torch.bfloat16}, "has dtype=torch.float16, expected torch.bfloat16"),
        ({"seed": 1}, "has seed=0, expected 1"),
        ({"buffer_layout": WITH_BUFFER}, "in its buffers, lacks 'count'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_chain_is_not_continued_with_other_settings(tmp_path, setting, message):
    fill(tmp_path, 5)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):
        make_writer(tmp_path, **setting)
    assert files(tmp_path) == before
    fill(tmp_path, 1)


@pytest.mark.parametrize("chain", [0, 1])
def test_samples_of_another_network_do_not_enter_a_bank(tmp_path, chain):
    fill(tmp_path, 5)
    other = Layout(LAYOUT.names, ((3, 3), (3,)))
    with pytest.raises(ValueError, match="'weight' of shape"):
        ChainWriter(tmp_path, other, chain=chain, max_samples=None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_samples": 0}, "max_samples must be at least 1"),
        ({"policy": "fifo"}, "policy must be one of"),
        ({"dtype": torch.float64}, "dtype must be one of float32, float16, bfloat16, got float64"),
        ({"shard_samples": 0}, "shard_samples must be at least 1"),
        ({"chain": -1}, "chain must be at least 0"),
        ({"metadata": {"lr": torch.tensor(1.0)}}, "metadata must be a dict of plain values"),
        ({"metadata": {"shape": (1, 2)}}, "metadata must be a dict of plain values"),
        ({"metadata": {"lr": float("nan")}}, "metadata must be a dict of plain values"),
    ],
    ids=range(8),
)
def test_settings_out_of_range_are_refused_before_anything_is_made(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        make_writer(tmp_path / "bank", **setting)
    assert not (tmp_path / "bank").exists()


def test_a_chain_has_one_writer_in_a_process(tmp_path):
    with (
        make_writer(tmp_path),
        pytest.raises(RuntimeError, match="another process, or by a writer"),
    ):
        make_writer(tmp_path)
    make_writer(tmp_path).close()


def test_a_chain_has_one_writer_among_processes(tmp_path):
    with make_writer(tmp_path), multiprocessing.get_context("fork").Pool(1) as pool:
        with pytest.raises(RuntimeError, match="is being written by another process"):
            pool.apply(fill, (tmp_path, 1))
        pool.apply(fill, (tmp_path, 5), {"chain": 1})
    assert SampleBank(tmp_path).chains == (0, 1)


@pytest.mark.parametrize("shard_samples", [1, 2, 3, 8])
def test_on_a_full_disk_samples_wait_until_there_is_space(tmp_path, monkeypatch, shard_samples):
    with make_writer(tmp_path, shard_samples=shard_samples) as writer:
        append(writer, 5)
        writer.flush()
        with full_disk(monkeypatch):
            with pytest.raises(OSError, match=r"cannot write .* No space left.*nothing is lost"):
                append(writer, 20)
            seen = writer.seen
            assert seen - 5 <= shard_samples
            for _ in range(3):
                with pytest.raises(OSError, match="free space, then call flush"):
                    writer.flush()
                with pytest.raises(OSError, match="No space left"):
                    append(writer, shard_samples)
            there, named = files(tmp_path)
            assert there == named
            assert serials(SampleBank(tmp_path)) == list(range(5))
        append(writer, 4)
    bank = SampleBank(tmp_path)
    assert serials(bank) == list(range(writer.seen))
    assert torch.equal(bank.rows(), rows(serials(bank)))


def test_a_writer_that_cannot_write_its_last_samples_stays_open(tmp_path, monkeypatch):
    writer = make_writer(tmp_path)
    append(writer, 1)
    with full_disk(monkeypatch), pytest.raises(OSError, match="No space left"):
        writer.close()
    assert not writer.closed
    writer.close()
    assert len(SampleBank(tmp_path)) == 1


def test_a_rewind_on_a_full_disk_changes_nothing(tmp_path, monkeypatch):
    with make_writer(tmp_path) as writer:
        append(writer, 9)
        with full_disk(monkeypatch), pytest.raises(OSError, match="No space left"):
            writer.rewind(4)
        assert (writer.seen, len(writer)) == (9, 9)
        writer.rewind(4)
    assert serials(SampleBank(tmp_path)) == [0, 1, 2, 3]


def test_a_limit_of_the_system_is_met_like_a_full_disk(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    layout = Layout(("weight",), ((50_000,),))
    with ChainWriter(tmp_path, layout, max_samples=None) as writer:
        writer.append(0, torch.zeros(50_000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"1 samples \(100,000 bytes\).*File too large"):
                writer.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(SampleBank(tmp_path)) == 1
