"""Compiled code is loaded only from files that no other user can have written."""

import ctypes
import os
import shutil
import subprocess

import pytest

from lightning_revflip._native import NativeLibrary

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
    pytest.mark.skipif(os.name == "nt", reason="files have no owner and mode of this kind"),
]
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away"
)
STRANGER = 12345
"""The number of a user who is neither root nor whoever runs the tests."""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the libraries, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("REVFLIP_NATIVE", raising=False)
    return tmp_path / "cache" / "lightning_revflip"


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


def library(source):
    """A new view of the library, as another process has it."""
    return NativeLibrary(source, {"answer": []}, {"answer": ctypes.c_int}, [], "Answers")


def plant(source):
    """Put another library where a process would look for its own, as an attacker would.

    It is not loaded before: what a process has loaded from a path, it does not read again.
    """
    kept = library(source)._compile()
    evil = source.with_name("evil.c")
    evil.write_text("int answer(void) { return 666; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(kept), str(evil)], check=True)
    kept.chmod(0o700)
    return kept


def test_what_was_compiled_before_is_loaded(source, cache):
    plant(source)
    assert library(source).call("answer") == 666


def test_only_its_user_can_write_the_folder_and_the_library(source, cache):
    old = os.umask(0o000)
    try:
        kept = library(source)._compile()
    finally:
        os.umask(old)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert kept.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_could_write_is_closed_to_them(source, cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert library(source).call("answer") == 42
    assert cache.stat().st_mode & 0o777 == 0o755


def test_a_library_that_others_could_write_is_compiled_anew(source, cache):
    plant(source).chmod(0o777)
    assert library(source).call("answer") == 42


def test_a_link_is_replaced_and_not_followed(source, cache, tmp_path):
    kept = plant(source)
    elsewhere = kept.replace(tmp_path / "elsewhere.so")
    kept.symlink_to(elsewhere)
    assert library(source).call("answer") == 42
    assert not kept.is_symlink()
    assert elsewhere.exists()


@as_root
def test_a_library_of_another_user_is_compiled_anew(source, cache):
    kept = plant(source)
    os.chown(kept, STRANGER, STRANGER)
    assert library(source).call("answer") == 42
    assert kept.stat().st_uid == os.geteuid()


@as_root
def test_nothing_is_loaded_from_a_folder_of_another_user(source, cache):
    plant(source)
    os.chown(cache, STRANGER, STRANGER)
    with pytest.warns(UserWarning, match=r"Answers run by torch .* another user.*XDG_CACHE_HOME"):
        assert not library(source).available
