"""What `revflip doctor` computes: each method on this device, against what it has to give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_revflip.flipout import FlipoutLinear, Gaussian, sampling
from lightning_revflip.reversible import RevGRU, RevLSTM
from lightning_revflip.reversible.cells import RevGRUCell, RevLSTMCell
from lightning_revflip.reversible.kernels import fastest
from lightning_revflip.sgld import SGLD

STEPS, BATCH, FEATURES, HIDDEN = 50, 4, 8, 32


class SelfTestError(Exception):
    """A method does not compute what it has to."""


def check_reversal(kind: type[RevGRU] | type[RevLSTM], device: torch.device) -> str:
    """Undo the steps of a layer, and compare its gradients with those of plain autograd.

    Args:
        kind: of the layer.
        device: where it computes.

    Returns:
        What was found to be right.

    Raises:
        ReversalError: if a state or the information buffer is not recovered bit for bit.
        SelfTestError: if gradients differ by more than the rounding of forget gates explains.
    """
    rnn = kind(FEATURES, HIDDEN).to(device)
    x = torch.randn(STEPS, BATCH, FEATURES)
    grad = torch.randn(STEPS, BATCH, HIDDEN)
    output, _ = rnn(x.to(device))
    torch.autograd.backward(output, grad.to(device))  # which raises ReversalError
    found = {name: weight.grad for name, weight in rnn.named_parameters()}

    exact = {
        name: weight.detach().cpu().double().requires_grad_()
        for name, weight in rnn.named_parameters()
    }
    limit = 2.0**-3  # of the forget gates: 3 bits
    truth = plain_pass(exact, x.double(), limit, kind is RevLSTM)
    torch.autograd.backward(truth, grad.double())
    worst = 0.0
    for name, weight in exact.items():
        got, due = found[name], weight.grad
        if got is None or due is None:
            raise SelfTestError(f"{name} got no gradient")
        worst = max(worst, float((got.cpu() - due).norm() / due.norm()))
    if not worst < 0.01:
        raise SelfTestError(f"gradients differ from those of plain autograd by {worst:.1%}")
    cell = (RevLSTMCell if kind is RevLSTM else RevGRUCell)(HIDDEN, 3.0)
    name = type(fastest(cell, device, torch.float32)).__name__
    return f"{STEPS} steps undone bit for bit by {name}, gradients within {worst:.1%}"


def plain_pass(weights: Mapping[str, Tensor], x: Tensor, limit: float, lstm: bool) -> Tensor:
    """Outputs of RevGRU or RevLSTM by the formulas of the paper, without any rounding.

    Args:
        weights: of one layer, by the names of nn.GRU.
        x: inputs, shape (steps, batch, features).
        limit: the least value of a forget gate.
        lstm: RevLSTM instead of RevGRU.
    """
    w_ih, w_hh = (weights[f"weight_{each}_l0"].chunk(2) for each in ("ih", "hh"))
    bias = (weights["bias_ih_l0"] + weights["bias_hh_l0"]).chunk(2)
    size = w_hh[0].shape[1]
    h, c = ([x.new_zeros(x.shape[1], size)] * 2 for _ in range(2))
    outputs = []
    for step in x:
        for i, other in ((0, 1), (1, 0)):
            inputs = F.linear(step, w_ih[i], bias[i])
            if lstm:
                blocks = inputs + F.linear(h[other], w_hh[i])
                forget_c, forget_h, new, out = torch.sigmoid(blocks[:, :-size]).chunk(4, dim=1)
                c[i] = c[i] * (limit + (1 - limit) * forget_c) + new * blocks[:, -size:].tanh()
                h[i] = h[i] * (limit + (1 - limit) * forget_h) + out * c[i].tanh()
            else:
                gates = inputs[:, :-size] + F.linear(h[other], w_hh[i][:-size])
                reset, forget = torch.sigmoid(gates).chunk(2, dim=1)
                candidate = inputs[:, -size:] + F.linear(reset * h[other], w_hh[i][-size:])
                keep = limit + (1 - limit) * forget
                h[i] = keep * h[i] + (1 - keep) * candidate.tanh()
        outputs.append(torch.cat(h, dim=1))
    return torch.stack(outputs)


def check_flipout(device: torch.device) -> str:
    """Compare the mean of a perturbed layer, and the variance over examples, with the formulas.

    Raises:
        SelfTestError: if either is another.
    """
    rows, features, std = 2000, 256, 0.1
    layer = FlipoutLinear(features, 32, perturbation=Gaussian(init_std=std)).to(device)
    x = torch.ones(rows, features, device=device)
    with torch.no_grad():
        with sampling(layer, "mean"):
            mean = layer(x)
        with sampling(layer, "flipout"):
            perturbed = layer(x)
    if not torch.allclose(mean, F.linear(x, layer.weight, layer.bias), atol=1e-4):
        raise SelfTestError("without noise the layer is not nn.Linear")
    ratio = float((perturbed - mean).var(dim=0).mean()) / (features * std**2)
    return f"the spread over examples is {_close(ratio, 0.1)} of the expected one"


def check_sampler(device: torch.device) -> str:
    """Compare the variance of SGLD on a normal posterior with that of its step size.

    Raises:
        SelfTestError: if it is another.
    """
    num_data, lr, burn_in, samples = 100, 0.5, 50, 20
    theta = torch.zeros(4096, device=device, requires_grad=True)  # as many chains
    sampler = SGLD([theta], lr=lr, num_data=num_data)
    variance = 0.0
    for step in range(burn_in + samples):
        theta.grad = theta.detach().clone()  # of the loss theta^2 / 2
        sampler.step()
        if step >= burn_in:
            variance += float(theta.detach().square().mean()) / samples
    ratio = variance * num_data * (1 - lr / 4)
    return f"the variance of samples is {_close(ratio, 0.1)} of the exact one"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "RevGRU": partial(check_reversal, RevGRU),
    "RevLSTM": partial(check_reversal, RevLSTM),
    "flipout": check_flipout,
    "SGLD": check_sampler,
}
"""By name. Each returns what it found to be right, and raises otherwise."""


def _close(ratio: float, tolerance: float) -> str:
    if not math.isclose(ratio, 1, abs_tol=tolerance):
        raise SelfTestError(f"a variance is {ratio:.1%} of what it has to be")
    return f"{ratio:.1%}"
