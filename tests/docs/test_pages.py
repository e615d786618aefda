"""What pages execute and assert when the site is built holds, without building it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.markdown import executed_sessions

ROOT = Path(__file__).parents[2]
SESSIONS = {
    f"{page}-{name}": code
    for page in ("quickstart", "extending", "faq")
    for name, code in executed_sessions(ROOT / "docs" / f"{page}.md").items()
}
SLOW = ("quickstart-quick-start", "quickstart-recipe", "extending-recipe")


@pytest.mark.parametrize(
    "session",
    [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in SESSIONS],
)
def test_a_page_executes(session, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    exec(SESSIONS[session], {"__name__": "page"})


WITHOUT_LIGHTNING = """
import sys


class Missing:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("lightning", "pytorch_lightning", "torchmetrics", "wandb"):
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, Missing())
path = sys.argv[1]
from torch import nn
"""


def test_the_answer_on_loading_without_lightning_needs_none():
    namespace = {"__name__": "page"}
    exec(SESSIONS["faq-load"], namespace)
    _, separator, loading = SESSIONS["faq-load"].rpartition("import torch\n")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIGHTNING + separator + loading, namespace["path"]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "RevLSTM(8, 16" in done.stdout
