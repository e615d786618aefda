"""LinearCrossEntropy is nn.Linear followed by F.cross_entropy, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_revflip.reversible.tables import InPlaceGradients
from tests.helpers.cross_entropy import (
    CLASSES,
    FEATURES,
    assert_same,
    inputs,
    make,
    plain_losses,
    run,
    run_in_place,
)
from tests.helpers.passes import normal
from tests.helpers.properties import examples

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
CHUNKS = [None, 1, 7, 22, 23, 100]  # of which only 1 and 23 divide CLASSES


# --- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab_chunk", CHUNKS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_losses_and_gradients_are_those_of_torch(dtype, bias, vocab_chunk, label_smoothing):
    options = {"vocab_chunk": vocab_chunk, "label_smoothing": label_smoothing}
    head = make(dtype, bias=bias, **options)
    hidden, target = inputs(4, 3, dtype=dtype)
    loss = plain_losses(head, hidden, target, label_smoothing=label_smoothing).sum()
    truth = run(loss, head, hidden)
    assert_same(run(head(hidden, target), head, hidden), truth, TOLERANCE[dtype])
    in_place = run_in_place(lambda: head(hidden, target), head, hidden)
    assert_same(in_place, truth, TOLERANCE[dtype])


@examples(max_examples=40)
@given(
    rows=st.integers(1, 20),
    features=st.integers(1, 20),
    classes=st.integers(1, 60),
    vocab_chunk=st.none() | st.integers(1, 70),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_any_size_has_the_losses_and_gradients_of_torch(
    rows, features, classes, vocab_chunk, scale
):
    head = make(features=features, classes=classes, vocab_chunk=vocab_chunk)
    hidden, target = inputs(rows, features=features, classes=classes)
    hidden = (scale * hidden.detach()).requires_grad_()
    truth = run(plain_losses(head, hidden, target).sum(), head, hidden)
    found = run_in_place(lambda: head(hidden, target), head, hidden)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_unreduced_losses_have_the_shape_of_the_targets(shape, vocab_chunk):
    head = make(reduction="none", vocab_chunk=vocab_chunk)
    hidden, target = inputs(*shape)
    truth = run(plain_losses(head, hidden, target), head, hidden)
    assert_same(run(head(hidden, target), head, hidden), truth, 1e-12)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("vocab_chunk", [None, 7])
@pytest.mark.parametrize("ignore_index", [-100, 3, CLASSES + 5])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_ignored_rows_are_left_out(reduction, vocab_chunk, ignore_index, label_smoothing):
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    head = make(reduction=reduction, vocab_chunk=vocab_chunk, **options)
    hidden, target = inputs(4, 3)
    target[1:3, 1] = ignore_index
    logits = F.linear(hidden, head.weight, head.bias).flatten(0, 1)
    loss = F.cross_entropy(logits, target.flatten(), reduction=reduction, **options)
    truth = run(loss, head, hidden)
    found = run(head(hidden, target), head, hidden)
    assert_same(found, truth, 1e-12)
    assert not found[1][1:3, 1].any()


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_without_any_target_the_loss_is_zero(vocab_chunk):
    head = make(vocab_chunk=vocab_chunk)
    hidden, target = inputs(4)
    found = run(head(hidden, torch.full_like(target, -100)), head, hidden)
    assert not any(tensor.any() for tensor in found)


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_without_any_target_the_mean_is_undefined_as_in_torch(vocab_chunk):
    head = make(vocab_chunk=vocab_chunk, reduction="mean")
    hidden, target = inputs(4)
    assert head(hidden, torch.full_like(target, -100)).isnan()


@pytest.mark.parametrize("vocab_chunk", [None, 7])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_weights_multiply_the_losses_and_have_gradients(vocab_chunk, reduction):
    head = make(vocab_chunk=vocab_chunk, reduction=reduction)
    hidden, target = inputs(4, 3)
    target[0, 1] = -100
    weight = normal(4, 3, seed=9, dtype=torch.float64).abs().requires_grad_()
    losses = plain_losses(head, hidden, target) * weight
    if reduction == "sum":
        losses = losses.sum()
    elif reduction == "mean":
        losses = losses.sum() / weight[target != -100].sum()
    truth = run(losses, head, hidden, weight)
    assert_same(run(head(hidden, target, weight), head, hidden, weight), truth, 1e-12)
    in_place = run_in_place(lambda: head(hidden, target, weight), head, hidden, weight)
    assert_same(in_place, truth, 1e-12)


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_gradients_agree_with_finite_differences(vocab_chunk):
    head = make(vocab_chunk=vocab_chunk, label_smoothing=0.1)
    hidden, target = inputs(4)
    target[2] = -100
    weight = normal(4, seed=9, dtype=torch.float64).requires_grad_()

    def loss():
        return head(hidden, target, weight)

    tensors = [hidden, weight, *head.parameters()]
    found = torch.autograd.grad(loss(), tensors)
    torch.testing.assert_close(
        list(found), _finite_differences(loss, tensors), rtol=1e-6, atol=1e-6
    )


def _finite_differences(function, tensors, step=1e-6):
    found = []
    for tensor in tensors:
        flat = tensor.detach().view(-1)
        slopes = torch.empty_like(flat)
        for index in range(len(flat)):
            kept = flat[index].item()
            values = []
            for sign in (1, -1):
                flat[index] = kept + sign * step
                with torch.no_grad():
                    values.append(function().item())
            flat[index] = kept
            slopes[index] = (values[0] - values[1]) / (2 * step)
        found.append(slopes.view(tensor.shape))
    return found


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_large_and_forbidden_logits_are_handled(vocab_chunk):
    head = make(torch.float32, vocab_chunk=vocab_chunk, reduction="none")
    with torch.no_grad():
        head.bias[:8] = -torch.inf  # all of the first chunk
        head.bias[9] = 300.0  # every other probability underflows
    hidden, target = inputs(5, dtype=torch.float32)
    target = target.clamp(min=8)
    truth = run(plain_losses(head, hidden, target), head, hidden)
    found = run(head(hidden, target), head, hidden)
    torch.testing.assert_close(found, truth)
    assert found[0].max() > 200


def test_logits_are_those_of_the_linear_layer():
    head = make()
    hidden, _ = inputs(4, 3)
    torch.testing.assert_close(head.logits(hidden), F.linear(hidden, head.weight, head.bias))


@pytest.mark.parametrize("vocab_chunk", [None, 7])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(vocab_chunk, frozen):
    head = make(vocab_chunk=vocab_chunk)
    hidden, target = inputs(4)
    named = {"hidden": hidden, **dict(head.named_parameters())}
    named[frozen].requires_grad_(False)
    head(hidden, target).backward()
    assert [name for name, tensor in named.items() if tensor.grad is None] == [frozen]


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_no_rows_have_no_loss(vocab_chunk):
    head = make(torch.float32, vocab_chunk=vocab_chunk)
    hidden, target = inputs(0, dtype=torch.float32)
    found = run_in_place(lambda: head(hidden, target), head, hidden)
    assert not any(tensor.any() for tensor in found)


# --- tied, swapped and in low precision ----------------------------------------------------------


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_a_tied_table_accumulates_in_one_total(vocab_chunk):
    head = make(vocab_chunk=vocab_chunk)
    embedding = nn.Embedding(CLASSES, FEATURES)
    embedding.weight = head.weight
    _, target = inputs(4, 3)

    def forward(head):
        return head(embedding(target.flip(0)), target)

    truth = run(plain_losses(head, embedding(target.flip(0)), target).sum(), head)
    assert_same(run_in_place(lambda: forward(head), head), truth, 1e-12)


@pytest.mark.parametrize("vocab_chunk", [None, 7])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_low_precision_and_sums_in_float32(
    vocab_chunk, in_place, hidden_dtype
):
    head = make(torch.float32, features=50, classes=90, vocab_chunk=vocab_chunk)
    hidden, target = inputs(20, dtype=torch.float32, features=50, classes=90)

    def autocast():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def call():
        with autocast():
            return head(hidden.to(hidden_dtype), target)

    with autocast():
        loss = plain_losses(head, hidden.to(hidden_dtype), target).sum()
    assert loss.dtype == torch.float32
    truth = run(loss, head, hidden)
    found = run_in_place(call, head, hidden) if in_place else run(call(), head, hidden)
    assert found[0].dtype == torch.float32
    assert_same(found, truth, 1e-2)


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_autocast_leaves_float64_alone(vocab_chunk):
    head = make(vocab_chunk=vocab_chunk)
    hidden, target = inputs(4)
    truth = run(head(hidden, target), head, hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(head(hidden, target), head, hidden)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_under_autocast_rows_are_summed_in_the_precision_of_the_total(vocab_chunk):
    rows, head = 300, make(torch.float32, vocab_chunk=vocab_chunk)
    hidden, target = torch.zeros(rows, FEATURES), torch.zeros(rows, dtype=torch.int64)
    total = torch.zeros(CLASSES)
    with InPlaceGradients([(head.bias, total)]), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(hidden, target)
    torch.autograd.grad(loss, head.bias, allow_unused=True)
    one = head.bias.detach().softmax(dim=0) - F.one_hot(target[0], CLASSES)
    torch.testing.assert_close(total, rows * one.bfloat16().float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_a_low_precision_module_computes_losses_in_float32(vocab_chunk):
    head = make(torch.bfloat16, vocab_chunk=vocab_chunk)
    hidden, target = inputs(8, dtype=torch.bfloat16)
    found = run(head(hidden, target), head, hidden)
    assert [tensor.dtype for tensor in found] == [torch.float32] + 3 * [torch.bfloat16]
    wide = make(torch.float32)
    wide.load_state_dict(head.state_dict())
    copy = hidden.detach().float().requires_grad_()
    truth = run(plain_losses(wide, copy, target).sum(), wide, copy)
    assert_same(found, truth, 1e-2)
