"""Layout matters to float32 arithmetic, and does not inside `ExactArithmetic`."""

import torch

from tests.helpers.exact_arithmetic import ExactArithmetic
from tests.helpers.passes import normal


def evaluate(x, weight):
    whole = torch.sigmoid(x @ weight.t())
    parts = torch.cat([torch.sigmoid(x @ block.t()) for block in weight.split(37)], dim=1)
    in_place = (x @ weight.t())[:, 3:].sigmoid_()
    return whole, parts, in_place


def test_results_do_not_depend_on_layout_inside_only():
    x, weight = normal(20, 150), normal(750, 150, seed=1)
    with ExactArithmetic():
        whole, parts, in_place = evaluate(x, weight)
    assert torch.equal(whole, parts)
    assert torch.equal(whole[:, 3:], in_place)
    outside, _, _ = evaluate(x, weight)
    assert 0 < (outside - whole).abs().max() < 1e-5


def test_results_are_those_of_float64_rounded_once():
    x, weight = normal(20, 150), normal(75, 150, seed=1)
    exact = torch.sigmoid((x.double() @ weight.double().t()).float().double()).float()
    total = torch.ones(20, 75)
    with ExactArithmetic():
        found = torch.sigmoid(x @ weight.t())
        total.addmm_(x, weight.t())
    assert torch.equal(found, exact)
    assert torch.equal(total, (1 + x.double() @ weight.double().t()).float())
