"""LinearCrossEntropy answers misuse by a message, and holds one buffer of logits at most."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import bytes_allocated
from lightning_revflip.reversible.cross_entropy import LinearCrossEntropy
from lightning_revflip.reversible.tables import InPlaceGradients
from tests.helpers.cross_entropy import (
    CLASSES,
    FEATURES,
    assert_same,
    inputs,
    make,
    plain_losses,
    run,
)

# --- misuse --------------------------------------------------------------------------------------


def test_a_second_backward_through_the_only_buffer_is_refused():
    head = make()
    hidden, target = inputs(4)
    loss = head(hidden, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up the only buffer.* Call the module again"):
        loss.backward()


def test_with_chunks_the_backward_pass_can_be_repeated():
    head = make(vocab_chunk=7)
    hidden, target = inputs(4)
    loss = head(hidden, target)
    first = torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden, head.weight]), first)


@pytest.mark.parametrize(("vocab_chunk", "name"), [(None, "weight"), (7, "weight"), (7, "bias")])
def test_a_change_of_a_parameter_before_backward_is_noticed(vocab_chunk, name):
    head = make(vocab_chunk=vocab_chunk)
    hidden, target = inputs(4)
    loss = head(hidden, target)
    with torch.no_grad():
        getattr(head, name).add_(1)
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


@pytest.mark.parametrize("vocab_chunk", [None, 7])
def test_double_backward_is_refused(vocab_chunk):
    head = make(vocab_chunk=vocab_chunk)
    hidden, target = inputs(4)
    with pytest.raises(RuntimeError, match="double backward through LinearCrossEntropy"):
        torch.autograd.grad(head(hidden, target), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "avg"}, "reduction must be one of 'sum', 'mean', 'none', got 'avg'"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\), got -0.1"),
        ({"label_smoothing": float("nan")}, r"label_smoothing must be in \[0, 1\), got nan"),
        ({"vocab_chunk": 0}, "vocab_chunk must be at least 1, got 0"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        LinearCrossEntropy(FEATURES, CLASSES, **options)


ONES = torch.ones(4, FEATURES)
TARGETS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 5), TARGETS), r"shape \(..., 6\), got \(4, 5\)"),
        ((torch.tensor(1.0), TARGETS), r"shape \(..., 6\), got \(\)"),
        ((ONES, TARGETS[:3]), r"last dimension, \(4,\), got \(3,\)"),
        ((ONES, TARGETS[:, None]), r"last dimension, \(4,\), got \(4, 1\)"),
        ((ONES, TARGETS.float()), r"integer dtype, got torch.float32"),
        ((ONES, TARGETS.bool()), r"integer dtype, got torch.bool"),
        ((ONES, TARGETS, torch.ones(1)), r"shape \(4,\), got \(1,\)"),
        ((ONES.double(), TARGETS), r"dtype of the weight, torch.float32, got torch.float64"),
    ],
)
def test_a_bad_argument_is_described(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(torch.float32)(*arguments)


@pytest.mark.parametrize("vocab_chunk", [None, 7])
@pytest.mark.parametrize("target", [CLASSES, -1, 10**6])
def test_a_target_that_is_no_class_is_named(target, vocab_chunk):
    with pytest.raises(IndexError, match=f"target {target} is no class: classes are 0 to 22"):
        make(torch.float32, vocab_chunk=vocab_chunk)(ONES, TARGETS + target)


def test_small_integer_targets_are_understood():
    head = make(torch.float32)
    torch.testing.assert_close(head(ONES, TARGETS.to(torch.uint8)), head(ONES, TARGETS))


def test_its_options_are_shown():
    shown = repr(LinearCrossEntropy(6, 23, label_smoothing=0.1, vocab_chunk=7, ignore_index=0))
    assert "out_features=23" in shown
    assert "label_smoothing=0.1, vocab_chunk=7" in shown
    assert "ignore_index=0" in shown


# --- memory --------------------------------------------------------------------------------------

WORDS, WIDE = 20_000, 200
TABLE_BYTES = 4 * WORDS * WIDE


def _peak(head, rows, call):
    hidden, target = inputs(rows, dtype=torch.float32, features=WIDE, classes=WORDS)
    parameters = list(head.parameters())
    pairs = [(parameter, torch.zeros_like(parameter)) for parameter in parameters]

    def step():
        with InPlaceGradients(pairs):
            loss = call(hidden, target)
        torch.autograd.grad(loss, [hidden, *parameters], allow_unused=True)

    step()
    return bytes_allocated(step)[1]


def test_a_pass_allocates_one_buffer_of_logits_and_far_less_than_the_table():
    rows, head = 8, make(torch.float32, features=WIDE, classes=WORDS)
    buffer, block = 4 * rows * WORDS, 4 * 5 * 2**17
    peak = _peak(head, rows, head)
    assert buffer <= peak < 1.5 * buffer + block
    assert peak < 0.25 * TABLE_BYTES


def test_of_many_rows_only_one_buffer_is_made():
    rows, head = 200, make(torch.float32, features=WIDE, classes=WORDS)
    buffer = 4 * rows * WORDS

    def plain(hidden, target):
        return F.cross_entropy(head.logits(hidden), target)

    assert buffer <= _peak(head, rows, head) < 1.35 * buffer
    assert _peak(head, rows, plain) > 2 * buffer


def test_with_chunks_no_logits_of_all_classes_are_held():
    rows, head = 200, make(torch.float32, features=WIDE, classes=WORDS, vocab_chunk=500)
    assert _peak(head, rows, head) < 0.1 * 4 * rows * WORDS + 4 * 500 * WIDE + 4 * rows * WIDE


def test_backward_frees_the_buffer_even_if_the_graph_lives_on():
    rows, head = 64, make(torch.float32, features=WIDE, classes=WORDS).requires_grad_(False)
    hidden, target = inputs(rows, dtype=torch.float32, features=WIDE, classes=WORDS)
    buffer = 4 * rows * WORDS

    def forward():
        return head(hidden, target)

    def forward_and_backward():
        loss = head(hidden, target)
        return loss, torch.autograd.grad(loss, [hidden], retain_graph=True)

    assert bytes_allocated(forward)[0] > buffer
    assert bytes_allocated(forward_and_backward)[0] < 0.1 * buffer


# --- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("classes", [100, 1000, 1025, 10_000, 70_001])
@pytest.mark.parametrize("vocab_chunk", [None, 999])
def test_cuda_has_the_gradients_of_torch_without_synchronisation(classes, vocab_chunk):
    head = make(features=32, classes=classes, vocab_chunk=vocab_chunk, label_smoothing=0.1).cuda()
    hidden, target = inputs(5, 4, features=32, classes=classes)
    hidden, target = hidden.detach().cuda().requires_grad_(), target.cuda()
    target[1, 1] = -100
    truth = run(plain_losses(head, hidden, target, label_smoothing=0.1).sum(), head, hidden)
    parameters = list(head.parameters())
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with InPlaceGradients(zip(parameters, totals, strict=True)):
            loss = head(hidden, target)
        grads = torch.autograd.grad(loss, [hidden, *parameters], allow_unused=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same([loss.detach(), grads[0], *totals], truth, 1e-10)
