"""flat=True: the parameters of a group in one piece of memory, and nothing else changes.

It is for steps that are not compiled, so most tests are without a compiler.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_revflip.sgld import SGLD
from lightning_revflip.sgld.native import LIBRARY
from tests.helpers.langevin import without_compiler
from tests.helpers.properties import examples
from tests.helpers.samplers import (
    SAMPLERS,
    assert_equal,
    build,
    each_sampler,
    give_gradients,
    normal,
    parameters,
    take_steps,
    through_file,
    trajectory,
    values,
)


@pytest.fixture(autouse=True)
def _torch_alone():
    with without_compiler():
        yield


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)


def train(module, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        dtype = next(module.parameters()).dtype
        module(normal(8, 6, seed=step, dtype=dtype)).square().mean().backward()
        optimizer.step()


def in_one_piece(params):
    places = {param.untyped_storage().data_ptr() for param in params}
    return len(places) == 1


@each_sampler
def test_the_trajectory_is_that_of_separate_parameters(sampler):
    assert_equal(trajectory(sampler, flat=True), trajectory(sampler, flat=False))


@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5),
    missing=st.integers(0, 4),
)
@examples(max_examples=50)
def test_any_shapes_and_a_late_gradient_make_no_difference(sampler, shapes, missing):
    moved = []
    for flat in (False, True):
        params = [nn.Parameter(normal(*shape, seed=i)) for i, shape in enumerate(shapes)]
        optimizer = build(sampler, params, flat=flat)
        for step in range(7):
            give_gradients(params, step)
            if step < 2 and missing < len(params):
                params[missing].grad = None
            optimizer.step()
        moved.append(values(params))
    assert_equal(*moved)


@each_sampler
def test_compiled_steps_leave_parameters_where_they_are(sampler, monkeypatch):
    monkeypatch.setenv("REVFLIP_NATIVE", "1")
    LIBRARY.unload()
    params = parameters()
    places = [param.data_ptr() for param in params]
    take_steps(build(sampler, params, flat=True), params, range(8))
    assert [param.data_ptr() for param in params] == places
    assert_equal(values(params), trajectory(sampler, flat=False))


@each_sampler
def test_parameters_share_one_piece_of_memory_and_keep_their_shapes(sampler):
    params = parameters()
    params.append(nn.Parameter(normal(6, 4).T))  # not contiguous
    start = [param.shape for param in params]
    optimizer = build(sampler, params, flat=True)
    take_steps(optimizer, params, range(2))
    assert in_one_piece(params)
    assert [param.shape for param in params] == start


@each_sampler
def test_parameters_that_are_not_contiguous_move_as_others_do(sampler):
    moved = []
    for flat in (False, True):
        for layout in (torch.clone, lambda value: value.T.contiguous().T):
            params = [nn.Parameter(layout(normal(6, 4))), nn.Parameter(normal(5))]
            take_steps(build(sampler, params, flat=flat, temperature=0.0), params, range(6))
            moved.append(values(params))
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0])


@each_sampler
def test_loading_weights_into_the_module_takes_effect(sampler):
    module, other = network(0), network(1)
    optimizer = build(sampler, module.parameters(), flat=True, temperature=0.0)
    train(module, optimizer, range(3))
    module.load_state_dict(other.state_dict())
    for step in range(3):
        before = values(module.parameters())
        train(module, optimizer, [step])
        for old, param in zip(before, module.parameters(), strict=True):
            assert 0 < (param - old).abs().max() < 1  # a step from the loaded weights
    assert in_one_piece(list(module.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moving_the_module_does_no_harm(dtype):
    module, plain = network(), network()
    optimizers = [
        build("sgld", each.parameters(), flat=flat, temperature=0.0)
        for each, flat in ((module, True), (plain, False))
    ]
    for each, optimizer in zip((module, plain), optimizers, strict=True):
        train(each, optimizer, range(2))
        each.to(dtype)
        optimizer.zero_grad(set_to_none=True)
        train(each, optimizer, range(2, 5))
    assert_equal(values(module.parameters()), values(plain.parameters()))
    assert in_one_piece(list(module.parameters()))


def test_weights_are_saved_and_loaded_as_those_of_any_module(tmp_path):
    module = network()
    train(module, build("sgld", module.parameters(), flat=True), range(3))
    state = module.state_dict()
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "weights")
    for loaded in (through_file(state), load_file(tmp_path / "weights")):
        fresh = network(1)
        fresh.load_state_dict(loaded)
        assert_equal(list(fresh.state_dict().values()), list(state.values()))


@each_sampler
def test_states_change_places_between_flat_and_separate(sampler):
    params = parameters()
    optimizer = build(sampler, params, flat=True)
    take_steps(optimizer, params, range(4))
    others = [nn.Parameter(value) for value in values(params)]
    separate = build(sampler, others, flat=False)
    separate.load_state_dict(through_file(optimizer.state_dict()))
    take_steps(optimizer, params, range(4, 8))
    take_steps(separate, others, range(4, 8))
    assert_equal(values(params), values(others))


@each_sampler
def test_a_step_without_some_gradients_moves_the_others_as_without_flat(sampler):
    found = []
    for flat in (False, True):
        params = parameters()
        optimizer = build(sampler, params, flat=flat)
        for step in range(8):
            give_gradients(params, step)
            params[step % 4].grad = None
            optimizer.step()
        found.append(values(params))
    assert_equal(*found)


def test_groups_are_pieces_of_their_own():
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]
    take_steps(SGLD(groups, 0.1, num_data=10, flat=True), params, range(2))
    assert in_one_piece(params[:2])
    assert in_one_piece(params[2:])
    assert not in_one_piece(params)


def test_more_than_one_dtype_in_a_group_is_refused():
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    with pytest.raises(ValueError, match="flat=True needs one dtype and device in each group"):
        SGLD(params, 0.1, num_data=10, flat=True)
    take_steps(SGLD(params, 0.1, num_data=10), params, range(2))
