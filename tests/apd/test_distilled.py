"""A distilled posterior samples what its generator and codec make, and is stored safely."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_revflip.apd import DistilledPosterior, Generator, IdentityCodec, ParameterCodec
from lightning_revflip.posterior import Layout, LowRankGaussian, SampleBank
from tests.helpers.banks import fill
from tests.helpers.properties import examples
from tests.helpers.row_samples import RowSamples, correlated

ROWS = correlated(count=30, size=12)


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def distilled(*, rank=3, latent_size=5, hidden=(8, 8), skip=False, residual="diagonal"):
    codec = ParameterCodec.fit(RowSamples(ROWS), rank, residual=residual)
    torch.manual_seed(0)
    generator = Generator(latent_size, rank, hidden, skip)
    return DistilledPosterior(codec, generator, num_samples=30)


def raw():
    """As in the paper, the generator makes the weights themselves."""
    codec = IdentityCodec.fit(RowSamples(ROWS))
    return DistilledPosterior(codec, Generator(5, 12, [8]), num_samples=30)


def matrix(samples):
    return torch.cat([value.flatten(1) for value in samples.values()], 1)


# --- sampling ------------------------------------------------------------------------------------


def test_a_sample_is_the_decoded_code_of_a_latent_vector():
    posterior = distilled()
    draws = random()
    codes = posterior.generator(posterior.generator.draw_latents(7, draws))
    expected = posterior.codec.decode(codes, draws)
    samples = posterior.sample(7, random())
    assert {name: value.shape for name, value in samples.items()} == {
        "weight": (7, 11),
        "bias": (7, 1),
    }
    assert matrix(samples).equal(expected)
    assert not samples["weight"].requires_grad


def test_an_untrained_generator_with_skip_is_the_low_rank_gaussian():
    posterior = distilled(latent_size=3, skip=True)
    gaussian = LowRankGaussian.fit(RowSamples(ROWS), 3)
    n = 20_000
    a, b = (matrix(one.sample(n, random(seed))) for seed, one in enumerate((posterior, gaussian)))
    covariance = b.T.cov()
    # A variance is known within sqrt(2 / n) = 1 %, here of both; 5 times that.
    assert (a.T.cov() - covariance).abs().max() < 0.07 * covariance.max()


@pytest.mark.parametrize("chunk_size", [1, 4, 10, 20])
@pytest.mark.parametrize("make", [distilled, raw])
def test_samples_do_not_depend_on_the_size_of_chunks(make, chunk_size):
    posterior = make()
    whole = matrix(posterior.sample(10, random(3)))
    parts = [matrix(part) for part in posterior.sample_chunks(10, chunk_size, random(3))]
    assert max(map(len, parts)) == min(chunk_size, 10)
    torch.testing.assert_close(torch.cat(parts), whole)


def test_without_a_generator_the_global_one_is_used():
    posterior = distilled()
    torch.manual_seed(1)
    first = matrix(posterior.sample(2))
    assert not matrix(posterior.sample(2)).equal(first)
    torch.manual_seed(1)
    assert matrix(posterior.sample(2)).equal(first)


def test_it_predicts_as_any_posterior(tmp_path):
    bank = SampleBank(fill(tmp_path / "bank", 6))
    posterior = DistilledPosterior(
        ParameterCodec.fit(bank, 2), Generator(2, 2, [4], skip=True), num_samples=len(bank)
    )
    module, x = nn.Linear(2, 3), torch.ones(4, 2)
    found = posterior.predict(module, x, 5, generator=random())
    samples = posterior.sample(5, random())
    logits = torch.einsum("nci,bi->nbc", samples["weight"], x) + samples["bias"].unsqueeze(1)
    torch.testing.assert_close(found, logits.softmax(-1))
    assert posterior.predict(module, x).shape == (6, 4, 3)
    with pytest.raises(ValueError, match="another architecture"):
        posterior.predict(nn.Linear(2, 4), x)


def test_training_the_generator_further_does_not_change_it():
    codec = ParameterCodec.fit(RowSamples(ROWS), 3)
    generator = Generator(5, 3, [8]).to(torch.bfloat16)
    posterior = DistilledPosterior(codec, generator, num_samples=30)
    before = matrix(posterior.sample(2, random()))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(1)
    assert matrix(posterior.sample(2, random())).equal(before)
    assert before.dtype == torch.float32
    assert generator.layers[0].weight.requires_grad


# --- storage -------------------------------------------------------------------------------------


@examples(max_examples=15)
@given(
    rank=st.integers(1, 6),
    hidden=st.lists(st.integers(1, 6), max_size=3),
    skip=st.booleans(),
    residual=st.sampled_from(["diagonal", None]),
)
@pytest.mark.parametrize("write", ["save", "export"])
def test_loading_gives_what_was_written(tmp_path_factory, write, rank, hidden, skip, residual):
    latent_size = rank if skip else 5
    posterior = distilled(
        rank=rank, latent_size=latent_size, hidden=hidden, skip=skip, residual=residual
    )
    path = tmp_path_factory.mktemp("written") / "apd.safetensors"
    getattr(posterior, write)(path)
    loaded = DistilledPosterior.load(path)
    assert loaded.layout == posterior.layout
    assert repr(loaded) == repr(posterior)
    assert (len(loaded), loaded.nbytes) == (30, posterior.nbytes)
    assert matrix(loaded.sample(3, random())).equal(matrix(posterior.sample(3, random())))


def test_the_papers_raw_generator_is_stored_too(tmp_path):
    posterior = raw()
    posterior.export(tmp_path / "raw.safetensors")
    loaded = DistilledPosterior.load(tmp_path / "raw.safetensors")
    assert isinstance(loaded.codec, IdentityCodec)
    assert matrix(loaded.sample(3, random())).equal(matrix(posterior.sample(3, random())))


@pytest.mark.parametrize("write", ["save", "export"])
def test_nbytes_are_those_of_the_numbers_on_disk(tmp_path, write):
    posterior = distilled()
    path = tmp_path / "apd.safetensors"
    getattr(posterior, write)(path)
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    assert posterior.nbytes == sum(tensor.nbytes for tensor in load_file(file).values())
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == header + posterior.nbytes
    sizes = (5, 8, 8, 3)
    networks = sum(4 * (inputs + 1) * outputs for inputs, outputs in pairwise(sizes))
    assert posterior.nbytes == posterior.codec.nbytes + networks


def test_loading_needs_neither_lightning_nor_pickle(tmp_path):
    distilled().export(tmp_path / "apd.safetensors")
    code = """
