"""LinearCrossEntropy is nn.Linear followed by F.cross_entropy, in less memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.measure import bytes_allocated
from lightning_revflip.reversible.cross_entropy import LinearCrossEntropy
from lightning_revflip.reversible.tables import InPlaceGradients
from tests.helpers.passes import normal, relative_error
from tests.helpers.properties import examples

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
FEATURES, CLASSES = 6, 23
CHUNKS = [None, 1, 7, 22, 23, 100]  # of which only 1 and 23 divide CLASSES


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
