"""Wheel and sdist hold what they should, and nothing else."""

import tarfile
import zipfile
from email.parser import Parser
from fnmatch import fnmatch

import pytest

from tests.helpers.packaging import ROOT, build

pytestmark = pytest.mark.slow

UNWANTED = ["*__pycache__*", "*.pyc", "*.so", "*/runs/*", "*/.*", "*~"]


def files_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def checkout(folder, *patterns):
    """Files of a folder of the checkout, by their path from the root."""
    found = (path for pattern in patterns for path in (ROOT / folder).rglob(pattern))
    return {path.relative_to(ROOT).as_posix() for path in found}


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_package_with_its_types_and_c_sources(wheel):
    expected = checkout("lightning_revflip", "*.py", "*.c", "*.h", "py.typed")
    assert {"lightning_revflip/py.typed", "lightning_revflip/_random.h"} < expected
    assert expected <= files_of(wheel)


def test_the_wheel_holds_the_recipes_as_data(wheel):
    expected = checkout("recipes", "*.py", "*.yaml", "*.md", "*.txt")
    assert {f"lightning_revflip/_{name}" for name in expected} <= files_of(wheel)


def test_the_wheel_holds_nothing_else(wheel):
    folders = {name.split("/")[0] for name in files_of(wheel)}
    assert folders == {
        "lightning_revflip",
        wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info",
    }


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_no_caches_builds_and_runs_are_distributed(kind, wheel, sdist):
    with tarfile.open(sdist) as archive:
        names = files_of(wheel) if kind == "wheel" else set(archive.getnames())
    allowed = {".gitignore"}  # hatchling's own addition, which a build from the sdist reads
    names = {name for name in names if name.rpartition("/")[2] not in allowed}
    assert [name for name in names if any(fnmatch(name, each) for each in UNWANTED)] == []


def test_the_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    assert files_of(again) == files_of(wheel)
    assert again.read_bytes() == wheel.read_bytes()


def test_the_sdist_holds_what_tests_and_documentation_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"Makefile", "README.md", "SECURITY.md", "constraints.txt", "mkdocs.yml", "LICENSE"}
    assert wanted <= names
    assert checkout("tests", "*.py") | checkout("docs", "*.md") <= names


def test_the_metadata_are_those_of_the_project(wheel):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = metadata(wheel)
    assert found["Name"] == project["name"]
    assert found["Requires-Python"] == project["requires-python"]
    assert found.get_all("Provides-Extra") == sorted(project["optional-dependencies"])
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload() == (ROOT / "README.md").read_text()
