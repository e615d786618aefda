"""What is loaded from files cannot run code: no pickles, no evaluation, no extraction."""

from __future__ import annotations

import ast
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_revflip import DistilledPosterior, LowRankGaussian, SampleBank, distil
from lightning_revflip.applications.images import read_images
from lightning_revflip.callbacks import __all__ as callbacks
from lightning_revflip.convert import load_from_checkpoint
from tests.helpers.banks import fill
from tests.helpers.compatibility import SUBJECTS
from tests.helpers.models import Tagger, loader, quiet_trainer

ROOT = Path(__file__).parents[2]
FOLDERS = ("lightning_revflip", "recipes", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tarfile",
}  # fmt: skip
FORBIDDEN_CALLS = {"eval", "exec", "extract", "extractall", "unpack_archive", "popen"}


# --- the sources -----------------------------------------------------------------------------


def complaints(source: str) -> list[str]:
    """What in a source might run code that comes from a file."""
    return [text for node in ast.walk(ast.parse(source)) for text in _complaints(node)]


def _complaints(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        module = getattr(node, "module", None)
        names = [module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        return [f"imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
    if not isinstance(node, ast.Call):
        return []
    called = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    found = []
    if called == "torch.load" and keywords.get("weights_only") != "True":
        found.append("torch.load without weights_only=True")
    if keywords.get("weights_only") == "False":
        found.append(f"{called}(weights_only=False)")
    if keywords.get("allow_pickle", "False") != "False" or keywords.get("shell") == "True":
        found.append(ast.unparse(node))
    if called in ("os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        found.append(called)
    method = isinstance(node.func, ast.Attribute)
    name = called.rpartition(".")[2]
    if name in FORBIDDEN_CALLS and method == (name not in ("eval", "exec")):
        found.append(called)
    return found


def test_no_source_can_run_code_from_a_file():
    assert len(SOURCES) > 100
    found = {
        str(path.relative_to(ROOT)): texts
        for path in SOURCES
        if (texts := complaints(path.read_text(encoding="utf-8")))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "Model.load_from_checkpoint(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "archive.extractall()",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "yaml.load(text)",
    ],
)
def test_dangerous_sources_are_noticed(source):
    assert complaints(source)


def test_harmless_sources_are_not():
    assert not complaints("model.eval()\ntorch.load(path, weights_only=True)\nimport picklable")


# --- checkpoints -----------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def bomb(tmp_path):
    """A pickle as an attacker sends it; the test fails if it was executed."""
    mark = tmp_path / "executed"
    yield pickle.dumps(Bomb(mark))
    assert not mark.exists()


@pytest.fixture
def evil_checkpoint(tmp_path):
    """A checkpoint with such a pickle in the state of a callback."""
    mark = tmp_path / "executed"
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(Tagger(), loader())
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    checkpoint = torch.load(tmp_path / "good.ckpt", weights_only=True)
    checkpoint["callbacks"] = {"ReversibleRNN": Bomb(mark)}
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    yield tmp_path / "evil.ckpt"
    assert not mark.exists()


def test_the_bomb_works(tmp_path):
    """Else the tests below would show nothing."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", callbacks)
def test_checkpoints_of_each_callback_are_read_without_pickle(name, tmp_path):
    run = SUBJECTS[name].run(tmp_path, max_epochs=1).fit()
    run.trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == run.model.state_dict().keys()


def test_an_evil_checkpoint_is_refused(evil_checkpoint):
    with pytest.raises(pickle.UnpicklingError, match="weights_only|Weights only"):
        load_from_checkpoint(Tagger, evil_checkpoint)


def test_a_run_does_not_go_on_from_an_evil_checkpoint(evil_checkpoint, tmp_path):
    with pytest.raises(pickle.UnpicklingError, match="weights_only|Weights only"):
        quiet_trainer(tmp_path).fit(Tagger(), loader(), ckpt_path=evil_checkpoint)


# --- banks and posteriors --------------------------------------------------------------------


def save_all(folder):
    """A bank and what can be fitted to it, and how each is loaded and used.

    Returns:
        Functions by the file that they read.
    """
    bank = SampleBank(fill(folder / "bank", 8))
    LowRankGaussian.fit(bank, rank=2).save(folder / "gaussian")
    distilled = distil(bank, rank=2, steps=0)
    distilled.save(folder / "distilled")
    distilled.export(folder / "distilled.safetensors")
    (gaussian,) = (folder / "gaussian").glob("*.safetensors")
    (tensors,) = (folder / "distilled").glob("*.safetensors")
    shard = min((folder / "bank" / "chain-0000").glob("*.safetensors"))

    def use_bank():
        SampleBank(folder / "bank").sample(8)

    return {
        shard: use_bank,
        shard.with_name("manifest.json"): use_bank,
        gaussian: lambda: LowRankGaussian.load(folder / "gaussian"),
        gaussian.with_name("config.json"): lambda: LowRankGaussian.load(folder / "gaussian"),
        tensors: lambda: DistilledPosterior.load(folder / "distilled"),
        tensors.with_name("config.json"): lambda: DistilledPosterior.load(folder / "distilled"),
        folder / "distilled.safetensors": lambda: DistilledPosterior.load(
            folder / "distilled.safetensors"
        ),
    }


def test_banks_and_posteriors_are_safetensors_and_json(tmp_path):
    save_all(tmp_path)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"}
    assert kinds == {".safetensors", ".json"}


@pytest.mark.parametrize("index", range(7))
def test_a_pickle_in_the_place_of_a_file_is_refused(index, bomb, tmp_path):
    path, load = list(save_all(tmp_path).items())[index]
    size = path.stat().st_size
    load()
    for content in (bomb, bomb.ljust(size, b"\0")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|not the manifest"):
            load()


# --- archives --------------------------------------------------------------------------------


def test_a_zip_file_of_images_is_read_and_not_extracted(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("L", (4, 4), 255).save(tmp_path / "white.png")
    content = (tmp_path / "white.png").read_bytes()
    archive = tmp_path / "inner" / "images.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../outside.png", content)
        file.writestr(str(tmp_path / "absolute.png"), content)
    before = sorted(tmp_path.rglob("*"))
    assert len(read_images(archive, (1, 4, 4))) == 1  # a name that begins with a dot is hidden
    assert sorted(tmp_path.rglob("*")) == before
