"""Names and shapes of a sample: what counts, how it lies in a row, and what is refused."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector

from lightning_revflip.posterior.layout import Layout

SHAPES = st.lists(st.lists(st.integers(1, 3), max_size=3).map(tuple), min_size=1, max_size=4)


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def test_a_row_is_what_torch_makes_of_the_parameters():
    module = network()
    layout = Layout.of_parameters(module)
    flat = layout.flatten(dict(module.named_parameters()))
    assert torch.equal(flat, parameters_to_vector(module.parameters()))
    assert layout.numel == len(flat)
    assert not flat.requires_grad


@given(SHAPES, st.integers(1, 3))
def test_rows_come_back_as_the_tensors_that_they_were_made_of(shapes, count):
    layout = Layout(tuple(f"p{i}" for i in range(len(shapes))), tuple(shapes))
    samples = [{name: torch.randn(shape) for name, shape in layout.by_name.items()} for _ in "ab"]
    rows = torch.stack([layout.flatten(sample) for sample in samples])
    for name, values in layout.unflatten(rows).items():
        assert torch.equal(values, torch.stack([sample[name] for sample in samples]))


def test_unflattened_parameters_are_views_that_functional_call_takes():
    module, x = network().eval(), torch.randn(5, 4)
    layout = Layout.of_parameters(module)
    rows = layout.flatten(dict(module.named_parameters()))[None]
    one = {name: values[0] for name, values in layout.unflatten(rows).items()}
    assert torch.equal(functional_call(module, one, x), module(x))
    rows.zero_()
    assert all(not values.any() for values in one.values())


def test_flatten_writes_into_a_row_of_another_dtype():
    module = network()
    layout = Layout.of_parameters(module)
    out = torch.empty(layout.numel, dtype=torch.bfloat16)
    assert layout.flatten(dict(module.named_parameters()), out=out) is out
    assert torch.equal(out, parameters_to_vector(module.parameters()).bfloat16())


def test_frozen_parameters_are_no_part_of_a_sample():
    module = network()
    module[0].weight.requires_grad_(False)
    assert "0.weight" not in Layout.of_parameters(module).names


def test_a_shared_parameter_counts_once():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    assert Layout.of_parameters(module).names == ("0.weight", "0.bias", "1.bias")


def test_buffers_are_the_persistent_ones():
    module = network()
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    module[0].register_buffer("scratch", torch.zeros(2), persistent=False)
    names = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert Layout.of_buffers(module) == Layout(names, ((3,), (3,), ()))


def test_json_gives_the_same_layout():
    layout = Layout.of_buffers(network())
    assert Layout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"a": t["a"]}, "'b' of shape (2,) is missing"),
        (lambda t: {**t, "b": torch.ones(3)}, "'b' has shape (3,), expected (2,)"),
        (lambda t: {**t, "c": torch.ones(3)}, "'c' is not expected"),
    ],
    ids=["missing", "shape", "extra"],
)
def test_tensors_of_another_layout_are_refused(change, message):
    layout = Layout(("a", "b"), ((), (2,)))
    tensors = {"a": torch.tensor(1.0), "b": torch.ones(2)}
    layout.flatten(tensors)
    with pytest.raises(ValueError, match=re.escape(message)):
        layout.flatten(change(tensors))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Layout(("a",), ((1,),)), "the file lacks 'b' of shape (2,)"),
        (Layout(("a", "b"), ((1,), (3,))), "the file has 'b' of shape (3,), expected (2,)"),
        (Layout(("a", "b", "c"), ((1,), (2,), ())), "the file has 'c' of shape (), which is not"),
        (Layout(("b", "a"), ((2,), (1,))), "in another order: ('b', 'a'), expected ('a', 'b')"),
    ],
    ids=["missing", "shape", "extra", "order"],
)
def test_check_names_the_first_difference(other, message):
    layout = Layout(("a", "b"), ((1,), (2,)))
    layout.check(layout, "the file")
    with pytest.raises(ValueError, match=re.escape(message)):
        layout.check(other, "the file")


def test_check_module_takes_a_module_frozen_for_evaluation():
    layout = Layout.of_parameters(network())
    layout.check_module(network().requires_grad_(False))


def test_check_module_refuses_another_architecture():
    layout = Layout.of_parameters(network())
    module = network()
    module[2] = nn.Linear(3, 7)
    with pytest.raises(ValueError, match=r"another architecture.*'2.weight' has shape \(7, 3\)"):
        layout.check_module(module)


def test_check_module_refuses_trained_weights_that_were_not_sampled():
    module = network()
    module[0].requires_grad_(False)
    layout = Layout.of_parameters(module)
    with pytest.raises(ValueError, match="'0.weight' is not expected.*requires_grad_"):
        layout.check_module(network())
    layout.check_module(module)


@pytest.mark.parametrize("shape", [(9,), (2, 8), (1, 1, 9)])
def test_rows_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"rows must have shape \(n, 9\)"):
        Layout(("a",), ((3, 3),)).unflatten(torch.zeros(shape))


def test_a_module_without_parameters_cannot_be_sampled():
    with pytest.raises(ValueError, match="ReLU has no parameter that requires a gradient"):
        Layout.of_parameters(nn.ReLU())


def test_names_must_differ():
    with pytest.raises(ValueError, match="no name twice"):
        Layout(("a", "a"), ((1,), (1,)))
