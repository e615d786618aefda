"""What a writer keeps, in files and after an interruption."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lightning_revflip.posterior.bank import SampleBank
from lightning_revflip.posterior.layout import Layout
from lightning_revflip.posterior.policies import POLICIES
from tests.helpers.banks import LAYOUT, append, files, fill, held, make_writer, row, rows, serials

BUFFERS = Layout(("mean", "count", "mask"), ((2,), (), (3,)))


def buffers(serial):
    return {
        "mean": torch.tensor([serial, 0.5]),
        "count": torch.tensor(2**40 + serial),
        "mask": torch.arange(3) == serial % 3,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_samples_are_stored_in_the_dtype_asked_for(tmp_path, dtype):
    values = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    with make_writer(tmp_path, dtype=dtype) as writer:
        for step, sample in enumerate(values):
            assert writer.append(step, sample)
    assert torch.equal(SampleBank(tmp_path).rows(), values.to(dtype).float())


def test_parameters_by_name_and_as_a_row_are_the_same(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.append(0, row(7))
        named = {name: value[0] for name, value in LAYOUT.unflatten(row(7)[None]).items()}
        writer.append(1, {"bias": named["bias"].requires_grad_(), "weight": named["weight"]})
    one, other = SampleBank(tmp_path).rows()
    assert torch.equal(one, other)


def test_later_changes_of_the_parameters_do_not_reach_the_bank(tmp_path):
    values = row(0)
    with make_writer(tmp_path) as writer:
        writer.append(0, values)
        values += 1
    assert torch.equal(SampleBank(tmp_path).rows()[0], row(0))


def test_buffers_keep_their_dtypes(tmp_path):
    for start in (0, 6):  # the second writer knows them from the manifest
        with make_writer(tmp_path, buffer_layout=BUFFERS) as writer:
            for serial in range(start, start + 6):
                writer.append(serial, row(serial), buffers(serial))
    stacked = SampleBank(tmp_path).buffers()
    assert stacked["count"].dtype == torch.int64
    assert torch.equal(stacked["count"], 2**40 + torch.arange(12))
    assert torch.equal(stacked["mean"][:, 0], torch.arange(12.0))
    assert torch.equal(stacked["mask"], torch.eye(3, dtype=torch.bool).repeat(4, 1))


def test_shards_are_files_that_the_safetensors_library_reads(tmp_path):
    with make_writer(tmp_path, buffer_layout=BUFFERS) as writer:
        for serial in range(2):
            writer.append(serial, row(serial), buffers(serial))
    stored = load_file(tmp_path / "chain-0000" / "shard-000000.safetensors")
    assert torch.equal(stored["rows"], rows(range(2)).half())
    assert torch.equal(stored["buffers.count"], 2**40 + torch.arange(2))
    assert stored.keys() == {"rows", "buffers.mean", "buffers.count", "buffers.mask"}


@pytest.mark.parametrize("policy", POLICIES)
@given(st.integers(1, 12), st.integers(1, 9), st.lists(st.integers(0, 60), max_size=3))
@settings(max_examples=8, deadline=None)
def test_a_bank_holds_what_its_policy_keeps(tmp_path_factory, policy, size, shard, parts):
    path = tmp_path_factory.mktemp("bank")
    for count in [*parts, 0]:  # each by a writer of its own
        fill(path, count, policy=policy, max_samples=size, shard_samples=shard)
    bank = SampleBank(path)
    assert serials(bank) == held(policy, size, sum(parts))
    assert torch.equal(bank.rows(), rows(serials(bank)))
    there, named = files(path)
    assert there == named


@pytest.mark.parametrize("policy", POLICIES)
def test_append_says_what_was_kept(tmp_path, policy):
    with make_writer(tmp_path, policy=policy, max_samples=4) as writer:
        for serial in range(50):
            kept = writer.append(serial, row(serial))
            assert kept == (serial in held(policy, 4, serial + 1))
            assert len(writer) == len(held(policy, 4, serial + 1))
            assert writer.seen == serial + 1


def test_a_refused_sample_is_not_looked_at(tmp_path):
    with make_writer(tmp_path, policy="spread", max_samples=2) as writer:
        append(writer, 2)
        assert not writer.append(2, torch.full((9,), torch.nan))


@pytest.mark.parametrize("policy", ["spread", "reservoir"])
def test_samples_that_left_take_little_space(tmp_path, policy):
    with make_writer(tmp_path, policy=policy, max_samples=20) as writer:
        for _ in range(20):
            append(writer, 20)
            writer.flush()
            shards = (tmp_path / "chain-0000").glob("*.safetensors")
            stored = sum(len(load_file(shard)["rows"]) for shard in shards)
            # Twice 20, and those that have left since the files were merged last.
            assert stored <= 2 * 20 + 10


@pytest.mark.parametrize("policy", POLICIES)
@given(st.integers(1, 10), st.integers(0, 60), st.data())
@settings(max_examples=10, deadline=None)
def test_a_chain_that_was_rewound_becomes_that_of_an_uninterrupted_run(
    tmp_path_factory, policy, size, reached, data
):
    path = tmp_path_factory.mktemp("bank")
    kind = {"policy": policy, "max_samples": size, "shard_samples": 10}
    checkpoint = data.draw(st.integers(0, reached))
    fill(path, reached, **kind)
    with make_writer(path, **kind) as writer:
        writer.rewind(checkpoint)
        assert writer.seen == checkpoint
        # Until as many were offered as before, those may be missing that had been replaced.
        assert set(serials(SampleBank(path))) <= set(held(policy, size, checkpoint))
        append(writer, reached - checkpoint + data.draw(st.integers(0, 20)))
    bank = SampleBank(path)
    assert serials(bank) == held(policy, size, writer.seen)
    assert torch.equal(bank.rows(), rows(serials(bank)))


def test_without_a_limit_a_rewound_chain_is_complete_at_once(tmp_path):
    fill(tmp_path, 21)
    with make_writer(tmp_path) as writer:
        append(writer, 2)  # also those that are not on the disk yet are dropped
        writer.rewind(10)
        assert len(writer) == 10
    assert serials(SampleBank(tmp_path)) == list(range(10))


def test_metadata_of_a_chain_grow(tmp_path):
    fill(tmp_path, 1, metadata={"num_data": 50_000, "lr": 0.1})
    fill(tmp_path, 1, metadata={"lr": 0.05, "layers": [1, 2]})
    expected = {"num_data": 50_000, "lr": 0.05, "layers": [1, 2]}
    assert SampleBank(tmp_path).metadata == expected


def test_an_unclosed_writer_writes_nothing_when_it_is_collected(tmp_path):
    writer = make_writer(tmp_path, shard_samples=100)
    append(writer, 3)
    before = files(tmp_path)
    del writer
    assert files(tmp_path) == before
    assert len(SampleBank(tmp_path)) == 0
    make_writer(tmp_path).close()  # nor does it hold the lock


def test_half_of_the_samples_in_memory_are_written_while_the_other_half_fills(tmp_path):
    with make_writer(tmp_path, shard_samples=10) as writer:
        append(writer, 5)
        append(writer, 5)  # the last of them waits for the first five
        assert len(SampleBank(tmp_path)) in (5, 10)
