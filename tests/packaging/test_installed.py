"""The wheel works in an environment that has nothing of the checkout."""

import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("user_script.py")


def test_all_four_methods_train_without_optional_packages(bare, tmp_path):
    for name in ("wandb", "matplotlib", "rich", "jsonargparse"):
        assert "ModuleNotFoundError" in bare.run("python", "-c", f"import {name}", status=1)
    script = shutil.copy(SCRIPT, bare.folder)  # or its own folder would be on the path
    output = bare.run("python", str(script), str(tmp_path))
    assert str(bare.python.parents[1]) in output.splitlines()[-1]


def test_the_script_of_a_user_has_no_type_errors(installed):
    script = shutil.copy(SCRIPT, installed.folder)
    output = check_types(installed, script, status=0)
    assert output.startswith("Success: no issues found")


def test_wrong_types_are_noticed(installed):
    """Else the test above would show nothing: without py.typed everything is Any."""
    script = installed.folder / "wrong.py"
    script.write_text(
        "from lightning_revflip import SampleBank, memory_report, RevGRU\n"
        "from lightning_revflip.callbacks import ReversibleRNN\n"
        "ReversibleRNN(max_forget_bits='many')\n"
        "count: str = len(SampleBank('bank'))\n"
        "memory_report(RevGRU(2, 2)).no_such_figure\n"
    )
    output = check_types(installed, script, status=1)
    for line, error in ((3, "arg-type"), (4, "assignment"), (5, "attr-defined")):
        assert any(f":{line}: error" in text and error in text for text in output.splitlines())


def check_types(installed, script, status):
    options = ["--strict", "--config-file=", f"--python-executable={installed.python}"]
    cache = f"--cache-dir={installed.folder.parent / 'mypy'}"
    return installed.run("python", "-m", "mypy", *options, cache, str(script), status=status)


def test_a_recipe_is_listed_copied_and_trained(installed, tmp_path):
    assert "ptb" in installed.run("revflip", "list")
    installed.run("revflip", "copy", "ptb", str(tmp_path))
    configs = [
        f"--config=recipes/ptb/configs/{n}.yaml" for n in ("base", "small", "lstm", "rev3", "csv")
    ]
    limits = ["--trainer.max_epochs=1"]
    limits += [f"--trainer.limit_{stage}_batches=2" for stage in ("train", "val")]
    installed.run("revflip", "fit", *configs, *limits, folder=tmp_path)
    (metrics,) = (tmp_path / "runs").rglob("metrics.csv")
    assert "perplexity" in metrics.read_text()


def test_the_doctor_finds_the_installation_in_order(installed):
    assert "lightning" in installed.run("revflip", "doctor")
