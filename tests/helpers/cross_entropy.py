"""LinearCrossEntropy and the same by torch."""

import torch
import torch.nn.functional as F

from lightning_revflip.reversible.cross_entropy import LinearCrossEntropy
from lightning_revflip.reversible.tables import InPlaceGradients
from tests.helpers.passes import normal, relative_error

FEATURES, CLASSES = 6, 23


def make(dtype=torch.float64, features=FEATURES, classes=CLASSES, **options):
    head = LinearCrossEntropy(features, classes, dtype=dtype, **options)
    with torch.no_grad():
        for number, parameter in enumerate(head.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number, dtype=dtype))
    return head


def inputs(*shape, dtype=torch.float64, features=FEATURES, classes=CLASSES):
    hidden = normal(*shape, features, seed=5, dtype=dtype).requires_grad_()
    target = torch.randint(classes, shape, generator=torch.Generator().manual_seed(6))
    return hidden, target


def plain_losses(head, hidden, target, **options):
    """By torch, one per row."""
    logits = F.linear(hidden, head.weight, head.bias)
    return F.cross_entropy(
        logits.reshape(-1, head.out_features), target.flatten(), reduction="none", **options
    ).view(target.shape)


def run(loss, head, *others):
    """The loss and its gradients."""
    wanted = [*others, *head.parameters()]
    upstream = normal(*loss.shape, seed=8, dtype=loss.dtype) if loss.dim() else None
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream)]


def run_in_place(call, head, *others):
    """The same inside InPlaceGradients, where the totals receive gradients of parameters."""
    parameters = list(head.parameters())
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    with InPlaceGradients(zip(parameters, totals, strict=True)):
        loss = call()
    upstream = normal(*loss.shape, seed=8, dtype=loss.dtype) if loss.dim() else None
    wanted = [*others, *parameters]
    grads = torch.autograd.grad(loss, wanted, upstream, allow_unused=True)
    assert all(grad is None for grad in grads[len(others) :])
    return [loss.detach(), *grads[: len(others)], *totals]


def assert_same(found, truth, tolerance):
    assert len(found) == len(truth)
    for one, other in zip(found, truth, strict=True):
        assert one.shape == other.shape
        assert other.abs().sum() > 0
        assert relative_error(one, other) <= tolerance
