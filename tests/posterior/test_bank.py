"""Reading a bank: which samples, in which order, while it is written, and what is refused."""

import json

import pytest
import torch
from torch import nn

from lightning_revflip.posterior.bank import SampleBank
from lightning_revflip.posterior.layout import Layout
from lightning_revflip.posterior.writer import ChainWriter
from tests.helpers.banks import LAYOUT, append, files, fill, make_writer, row, rows, serials

BUFFERS = Layout(("mean",), ((2,),))


def fill_chains(path, *counts, **settings):
    for chain, count in enumerate(counts):
        fill(path, count, chain=chain, metadata={"lr": 0.1, "rank": chain}, **settings)
    return SampleBank(path)


def fill_with_buffers(path, count):
    with make_writer(path, buffer_layout=BUFFERS) as writer:
        for serial in range(count):
            writer.append(serial, row(serial), {"mean": torch.tensor([serial, 1.0])})
    return SampleBank(path)


def test_samples_come_chain_by_chain_and_in_order(tmp_path):
    bank = fill_chains(tmp_path, 5, 0, 3)
    expected = torch.cat([rows(range(5)), rows(range(3), chain=2)])
    assert torch.equal(bank.rows(), expected)
    assert torch.equal(bank.rows([6, 0]), expected[[6, 0]])
    assert bank.chains == (0, 1, 2)
    assert bank.steps == {0: [0, 10, 20, 30, 40], 1: [], 2: [0, 10, 20]}
    assert len(bank) == 8
    assert bank.nbytes == 8 * 9 * 2
    assert "8 samples of 9 parameters, 3 chains, float16" in repr(bank)


def test_metadata_are_those_that_all_chains_share(tmp_path):
    bank = fill_chains(tmp_path, 1, 1)
    assert bank.metadata == {"lr": 0.1}
    assert bank.chain_metadata == {0: {"lr": 0.1, "rank": 0}, 1: {"lr": 0.1, "rank": 1}}


def test_some_chains_can_be_opened_alone(tmp_path):
    fill_chains(tmp_path, 2, 3, 4)
    bank = SampleBank(tmp_path, chains=[2, 0])
    assert bank.chains == (0, 2)
    assert len(bank) == 6
    with pytest.raises(FileNotFoundError, match="has no chain 5; it has 0, 1, 2"):
        SampleBank(tmp_path, chains=[0, 5])


@pytest.mark.parametrize("size", [1, 3, 100])
def test_chunks_are_all_rows(tmp_path, size):
    bank = fill_chains(tmp_path, 7, 4)
    chunks = list(bank.chunks(size))
    assert torch.equal(torch.cat(chunks), bank.rows())
    assert all(len(chunk) == size for chunk in chunks[:-1])


def test_samples_are_spread_evenly_over_chains_and_time(tmp_path):
    bank = fill_chains(tmp_path, 100, 3, 100, 100, shard_samples=100)
    weights = bank.sample(20)["weight"][:, 0, 0]
    expected = [
        *[15, 32, 49, 65, 82, 99],
        *[100, 101, 102],
        *[200 + serial for serial in (15, 32, 49, 65, 82, 99)],
        *[300 + serial for serial in (19, 39, 59, 79, 99)],
    ]
    assert weights.tolist() == [value % 251 for value in expected]


def test_all_samples_are_the_bank_itself(tmp_path):
    bank = fill_chains(tmp_path, 6, 2)
    assert torch.equal(LAYOUT.flatten({k: v[3] for k, v in bank.sample(8).items()}), row(3))
    for name, values in LAYOUT.unflatten(bank.rows()).items():
        assert torch.equal(bank.sample(8)[name], values)


def test_a_generator_draws_without_replacement_and_repeatably(tmp_path):
    bank = fill_chains(tmp_path, 10, 10)
    drawn = [bank.sample(15, torch.Generator().manual_seed(seed))["bias"] for seed in (0, 0, 1)]
    assert len(drawn[0].unique(dim=0)) == 15
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
@pytest.mark.parametrize("seed", [None, 4])
def test_chunks_of_a_sample_are_the_sample(tmp_path, cache_bytes, seed):
    fill_with_buffers(tmp_path, 9)
    bank = SampleBank(tmp_path, cache_bytes=cache_bytes)

    def generator():
        return None if seed is None else torch.Generator().manual_seed(seed)

    for n in (7, 4, 7):
        whole = bank.sample(n, generator())
        chunks = list(bank.sample_chunks(n, 3, generator()))
        for name, values in whole.items():
            assert torch.equal(torch.cat([chunk[name] for chunk in chunks]), values)


