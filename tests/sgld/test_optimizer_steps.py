"""The steps of the samplers, against their formulas, and their noise."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lightning_revflip.sgld import SGLD
from tests.helpers.langevin import ReferenceSGLD, drawn_noise, without_compiler
from tests.helpers.samplers import (
    SAMPLERS,
    assert_equal,
    build,
    each_sampler,
    give_gradients,
    list_and_flat,
    parameters,
    take_steps,
    trajectory,
    values,
)
from tests.helpers.statistics import largest_correlation, largest_distance, normal_distance

# --- steps ----------------------------------------------------------------------------------------


@each_sampler
@list_and_flat
@pytest.mark.parametrize("path", ["float64", "compiled", "torch"])
def test_steps_are_those_of_the_formula(sampler, flat, path):
    make, reference, settings = SAMPLERS[sampler]
    settings = {"lr": 0.1, "num_data": 10, "temperature": 0.5, **settings}
    dtype = torch.float64 if path == "float64" else torch.float32
    # float32: the noise is read off from positions, which costs digits.
    tolerance = 1e-10 if path == "float64" else 2e-4
    with without_compiler() if path == "torch" else nullcontext():
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        params = parameters(dtype)
        noise = drawn_noise(
            make, reference, params, 12, flat=flat, generator=generators[0], **settings
        )
        truths = [reference(param, prior_precision=3.0, **settings) for param in params]
        optimizer = make(
            params, prior_precision=3.0, flat=flat, generator=generators[1], **settings
        )
        for step in range(12):
            give_gradients(params, step)
            optimizer.step()
            for truth, param, drawn in zip(truths, params, noise[step], strict=True):
                truth.step(param.grad.double(), drawn)
                torch.testing.assert_close(
                    param.detach().double(), truth.theta, rtol=tolerance, atol=tolerance
                )


@each_sampler
@pytest.mark.parametrize("path", ["compiled", "torch"])
@pytest.mark.parametrize("source", ["gradient", "prior"])
def test_a_drift_below_the_resolution_of_float32_is_not_lost(sampler, path, source):
    # The drift is 5e-9, float32 can add 6e-8 to 1, and the noise is 1e-4. So the drift counts on
    # average, if it and the noise are added to the parameter as one number.
    settings = {"lr": 1e-4, "num_data": 10_000, "temperature": 1.0, "prior_precision": 0.0}
    settings |= {"psgld": {"stabilizer": 1.0}, "sghmc": {"friction": 1.0}}.get(sampler, {})
    with without_compiler() if path == "torch" else nullcontext():
        params = [nn.Parameter(torch.ones(1_000_000)) for _ in range(2)]
        optimizers = [build(sampler, [param], **settings) for param in params]
        for drifting in (False, True):  # the first step gives SGHMC a velocity
            for param in params:
                param.grad = torch.zeros_like(param)
            if drifting and source == "gradient":
                params[0].grad.fill_(1e-4)
            elif drifting:
                optimizers[0].param_groups[0]["prior_precision"] = 1.0
            for optimizer in optimizers:
                optimizer.step()
    lost = params[1].detach().double() - params[0].detach().double()
    # The rounding of a million sums leaves an error of 1e-10.
    assert float(lost.mean()) == pytest.approx(5e-9, rel=0.1)


@each_sampler
@list_and_flat
def test_temperature_0_descends_as_sgd_with_weight_decay(sampler, flat):
    # Half the step of SGD; and with much of the stabilizer, G = 1 / stabilizer.
    settings = {"psgld": {"stabilizer": 1e12, "lr": 0.1 * 1e12}, "sghmc": {"friction": 1.0}}
    params, others = parameters(torch.float64), parameters(torch.float64)
    optimizer = build(sampler, params, temperature=0.0, flat=flat, **settings.get(sampler, {}))
    plain = torch.optim.SGD(others, lr=0.05, weight_decay=3.0 / 10)
    before = optimizer.generator.get_state()
    take_steps(optimizer, params, range(6))
    take_steps(plain, others, range(6))
    torch.testing.assert_close(values(params), values(others), rtol=1e-10, atol=1e-10)
    assert torch.equal(optimizer.generator.get_state(), before)


@each_sampler
@pytest.mark.parametrize("path", ["compiled", "torch"])
def test_a_step_size_may_be_a_tensor(sampler, path):
    with without_compiler() if path == "torch" else nullcontext():
        found = trajectory(sampler, lr=torch.tensor(0.1, dtype=torch.float64))
        assert_equal(found, trajectory(sampler, lr=0.1))


# --- noise ----------------------------------------------------------------------------------------


@each_sampler
def test_default_generators_differ_and_follow_the_global_seed(sampler):
    torch.manual_seed(0)
    first, second = (trajectory(sampler, generator=None) for _ in range(2))
    torch.manual_seed(0)
    again = trajectory(sampler, generator=None)
    assert_equal(first, again)
    assert not torch.equal(first[0], second[0])


@each_sampler
def test_steps_leave_the_global_generator_alone(sampler):
    params = parameters()
    optimizer = build(sampler, params)
    before = torch.get_rng_state()
    take_steps(optimizer, params, range(3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("path", ["compiled", "torch"])
def test_noise_is_standard_normal_and_new_in_every_step_and_parameter(path):
    count = 50_000
    with without_compiler() if path == "torch" else nullcontext():
        generator = torch.Generator().manual_seed(0)
        params = [torch.zeros(count), torch.zeros(count)]
        drawn = drawn_noise(
            SGLD, ReferenceSGLD, params, 3, lr=0.1, num_data=10, generator=generator
        )
    columns = torch.stack([noise for step in drawn for noise in step], dim=1)
    for column in columns.T:
        assert normal_distance(column) < largest_distance(count)
    assert largest_correlation(columns) < 5
