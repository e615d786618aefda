"""Files that somebody sent name classes and files; only what is meant is called and touched."""

import json

import pytest
import torch

from lightning_revflip import SampleBank, load_from_checkpoint
from lightning_revflip.callbacks import ReversibleRNN
from lightning_revflip.convert import SPEC_KEY, apply_spec, spec_of_checkpoint
from tests.helpers.banks import fill, make_writer
from tests.helpers.models import Tagger, loader, quiet_trainer

RUNS_CODE = {"setup": "import pathlib; pathlib.Path('executed').touch()", "number": 1}


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """One of a converted model, changed so that the conversion would run code."""
    monkeypatch.chdir(tmp_path)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[ReversibleRNN()])
    trainer.fit(Tagger(), loader())
    trainer.save_checkpoint("good.ckpt")
    content = torch.load("good.ckpt", weights_only=True)
    (state,) = (state for state in content["callbacks"].values() if SPEC_KEY in state)
    (conversion,) = state[SPEC_KEY]["conversions"]
    conversion |= {"replacement": "timeit:timeit", "kwargs": RUNS_CODE}
    yield content
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_cannot_name_a_function_to_call(checkpoint):
    torch.save(checkpoint, "evil.ckpt")
    with pytest.raises(ValueError, match=r"timeit:timeit.* is not called"):
        load_from_checkpoint(Tagger, "evil.ckpt")
    with pytest.raises(ValueError, match=r"timeit:timeit.* is not called"):
        apply_spec(Tagger(), spec_of_checkpoint(checkpoint))


def test_a_run_that_goes_on_repeats_its_own_conversions_alone(checkpoint, tmp_path):
    torch.save(checkpoint, "evil.ckpt")
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[ReversibleRNN()])
    trainer.fit(Tagger(), loader(), ckpt_path="evil.ckpt")


@pytest.mark.parametrize("name", ["../precious.safetensors", "/precious.safetensors"])
def test_a_bank_cannot_name_files_elsewhere(name, tmp_path):
    fill(tmp_path / "bank", 8, max_samples=8)
    manifest = tmp_path / "bank" / "chain-0000" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["shards"][0]["file"] = name
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="may only name files beside it"):
        SampleBank(tmp_path / "bank")
    with pytest.raises(ValueError, match="may only name files beside it"):
        make_writer(tmp_path / "bank", max_samples=8)


def test_a_saved_posterior_cannot_name_files_elsewhere(tmp_path):
    from lightning_revflip import LowRankGaussian

    LowRankGaussian.fit(SampleBank(fill(tmp_path / "bank", 8)), rank=2).save(tmp_path / "fitted")
    config = tmp_path / "fitted" / "config.json"
    content = json.loads(config.read_text()) | {"file": "../bank/secret.safetensors"}
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="Invalid name"):
        LowRankGaussian.load(tmp_path / "fitted")


@pytest.mark.parametrize("place", ["replacement", "source", "class_path"])
def test_a_checkpoint_cannot_have_a_module_imported(place, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("open('executed', 'w').close()\nclass X: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (state,) = (state for state in checkpoint["callbacks"].values() if SPEC_KEY in state)
    (conversion,) = state[SPEC_KEY]["conversions"]
    good = torch.load("good.ckpt", weights_only=True)["callbacks"]
    (genuine,) = (state[SPEC_KEY]["conversions"][0] for state in good.values() if SPEC_KEY in state)
    conversion.update(genuine)
    if place == "class_path":
        conversion["kwargs"] |= {"forget_bias": {"class_path": "evil_module:X", "init_args": {}}}
    else:
        conversion[place] = "evil_module:X"
    torch.save(checkpoint, "evil.ckpt")
    with pytest.raises(ValueError, match="evil_module"):
        load_from_checkpoint(Tagger, "evil.ckpt")


def test_a_checkpoint_cannot_run_the_command_line(checkpoint):
    (state,) = (state for state in checkpoint["callbacks"].values() if SPEC_KEY in state)
    state[SPEC_KEY]["conversions"][0]["replacement"] = "lightning_revflip.cli.__main__:main"
    torch.save(checkpoint, "evil.ckpt")
    with pytest.raises(ValueError, match="has not been imported"):
        load_from_checkpoint(Tagger, "evil.ckpt")
