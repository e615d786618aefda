"""The examples of README.md run as written, in an empty directory, one after the other."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.markdown import python_blocks

README = Path(__file__).parents[2] / "README.md"


def test_all_examples_run_as_written_in_an_empty_directory(tmp_path):
    blocks = python_blocks(README)
    assert blocks
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
