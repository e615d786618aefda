"""Products and sums by the routes that torch offers are those of float64, whatever the layout."""

import pytest
import torch
import torch.nn.functional as F

from lightning_revflip.reversible.products import Products, onednn_available
from tests.helpers.passes import normal, relative_error


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("total_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "shape"), [(3, (1, 1)), (5, (70, 3)), (2, (9000, 300)), (9, (3, 7)), (1, (1300, 513))]
)
def test_products_accumulate_in_blocks(onednn, total_dtype, rows, shape):
    if onednn and not onednn_available(torch.device("cpu"), torch.float32):
        pytest.skip("this torch comes without oneDNN")
    m, n = shape
    total = normal(m, n).to(total_dtype)
    grad, x = normal(rows, m + 8, seed=1)[:, 3 : 3 + m], normal(rows, n + 5, seed=2)[:, 5:]
    truth = total.double() + grad.double().t() @ x.double()
    Products(torch.float32, onednn).accumulate(total, grad, x)
    assert relative_error(total, truth) <= 1e-6


def test_columns_of_a_wider_matrix_are_copied_before_they_are_multiplied(monkeypatch):
    factors = []

    def linear(self, x, weight, dtype):
        factors.append(weight)
        return F.linear(x, weight)

    monkeypatch.setattr(Products, "linear", linear)
    total, grad, wide = torch.zeros(400, 325), normal(50, 400), normal(50, 650)
    Products(torch.float32, onednn=True).accumulate(total, grad, wide[:, 325:])
    assert factors
    # oneDNN takes a thousand times as long for a right factor with gaps between its rows.
    assert all(factor.t().is_contiguous() for factor in factors)


def test_products_accumulate_in_low_precision():
    total, grad, x = normal(9000, 300), normal(4, 9000, seed=1), normal(4, 300, seed=2)
    truth = total + grad.t() @ x
    Products(torch.bfloat16, False).accumulate(total, grad.bfloat16(), x.bfloat16())
    assert relative_error(total, truth) <= 5e-3
