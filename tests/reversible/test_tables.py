"""Gradients added in place are those of plain torch, without memory of the size of the table."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.measure import bytes_allocated
from lightning_revflip.reversible.tables import InPlaceGradients, cast, total_of
from tests.helpers.passes import normal, relative_error
from tests.helpers.properties import examples

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
DTYPES = list(TOLERANCE)


def leaf(*shape, seed=0, dtype=torch.float32):
    return normal(*shape, seed=seed, dtype=dtype).requires_grad_()


def zeros(tensor):
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def both_ways(run, inputs, leaves, autocast=None):
    """Output and gradients of a function by plain torch, and inside the mode.

    Those of the leaves are the total plus what autograd returned.
    """
    results = []
    for inside in (False, True):
        totals = [zeros(tensor) for tensor in leaves]
        mode = InPlaceGradients(zip(leaves, totals, strict=True) if inside else ())
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None), mode:
            out = run()
        wanted = [*inputs, *leaves]
        upstream = normal(*out.shape, seed=99).to(out.dtype)
        grads = torch.autograd.grad(out, wanted, upstream, allow_unused=True)
        found = [None if grad is None else grad.clone() for grad in grads[: len(inputs)]]
        for total, grad in zip(totals, grads[len(inputs) :], strict=True):
            found.append(total if grad is None else total + grad)
        results.append([out.detach(), *found])
    return results


def assert_same(results, tolerance):
    truth, found = results
    for one, other in zip(truth, found, strict=True):
        assert one.shape == other.shape
        assert one.abs().sum() > 0
        assert relative_error(other, one) <= tolerance


# --- linear --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["none", "in the mode", "outside the mode"])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (3, 4, 5), (2, 1, 3, 5)])
def test_a_linear_layer_has_the_gradients_of_torch(dtype, bias, shape):
    x, weight = leaf(*shape, dtype=dtype), leaf(11, 5, seed=1, dtype=dtype)
    b = None if bias == "none" else leaf(11, seed=2, dtype=dtype)
    leaves = [weight, b] if bias == "in the mode" else [weight]
    inputs = [x, b] if bias == "outside the mode" else [x]
    assert_same(both_ways(lambda: F.linear(x, weight, b), inputs, leaves), TOLERANCE[dtype])


@examples(max_examples=40)
@given(
    rows=st.integers(1, 40),
    features=st.integers(1, 40),
    classes=st.integers(1, 200),
    keywords=st.booleans(),
)
def test_a_linear_layer_of_any_size_has_the_gradients_of_torch(rows, features, classes, keywords):
    x, weight, bias = leaf(rows, features), leaf(classes, features, seed=1), leaf(classes, seed=2)

    def run():
        if keywords:
            return F.linear(input=x, weight=weight, bias=bias)
        return F.linear(x, weight, bias)

    assert_same(both_ways(run, [x], [weight, bias]), 2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_gradients_are_understood(dtype):
    wide, weight = leaf(6, 4, 10, dtype=dtype), leaf(9, 5, seed=1, dtype=dtype)

    def run():
        x = wide.transpose(0, 1)[..., 5:]
        return F.linear(x, weight).transpose(0, 2).sum(dim=0, keepdim=True).expand(3, -1, -1)

    assert_same(both_ways(run, [wide], [weight]), TOLERANCE[dtype])


def test_modules_are_served_and_several_uses_add_up():
    head, x = nn.Linear(5, 11), leaf(7, 5)
    assert_same(both_ways(lambda: head(x) + head(2 * x).sin(), [x], [head.weight, head.bias]), 1e-6)


def test_autograd_returns_nothing_for_a_weight_in_the_mode():
    x, weight, total = leaf(7, 5), leaf(11, 5), torch.zeros(11, 5)
    with InPlaceGradients([(weight, total)]):
        out = F.linear(x, weight)
    assert torch.autograd.grad(out.sum(), [weight], allow_unused=True) == (None,)
    assert total.abs().sum() > 0


def test_a_total_keeps_what_it_held():
    x, weight, total = leaf(7, 5), leaf(11, 5), torch.ones(11, 5)
    with InPlaceGradients([(weight, total)]):
        out = F.linear(x, weight)
    torch.autograd.grad(out.sum(), [weight], allow_unused=True)
    torch.testing.assert_close(total, 1 + x.detach().sum(0).expand(11, 5))


@pytest.mark.parametrize(
    "use",
    [
        lambda x, weight: x @ weight.t(),
        lambda x, weight: F.linear(x, weight.clone()),
        lambda x, weight: F.linear(x, weight.detach()) + F.linear(x, weight[:]),
    ],
)
def test_other_uses_of_a_weight_keep_their_ordinary_gradient(use):
    x, weight = leaf(7, 5), leaf(11, 5, seed=1)
    total = zeros(weight)
    with InPlaceGradients([(weight, total)]):
        out = use(x, weight)
    (found,) = torch.autograd.grad(out.sum(), [weight])
    torch.testing.assert_close(found, x.detach().sum(0).expand(11, 5))
    assert not total.any()


def test_a_strided_weight_is_left_to_torch():
    # oneDNN may multiply by it a thousand times slower
    weight, total = normal(11, 8)[:, 2:7].requires_grad_(), torch.zeros(11, 5)
    with InPlaceGradients([(weight, total)]):
        out = F.linear(leaf(7, 5), weight)
    assert torch.autograd.grad(out.sum(), [weight])[0].any()
    assert not total.any()


def test_a_mixture_of_uses_is_the_sum_of_both_parts():
    x, weight = leaf(7, 5), leaf(11, 5, seed=1)
    assert_same(both_ways(lambda: F.linear(x, weight) + x @ weight.t(), [x], [weight]), 1e-6)


@pytest.mark.parametrize("frozen", ["weight", "x"])
def test_what_needs_no_gradient_gets_none(frozen):
    x, weight, total = leaf(7, 5), leaf(11, 5, seed=1), torch.zeros(11, 5)
    (x if frozen == "x" else weight).requires_grad_(False)
    with InPlaceGradients([(weight, total)]):
        F.linear(x, weight).sum().backward()
    assert bool(total.any()) == (frozen == "x")
    assert (x.grad is None) == (frozen == "x")
    assert weight.grad is None


def test_no_graph_is_made_without_gradients():
    x, weight = leaf(7, 5), leaf(11, 5, seed=1)
    with InPlaceGradients([(weight, zeros(weight))]), torch.no_grad():
        out = F.linear(x, weight)
    assert not out.requires_grad
    torch.testing.assert_close(out, F.linear(x, weight))


@pytest.mark.parametrize("rows", [(0, 5), (3, 0, 5)])
def test_no_rows_have_no_gradient(rows):
    x, weight = leaf(*rows), leaf(11, 5)
    with InPlaceGradients([(weight, zeros(weight))]):
        out = F.linear(x, weight)
    assert out.shape == (*rows[:-1], 11)
    torch.autograd.grad(out.sum(), [x, weight])


@pytest.mark.parametrize(
    ("x", "bias"),
    [(torch.zeros(7, 4), None), (torch.zeros(7, 5).double(), None), (torch.zeros(7, 5), (3,))],
)
def test_mistakes_are_answered_by_torch(x, bias):
    weight = leaf(11, 5)
    b = None if bias is None else torch.zeros(bias)
    with pytest.raises(RuntimeError) as plain:
        F.linear(x, weight, b)
    with InPlaceGradients([(weight, zeros(weight))]), pytest.raises(RuntimeError) as inside:
        F.linear(x, weight, b)
    assert str(inside.value) == str(plain.value)


# --- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_mode", [True, False])
def test_autocast_multiplies_as_torch_does(dtype, in_mode):
    x, weight, bias = leaf(3, 7, 50), leaf(40, 50, seed=1), leaf(40, seed=2)
    leaves, inputs = ([weight, bias], [x]) if in_mode else ([weight], [x, bias])

    def run():
        return F.linear(x.to(dtype), weight, bias)

    results = both_ways(run, inputs, leaves, autocast=torch.bfloat16)
    assert results[0][0].dtype == results[1][0].dtype == torch.bfloat16
    assert_same(results, 5e-3)
    assert results[1][-1].dtype == torch.float32


def test_autocast_leaves_float64_alone():
    x, weight = leaf(7, 5, dtype=torch.float64), leaf(11, 5, dtype=torch.float64)
    assert_same(both_ways(lambda: F.linear(x, weight), [x], [weight], torch.bfloat16), 1e-12)


def test_a_weight_is_cast_once_in_the_life_of_a_mode():
    weight = leaf(11, 5)
    mode = InPlaceGradients([(weight, zeros(weight))])
    with mode:
        first = cast(weight, torch.bfloat16)
        assert cast(weight, torch.bfloat16) is first
        assert first.dtype == torch.bfloat16
        assert cast(weight, torch.float32).data_ptr() == weight.data_ptr()
        other = leaf(3)
        assert cast(other, torch.bfloat16) is not cast(other, torch.bfloat16)
    assert cast(weight, torch.bfloat16) is not first


def test_products_under_autocast_use_the_cast_weight():
    x, weight = leaf(7, 64), leaf(2000, 64)
    with InPlaceGradients([(weight, zeros(weight))]), torch.autocast("cpu", dtype=torch.bfloat16):
        F.linear(x, weight)
        _, peak = bytes_allocated(lambda: F.linear(x, weight))
    assert peak < 2000 * 64  # bytes: half a weight in bfloat16


# --- embedding -----------------------------------------------------------------------------------

INDICES = torch.tensor([[1, 4, 4, 0], [10, 4, 1, 9]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [None, 0, 4, -1, -11])
@pytest.mark.parametrize("indices", [INDICES, INDICES.int(), INDICES.t(), INDICES[0, 1]])
def test_an_embedding_has_the_gradients_of_torch(dtype, padding_idx, indices):
    weight = leaf(11, 5, dtype=dtype)
    if indices.dim() == 0 and padding_idx == 4:
        indices = INDICES[0, 0]
    run = lambda: F.embedding(indices, weight, padding_idx)  # noqa: E731
    assert_same(both_ways(run, [], [weight]), TOLERANCE[dtype])


@examples(max_examples=30)
@given(
    indices=st.lists(st.integers(0, 8), min_size=1, max_size=30),
    features=st.integers(1, 20),
    padding_idx=st.none() | st.integers(-9, 8),
)
def test_any_look_up_has_the_gradients_of_torch(indices, features, padding_idx):
    table = nn.Embedding(9, features, padding_idx, dtype=torch.float64)
    with torch.no_grad():
        table.weight.copy_(normal(9, features, dtype=torch.float64))
    truth, found = both_ways(lambda: table(torch.tensor(indices)), [], [table.weight])
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding_idx", [-1, 4])
def test_the_builtin_embedding_is_served(padding_idx):
    weight, total = leaf(11, 5), torch.zeros(11, 5)
    (truth,) = torch.autograd.grad(torch.embedding(weight, INDICES, padding_idx).sum(), [weight])
    with InPlaceGradients([(weight, total)]):
        out = torch.embedding(weight, INDICES, padding_idx=padding_idx)
    assert torch.autograd.grad(out.sum(), [weight], allow_unused=True) == (None,)
    torch.testing.assert_close(total, truth)


@pytest.mark.parametrize("option", ["scale_grad_by_freq", "sparse", "max_norm"])
def test_special_embeddings_are_left_to_torch(option):
    value = 0.5 if option == "max_norm" else True
    weight, total = leaf(11, 5), torch.zeros(11, 5)
    copy = weight.detach().clone().requires_grad_()
    (truth,) = torch.autograd.grad(F.embedding(INDICES, copy, **{option: value}).sum(), [copy])
    with InPlaceGradients([(weight, total)]):
        out = F.embedding(INDICES, weight, **{option: value})
    (found,) = torch.autograd.grad(out.sum(), [weight])
    assert found.is_sparse == truth.is_sparse
    torch.testing.assert_close(found.to_dense(), truth.to_dense())
    torch.testing.assert_close(weight, copy)
    assert not total.any()


def test_the_gradient_of_an_embedding_is_the_same_every_time():
    indices = torch.arange(3000) % 7
    upstream = normal(3000, 16)
    totals = [torch.zeros(7, 16) for _ in range(5)]
    weight = leaf(7, 16)
    for total in totals:
        with InPlaceGradients([(weight, total)]):
            out = F.embedding(indices, weight)
        torch.autograd.grad(out, [weight], upstream, allow_unused=True)
    assert all(torch.equal(total, totals[0]) for total in totals)


def test_an_index_out_of_range_is_answered_by_torch():
    weight = leaf(11, 5)
    with InPlaceGradients([(weight, zeros(weight))]):
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([11]), weight)
        with pytest.raises(AssertionError, match="Padding_idx"):
            F.embedding(torch.tensor([1]), weight, padding_idx=11)


# --- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tied_table_accumulates_in_one_total(dtype):
    weight = leaf(11, 5, dtype=dtype)

    def run():
        return F.linear(F.embedding(INDICES, weight).tanh(), weight)

    assert_same(both_ways(run, [], [weight]), TOLERANCE[dtype])


def test_low_precision_weights_accumulate_in_float32():
    x, weight = leaf(4, 8, dtype=torch.bfloat16), leaf(11, 8, dtype=torch.bfloat16)

    def run():
        return F.linear(F.embedding(INDICES, weight)[0] + x, weight)

    assert_same(both_ways(run, [x], [weight]), 2e-2)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_double_backward_is_refused(kind):
    x, weight = leaf(7, 5), leaf(11, 5)
    with InPlaceGradients([(weight, zeros(weight))]):
        out = F.linear(x, weight) if kind == "linear" else F.embedding(INDICES, weight)
    with pytest.raises(RuntimeError, match=f"double backward through an? {kind}"):
        torch.autograd.grad(out.sum(), [weight], create_graph=True, allow_unused=True)


def test_a_repeated_backward_adds_again():
    x, weight, total = leaf(7, 5), leaf(11, 5), torch.zeros(11, 5)
    with InPlaceGradients([(weight, total)]):
        loss = F.linear(x, weight).sum()
    torch.autograd.grad(loss, [weight], allow_unused=True, retain_graph=True)
    once = total.clone()
    torch.autograd.grad(loss, [weight], allow_unused=True)
    torch.testing.assert_close(total, 2 * once)


def test_modes_nest_and_end():
    a, b, c = leaf(3), leaf(3), leaf(3)
    first, second = torch.zeros(3), torch.zeros(3)
    outer = InPlaceGradients([(a, first)])
    with outer:
        with InPlaceGradients([(b, second)]):
            assert total_of(a) is first
            assert total_of(b) is second
            assert total_of(c) is total_of(None) is None
            with outer:
                assert total_of(a) is first
        assert total_of(a) is first
        assert total_of(b) is None
    assert total_of(a) is None


def test_nested_modes_serve_their_own_weights():
    x, a, b = leaf(7, 5), leaf(5, 5, seed=1), leaf(11, 5, seed=2)
    totals = [zeros(a), zeros(b)]
    truth = torch.autograd.grad(F.linear(F.linear(x, a), b).sum(), [a, b])
    with InPlaceGradients([(a, totals[0])]), InPlaceGradients([(b, totals[1])]):
        out = F.linear(F.linear(x, a), b)
    assert torch.autograd.grad(out.sum(), [a, b], allow_unused=True) == (None, None)
    torch.testing.assert_close(totals, list(truth))


def test_an_exception_ends_the_mode():
    weight = leaf(11, 5)
    with pytest.raises(KeyError), InPlaceGradients([(weight, zeros(weight))]):
        raise KeyError
    assert total_of(weight) is None
    assert torch.autograd.grad(F.linear(leaf(2, 5), weight).sum(), [weight])[0] is not None


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (torch.zeros(5, 11), r"\(11, 5\) on cpu, got \(5, 11\)"),
        (torch.zeros(11, 5, device="meta"), r"got \(11, 5\) on meta"),
        (torch.zeros(11, 5, dtype=torch.bfloat16), r"float32 or float64 .* got torch.bfloat16"),
        (torch.zeros(11, 5, requires_grad=True), r"requires_grad=True"),
    ],
)
def test_a_total_that_does_not_fit_is_refused(total, message):
    with pytest.raises(ValueError, match=message):
        InPlaceGradients([(leaf(11, 5), total)])


# --- memory --------------------------------------------------------------------------------------

WORDS, FEATURES = 20_000, 200
TABLE_BYTES = 4 * WORDS * FEATURES


def test_backward_allocates_far_less_than_the_table():
    weight, total = leaf(WORDS, FEATURES), torch.zeros(WORDS, FEATURES)
    x, indices = leaf(4, FEATURES), torch.arange(40) * 7
    with InPlaceGradients([(weight, total)]):
        looked_up, out = F.embedding(indices, weight), F.linear(x, weight)

    def embedding():
        return torch.autograd.grad(looked_up.sum(), [weight], allow_unused=True)

    def linear():
        return torch.autograd.grad(out.sum(), [x, weight], allow_unused=True)

    assert 0 < bytes_allocated(embedding)[1] < 0.01 * TABLE_BYTES
    assert 0 < bytes_allocated(linear)[1] < 0.2 * TABLE_BYTES  # a block of 2.5 MB, the gradient


def test_plain_torch_allocates_the_table():
    weight = leaf(WORDS, FEATURES)
    out = F.embedding(torch.arange(40), weight)
    assert bytes_allocated(lambda: torch.autograd.grad(out.sum(), [weight]))[1] >= TABLE_BYTES