def test_a_repeated_prediction_does_not_read_again(tmp_path, monkeypatch):
    bank = fill_chains(tmp_path, 9)
    first = next(bank.sample_chunks(9, 9))
    monkeypatch.setattr(bank, "rows", None)
    again = next(bank.sample_chunks(9, 9))
    assert again["weight"].data_ptr() == first["weight"].data_ptr()


def test_what_sample_returns_is_the_callers_own(tmp_path):
    bank = fill_chains(tmp_path, 4)
    bank.sample(4)["weight"].zero_()
    bank.rows().zero_()
    assert torch.equal(bank.rows(), rows(range(4)))


def test_a_network_predicts_with_its_samples(tmp_path):
    network, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(), torch.randn(5, 4)
    layout, statistics = Layout.of_parameters(network), Layout.of_buffers(network)
    expected = []
    settings = {"max_samples": None, "buffer_layout": statistics, "dtype": torch.float32}
    with ChainWriter(tmp_path, layout, **settings) as writer, torch.no_grad():
        for step in range(4):
            for tensor in (*network.parameters(), network[1].running_mean):
                tensor.normal_()
            buffers = {name: network.state_dict()[name] for name in statistics.names}
            writer.append(step, dict(network.named_parameters()), buffers)
            expected.append(network(x).softmax(-1))
    bank = SampleBank(tmp_path)
    bank.check_module(network)
    torch.testing.assert_close(bank.predict(network, x), torch.stack(expected))


def test_other_buffers_take_the_place_of_the_stored_ones(tmp_path):
    bank = fill_with_buffers(tmp_path, 6)
    other = torch.randn(6, 2)
    replaced = bank.with_buffers({"mean": other})
    assert torch.equal(replaced.sample(3)["mean"], other[[1, 3, 5]])
    assert torch.equal(bank.buffers()["mean"][:, 0], torch.arange(6.0))
    replaced.save(tmp_path / "copy")
    assert torch.equal(SampleBank(tmp_path / "copy").buffers()["mean"], other)
    with pytest.raises(ValueError, match="were replaced"):
        replaced.refresh()
    with pytest.raises(ValueError, match="for each of 6 samples, got 5 of 'mean'"):
        bank.with_buffers({"mean": other[:5]})


def test_a_saved_copy_is_the_same_and_can_be_continued(tmp_path):
    kind = {"policy": "reservoir", "max_samples": 12}
    bank = fill_chains(tmp_path / "bank", 60, 40, **kind)
    bank.save(tmp_path / "copy")
    copy = SampleBank.load(tmp_path / "copy")
    assert torch.equal(copy.rows(), bank.rows())
    assert (copy.steps, copy.chain_metadata) == (bank.steps, bank.chain_metadata)
    for path in (tmp_path / "bank", tmp_path / "copy"):
        fill(path, 30, chain=1, **kind)
    bank.refresh()
    copy.refresh()
    assert copy.steps == bank.steps
    assert not (tmp_path / "copy.unfinished").exists()
    with pytest.raises(FileExistsError, match="there is something"):
        bank.save(tmp_path / "copy")


def test_a_bank_is_a_snapshot_until_it_is_refreshed(tmp_path):
    kind = {"policy": "latest", "max_samples": 8}
    fill(tmp_path, 8, **kind)
    bank = SampleBank(tmp_path)
    with make_writer(tmp_path, **kind) as writer:
        append(writer, 20)
        writer.flush()
        assert serials(bank) == list(range(8))
        assert torch.equal(bank.rows(), rows(range(8)))  # of files that are gone
        bank.refresh()
        assert serials(bank) == list(range(20, 28))
        assert torch.equal(bank.rows(), rows(range(20, 28)))
    fill(tmp_path, 3, chain=1)
    bank.refresh()
    assert bank.chains == (0, 1)


def test_a_bank_can_be_opened_before_the_first_sample(tmp_path):
    with make_writer(tmp_path) as writer:
        bank = SampleBank(tmp_path)
        assert len(bank) == bank.nbytes == len(bank.rows()) == 0
        with pytest.raises(ValueError, match="Nothing has been written yet; see refresh"):
            bank.sample(1)
        append(writer, 1)
        writer.flush()
        bank.refresh()
        assert len(bank.sample(1)["bias"]) == 1


