"""What a run records beside its configuration."""

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import numpy
import pytest
import torch
import yaml

import lightning_revflip
from lightning_revflip.cli.provenance import git_state, provenance


def git(folder: Path, *args: str) -> str:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", *identity, *args]
    return subprocess.run(command, cwd=folder, capture_output=True, check=True, text=True).stdout


@pytest.fixture
def repository(tmp_path) -> Path:
    git(tmp_path, "init")
    (tmp_path / "model.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is not the commit")
    return tmp_path


def test_versions_are_those_in_use():
    assert provenance()["versions"] == {
        "python": platform.python_version(),
        "lightning-revflip": lightning_revflip.__version__,
        "torch": torch.__version__,
        "lightning": metadata.version("lightning"),
        "torchmetrics": metadata.version("torchmetrics"),
        "numpy": numpy.__version__,
    }


def test_device_and_threads_are_plain_values():
    recorded = provenance(torch.device("cpu"))
    assert recorded["device"] == "cpu"
    assert recorded["threads"] == torch.get_num_threads()
    assert yaml.safe_load(yaml.safe_dump(recorded)) == recorded


def test_commit_is_that_of_the_working_directory(repository, monkeypatch):
    commit = git(repository, "rev-parse", "HEAD").strip()
    below = repository / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    assert provenance()["git"] == {"commit": commit, "dirty": False}


def test_changed_files_make_it_dirty_and_new_ones_do_not(repository):
    (repository / "runs").write_text("new")
    assert git_state(repository)["dirty"] is False
    (repository / "model.py").write_text("2")
    assert git_state(repository)["dirty"] is True


def test_there_is_no_commit_without_a_repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert "git" not in provenance()
    git(tmp_path, "init")
    assert git_state(tmp_path) is None  # nor before the first commit


def test_there_is_no_commit_without_git(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert git_state(repository) is None
