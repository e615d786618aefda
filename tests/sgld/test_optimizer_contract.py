"""The samplers as torch optimizers: what a training loop does with them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR, OneCycleLR, SequentialLR, StepLR

from tests.helpers.samplers import (
    SAMPLERS,
    assert_equal,
    build,
    each_sampler,
    give_gradients,
    list_and_flat,
    parameters,
    take_steps,
    through_file,
    trajectory,
    values,
)


@each_sampler
@list_and_flat
def test_gradients_are_never_modified(sampler, flat):
    params = parameters()
    optimizer = build(sampler, params, flat=flat)
    for step in range(7):
        give_gradients(params, step)
        before = [param.grad.clone() for param in params]
        optimizer.step()
        assert_equal([param.grad for param in params], before)


@each_sampler
def test_groups_have_settings_of_their_own(sampler):
    own = [{"lr": 0.3, "prior_precision": 1.0, "num_data": 20}, {"lr": 0.05}]
    together = parameters(torch.float64)[:2]
    groups = [{"params": [param], **each} for param, each in zip(together, own, strict=True)]
    take_steps(build(sampler, groups, temperature=0.0), together, range(6))
    for i, settings in enumerate(own):
        alone = parameters(torch.float64)[:2]
        optimizer = build(sampler, [alone[i]], temperature=0.0, **settings)
        take_steps(optimizer, alone, range(6))
        assert torch.equal(alone[i], together[i])


@each_sampler
def test_temperature_of_a_group_scales_its_noise_alone(sampler):
    moves = []
    for temperature in (1.0, 4.0):
        params = [nn.Parameter(torch.zeros(6, dtype=torch.float64)) for _ in range(2)]
        hot = {"params": [params[1]], "temperature": temperature}
        optimizer = build(sampler, [{"params": [params[0]]}, hot])
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        moves.append(values(params))
    assert torch.equal(moves[0][0], moves[1][0])
    torch.testing.assert_close(2 * moves[0][1], moves[1][1])


@each_sampler
@list_and_flat
def test_parameters_without_gradient_stay_and_change_nothing_for_others(sampler, flat):
    params, others = parameters(), parameters()
    start = values(params)
    optimizer = build(sampler, params, flat=flat)
    without = build(sampler, [others[0], others[3]], flat=flat)
    for step in range(7):
        give_gradients(params, step)
        give_gradients(others, step)
        params[1].grad = params[2].grad = None
        optimizer.step()
        without.step()
    assert_equal(values(params)[1:3], start[1:3])
    assert_equal(values(params)[::3], values(others)[::3])


@each_sampler
def test_a_parameter_that_joins_late_starts_with_its_own_first_step(sampler):
    params, truth = parameters(torch.float64), parameters(torch.float64)
    optimizer = build(sampler, params, flat=True, temperature=0.0)
    for step in range(8):
        give_gradients(params, step)
        if step < 3:
            params[0].grad = None
        optimizer.step()
    take_steps(build(sampler, truth[1:], temperature=0.0), truth, range(8))
    late = build(sampler, truth[:1], temperature=0.0)
    take_steps(late, truth, range(3, 8))
    torch.testing.assert_close(values(params), values(truth), rtol=1e-12, atol=1e-12)


@each_sampler
def test_closure_is_run_with_gradients_and_its_loss_returned(sampler):
    params, others = parameters(), parameters()
    optimizer, plain = build(sampler, params), build(sampler, others)

    def closure():
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    expected = sum(param.square().sum() for param in params).item()
    assert optimizer.step(closure).item() == expected
    for param in others:
        param.grad = 2 * param.detach()
    assert plain.step() is None
    assert_equal(values(params), values(others))


@each_sampler
def test_autograd_notices_that_parameters_were_moved(sampler):
    params = parameters()
    loss = params[0].square().sum()
    optimizer = build(sampler, params)
    take_steps(optimizer, params, range(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- state ----------------------------------------------------------------------------------------


@each_sampler
@list_and_flat
@pytest.mark.parametrize("steps", [0, 3, 6])
def test_a_saved_state_resumes_bit_for_bit(sampler, flat, steps):
    expected = trajectory(sampler, 9, flat=flat)
    params = parameters()
    optimizer = build(sampler, params, flat=flat)
    take_steps(optimizer, params, range(steps))
    state = through_file(optimizer.state_dict())
    resumed = [nn.Parameter(value) for value in values(params)]
    # What the new one is built with does not matter, but for its kind.
    other = build(sampler, resumed, flat=flat, generator=None, lr=9.0, temperature=0.0)
    other.load_state_dict(state)
    take_steps(other, resumed, range(steps, 9))
    assert_equal(values(resumed), expected)


@each_sampler
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
@list_and_flat
def test_a_copy_goes_on_on_its_own(sampler, duplicate, flat):
    params = parameters()
    optimizer = build(sampler, params, flat=flat)
    take_steps(optimizer, params, range(3))
    twin, twins = duplicate((optimizer, params))
    for which, its in ((twin, twins), (optimizer, params)):
        take_steps(which, its, range(3, 8))
        assert_equal(values(its), trajectory(sampler, flat=flat))


@each_sampler
def test_add_param_group_goes_on_as_if_built_with_it(sampler):
    params, others = parameters(), parameters()
    optimizer = build(sampler, params[:2])
    optimizer.add_param_group({"params": params[2:], "lr": 0.02})
    whole = build(sampler, [{"params": others[:2]}, {"params": others[2:], "lr": 0.02}])
    take_steps(optimizer, params, range(5))
    take_steps(whole, others, range(5))
    assert_equal(values(params), values(others))


# --- what training loops do with it -------------------------------------------------------------


def schedules():
    return {
        "StepLR": lambda optimizer: StepLR(optimizer, 2, 0.1),
        "OneCycleLR": lambda optimizer: OneCycleLR(
            optimizer, max_lr=0.2, total_steps=10, cycle_momentum=False
        ),
        "SequentialLR": lambda optimizer: SequentialLR(
            optimizer, [LinearLR(optimizer, 0.5, total_iters=3), StepLR(optimizer, 2)], [3]
        ),
    }


@each_sampler
@pytest.mark.parametrize("name", schedules())
def test_torch_schedules_set_the_step_size(sampler, name):
    make, reference, settings = SAMPLERS[sampler]
    settings = {"lr": 0.1, "num_data": 10, "prior_precision": 3.0, **settings}
    param = parameters(torch.float64)[0]
    truth = reference(param, **settings)
    optimizer = make([param], temperature=0.0, **settings)
    schedule = schedules()[name](optimizer)
    rates = []
    for step in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        if sampler == "sghmc" and step:  # a velocity is a distance per step
            truth.velocity = truth.velocity * (rates[-1] / rates[-2]) ** 0.5
        truth.lr = rates[-1]
        give_gradients([param], step)
        optimizer.step()
        truth.step(param.grad, torch.zeros_like(param))
        schedule.step()
        torch.testing.assert_close(param.detach(), truth.theta, rtol=1e-10, atol=1e-10)
    assert len(set(rates)) > 3 or name == "StepLR"


@each_sampler
def test_grad_scaler_skips_a_step_and_its_noise(sampler):
    params, others = parameters(), parameters()
    optimizer, plain = build(sampler, params), build(sampler, others)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=10_000)
    scaler.scale(torch.ones(()))  # makes the scale
    for step in range(6):
        give_gradients(params, step)
        for param in params:
            param.grad *= scaler.get_scale()
        if step == 2:
            params[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    take_steps(plain, others, [0, 1, 3, 4, 5])
    assert_equal(values(params), values(others))