@pytest.mark.parametrize("n", [0, 6])
def test_more_samples_than_there_are_are_refused(tmp_path, n):
    bank = fill_chains(tmp_path, 5)
    with pytest.raises(ValueError, match=f"n must be from 1 to 5, .*, got {n}"):
        bank.sample(n)


def test_a_sample_that_there_is_not_is_refused(tmp_path):
    bank = fill_chains(tmp_path, 5)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=f"there is no sample {index}"):
            bank.rows([index])


def test_a_module_of_another_architecture_is_refused(tmp_path):
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    layout, statistics = Layout.of_parameters(network), Layout.of_buffers(network)
    with ChainWriter(tmp_path, layout, max_samples=None, buffer_layout=statistics) as writer:
        writer.append(0, dict(network.named_parameters()), dict(network.named_buffers()))
    bank = SampleBank(tmp_path)
    bank.check_module(network)
    with pytest.raises(ValueError, match="another architecture.*'1.weight' of shape"):
        bank.check_module(nn.Sequential(nn.Linear(2, 3)))
    network[1] = nn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="other buffers than the samples: '1.running_mean'"):
        bank.check_module(network)


def test_a_folder_that_is_no_bank_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no sample bank"):
        SampleBank(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no sample bank at"):
        SampleBank(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda text: text.replace('"version": 1', '"version": 2'),
            "version 2.*Update",
        ),
        (lambda text: text[:-20], "is not the manifest of a sample bank"),
        (lambda text: "[]", "is not the manifest of a sample bank"),
    ],
    ids=["version", "cut", "other"],
)
def test_a_manifest_of_something_else_is_refused(tmp_path, change, message):
    manifest = fill(tmp_path, 3) / "chain-0000" / "manifest.json"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(ValueError, match=message):
        SampleBank(tmp_path)


def test_chains_of_different_networks_are_refused(tmp_path):
    fill_chains(tmp_path, 2, 2)
    manifest = tmp_path / "chain-0001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("[3, 2]", "[2, 3]"))
    with pytest.raises(ValueError, match=r"chain 1 .*, unlike chain 0, has 'weight' of shape"):
        SampleBank(tmp_path)


def damage_size(file):
    file.write_bytes(file.read_bytes()[:-1])


def damage_values(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def remove(file):
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_size, r"has [\d,]+ bytes, expected [\d,]+\. Its 2 samples are lost"),
        (damage_values, r"has the checksum \(CRC-32\) \w{8}, expected \w{8}\. Its 2 samples"),
        (remove, r"is missing\. Its 2 samples are lost"),
    ],
    ids=["size", "values", "missing"],
)
def test_a_damaged_file_is_named_and_can_be_left_out(tmp_path, damage, message):
    fill(tmp_path, 8)
    damage(tmp_path / "chain-0000" / "shard-000001.safetensors")
    with pytest.raises(ValueError, match=f"shard-000001.safetensors is damaged: it {message}"):
        SampleBank(tmp_path).rows()
    with pytest.raises(ValueError, match="skip_damaged=True"):
        SampleBank(tmp_path).verify()
    with pytest.warns(UserWarning, match="is damaged"):
        bank = SampleBank(tmp_path, skip_damaged=True)
    assert serials(bank) == [0, 1, 4, 5, 6, 7]
    bank.save(tmp_path / "sound")
    sound = SampleBank(tmp_path / "sound")
    sound.verify()
    assert torch.equal(sound.rows(), rows([0, 1, 4, 5, 6, 7]))


def test_samples_of_sound_files_can_be_read_beside_a_damaged_one(tmp_path):
    fill(tmp_path, 8)
    damage_values(tmp_path / "chain-0000" / "shard-000003.safetensors")
    assert torch.equal(SampleBank(tmp_path).rows([0, 5]), rows([0, 5]))


def test_the_manifest_says_what_the_files_hold(tmp_path):
    fill(tmp_path, 9, policy="spread", max_samples=8)
    manifest = json.loads((tmp_path / "chain-0000" / "manifest.json").read_text())
    assert (manifest["seen"], manifest["settings"]["policy"]) == (9, "spread")
    first = manifest["shards"][0]
    assert (first["serials"], first["steps"], first["dropped"]) == ([0, 1], [0, 10], [0])
    there, named = files(tmp_path)
    assert there == named
