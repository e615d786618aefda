"""The layers on a CUDA device; the same cells in float64 on the CPU are the truth."""

import copy

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_revflip.reversible import memory_report
from tests.helpers.passes import CELLS, assert_close, call, gradients, make, normal, weighted_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.mark.parametrize("bits", [1, 3, None, 0])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_the_cpu(cell, bits) -> None:
    rnn = make(cell, 5, 8, 2, bidirectional=True, max_forget_bits=bits, dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        layer = copy.deepcopy(rnn).to(device)
        x = normal(30, 4, 5, dtype=torch.float64).to(device).requires_grad_()
        packed = pack_padded_sequence(x, torch.tensor([30, 1, 12, 30]), enforce_sorted=False)
        output, finals = call(layer, packed)
        named = {**dict(layer.named_parameters()), "x": x}
        loss = weighted_sum([tensor.cpu() for tensor in (output.data, *finals)])
        found.append({name: grad.cpu() for name, grad in gradients(loss, named).items()})
    assert_close(found[1], found[0], 1e-9)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_a_thousand_steps_are_reversed_exactly(cell, autocast) -> None:
    """The backward pass itself compares what it recovered, and raises."""
    rnn = make(cell, 200, 300).cuda()
    x = normal(1000, 20, 200).cuda()
    with torch.autocast("cuda", autocast, enabled=autocast is not None):
        output, finals = call(rnn, x)
    weighted_sum([tensor.cpu() for tensor in (output, *finals)]).backward()
    assert all(parameter.grad.isfinite().all() for parameter in rnn.parameters())
    assert memory_report(rnn).stored_bits > 0
