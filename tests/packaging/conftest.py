"""A wheel of the checkout, and environments that have it and none of the checkout."""

import pytest

from tests.helpers.packaging import ROOT, build, install

OPTIONAL = [
    *("arviz_stats", "jsonargparse", "matplotlib", "PIL", "pillow", "pooch", "rich", "scipy"),
    *("scikit_learn", "sklearn", "tensorboard", "triton", "wandb"),
]
"""What training with plain torch, Lightning and a CSVLogger does without."""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def sdist(tmp_path_factory):
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def installed(tmp_path_factory, wheel):
    """The wheel with all that is installed here."""
    return install(wheel, tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="session")
def bare(tmp_path_factory, wheel):
    """The wheel without what is optional."""
    return install(wheel, tmp_path_factory.mktemp("bare"), without=OPTIONAL)