import builtins, pickle, sys
import torch
from lightning_revflip.apd import DistilledPosterior

def refuse(*_, **__):
    raise AssertionError("pickle")

pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
posterior = DistilledPosterior.load(sys.argv[1])
assert posterior.sample(2)["weight"].shape == (2, 11)
assert not {"lightning", "torchmetrics", "wandb"} & set(sys.modules), "imported"
"""
    command = [sys.executable, "-c", code, tmp_path / "apd.safetensors"]
    subprocess.run(command, check=True, timeout=120)


def test_a_full_disk_leaves_what_was_exported_before(tmp_path, monkeypatch):
    file = tmp_path / "apd.safetensors"
    distilled(rank=3).export(file)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        distilled(rank=2).export(file)
    assert list(tmp_path.iterdir()) == [file]
    assert DistilledPosterior.load(file).codec.size == 3


def flip(place):
    def change(data):
        changed = bytearray(data)
        changed[place] ^= 1
        return bytes(changed)

    return change


def replace(old, new):
    return lambda data: data.replace(old, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "is damaged, or no safetensors file"),
        (lambda data: data[:100], "is damaged, or no safetensors file"),
        (lambda data: b"", "is damaged, or no safetensors file"),
        (lambda data: b"PK\x03\x04" + data, "is damaged, or no safetensors file"),
        (flip(-3), "is damaged: its checksum"),
        (replace(b'num_samples\\": 30', b'num_samples\\": 31'), "is damaged: its checksum"),
        (replace(b'"version":"1"', b'"version":"2"'), "has version 2 of the format"),
        (replace(b"lightning_revflip.distilled", b"something_else.of_that_size"), "not written by"),
    ],
    ids=["cut", "header_cut", "empty", "zip", "bit", "values", "version", "format"],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, change, message):
    file = tmp_path / "apd.safetensors"
    distilled().export(file)
    before = file.read_bytes()
    file.write_bytes(change(before))
    assert file.read_bytes() != before
    with pytest.raises(ValueError, match=message):
        DistilledPosterior.load(file)


def test_weights_of_a_network_are_no_posterior(tmp_path):
    save_file(nn.Linear(2, 3).state_dict(), tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match="was not written by export"):
        DistilledPosterior.load(tmp_path / "network.safetensors")


def test_other_folders_and_nothing_are_refused(tmp_path):
    LowRankGaussian.fit(RowSamples(ROWS), 3).save(tmp_path / "gaussian")
    with pytest.raises(ValueError, match="holds a LowRankGaussian, not a DistilledPosterior"):
        DistilledPosterior.load(tmp_path / "gaussian")
    with pytest.raises(FileNotFoundError, match="there is no DistilledPosterior to load"):
        DistilledPosterior.load(tmp_path / "nothing")


def test_a_changed_config_is_refused(tmp_path):
    distilled().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["values"]["codec"]["layout"] = Layout(("w",), ((3,),)).to_json()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"mean must have the shape \(3,\), got \(12,\)"):
        DistilledPosterior.load(tmp_path)


# --- errors --------------------------------------------------------------------------------------


def test_a_generator_of_other_codes_is_refused():
    codec = ParameterCodec.fit(RowSamples(ROWS), 3)
    with pytest.raises(ValueError, match="makes codes of 4 numbers, and the codec takes 3"):
        DistilledPosterior(codec, Generator(5, 4), num_samples=30)


def test_no_samples_and_empty_chunks_are_refused():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distilled().sample(0)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        next(distilled().sample_chunks(3, 0))
