"""Without a C compiler everything works by torch calls, after one warning."""

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

from lightning_revflip.flipout import FlipoutLinear
from lightning_revflip.flipout.noise import LIBRARY

PROGRAM = """
import torch
from torch import nn
from lightning_revflip.convert import convert
from lightning_revflip.flipout import *
from lightning_revflip.flipout.noise import LIBRARY

model = nn.ModuleList(
    [nn.Linear(4, 3), nn.Conv2d(2, 3, 2), nn.Embedding(5, 3), nn.LSTM(4, 3), nn.GRU(4, 3)]
)
sequence = torch.ones(5, 2, 4)
inputs = [torch.ones(6, 4), torch.ones(6, 2, 4, 4), torch.tensor([[1, 2]]), sequence, sequence]
convert(model, FLIPOUT_LAYERS)
for mode in ("flipout", "shared", "mean"):
    with sampling(model, mode):
        for layer, x in zip(model, inputs):
            output = layer(x)
            output = output[0] if isinstance(output, tuple) else output
            output.square().sum().backward()
add_kl_gradient(model, 0.1)
assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
assert not LIBRARY.available
print("fine")
"""


def test_everything_works_by_torch_alone():
    environment = {**os.environ, "REVFLIP_NATIVE": "0"}
    command = [sys.executable, "-W", "error:Flipout", "-c", textwrap.dedent(PROGRAM)]
    result = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "fine"


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no C compiler found"), ("false", "returned non-zero exit status")],
)
def test_a_compiler_that_is_missing_or_fails_is_told_once(compiler, reason, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    LIBRARY.unload()
    layer = FlipoutLinear(50, 40)
    with pytest.warns(UserWarning, match=f"Flipout layers run by torch calls alone.*{reason}"):
        layer(torch.ones(3, 50)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.ones(3, 50)).sum().backward()
    monkeypatch.undo()
    LIBRARY.unload()


def test_both_ways_give_one_value_of_the_divergence(monkeypatch):
    layer = FlipoutLinear(50, 40)
    values = []
    for setting in ("1", "0"):
        monkeypatch.setenv("REVFLIP_NATIVE", setting)
        LIBRARY.unload()
        values.append(layer.perturbation.kl(layer.weight, layer.weight_rho).detach())
    monkeypatch.undo()
    LIBRARY.unload()
    torch.testing.assert_close(*values)
