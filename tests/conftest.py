"""Where commands run, and what they find there, in all tests."""

import sys

import pytest


@pytest.fixture
def no_data_of_the_user(monkeypatch, tmp_path):
    """Neither the environment nor the user's cache decides what a test finds."""
    monkeypatch.delenv("REVFLIP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def cwd(no_data_of_the_user, monkeypatch, tmp_path):
    """The working directory of `revflip`: an empty folder, without data of the user."""
    monkeypatch.setattr("sys.argv", ["revflip"])
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    return tmp_path
