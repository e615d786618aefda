"""What samplers refuse, and that they say what to do."""

import math

import pytest
import torch
from torch import nn

from lightning_revflip.sgld import PSGLD, SGHMC, SGLD
from tests.helpers.samplers import assert_equal, build, each_sampler, parameters, take_steps, values


def make(sampler, **changes):
    return build(sampler, parameters(), **changes)


@each_sampler
def test_num_data_has_no_default(sampler):
    kind = {"sgld": SGLD, "psgld": PSGLD, "sghmc": SGHMC}[sampler]
    with pytest.raises(TypeError, match="num_data"):
        kind(parameters(), 0.1)


@each_sampler
@pytest.mark.parametrize("num_data", [0, -5, 2.5, math.nan, None, True, "100"], ids=repr)
def test_num_data_is_a_number_of_examples(sampler, num_data):
    with pytest.raises(ValueError, match=r"num_data must be .*got.*len\(train_dataset\)"):
        make(sampler, num_data=num_data)


@each_sampler
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *[("lr", value) for value in (0.0, -0.1, math.nan, math.inf)],
        *[("temperature", value) for value in (-1.0, math.nan, math.inf)],
        *[("prior_precision", value) for value in (-1.0, math.nan, math.inf)],
    ],
)
def test_numbers_out_of_range_are_named(sampler, setting, value):
    with pytest.raises(ValueError, match=f"{setting} must be .*got {value}"):
        make(sampler, **{setting: value})


@pytest.mark.parametrize(
    ("sampler", "setting", "value"),
    [
        *[("sghmc", "friction", value) for value in (0.0, -0.1, 1.1, math.nan)],
        *[("psgld", "smoothing", value) for value in (-0.1, 1.0, 2.0, math.nan)],
        *[("psgld", "stabilizer", value) for value in (0.0, -1.0, math.nan, math.inf)],
        *[("psgld", "adaptation_steps", value) for value in (0, -1)],
    ],
)
def test_settings_of_one_sampler_are_named(sampler, setting, value):
    with pytest.raises(ValueError, match=f"{setting} must .*got {value}"):
        make(sampler, **{setting: value})


@each_sampler
def test_settings_of_a_group_are_checked_as_well(sampler):
    params = parameters()
    with pytest.raises(ValueError, match="temperature must be"):
        build(sampler, [{"params": params, "temperature": -1.0}])
    optimizer = build(sampler, params[:2])
    with pytest.raises(ValueError, match="prior_precision must be"):
        optimizer.add_param_group({"params": params[2:], "prior_precision": -1.0})
    assert len(optimizer.param_groups) == 1


@each_sampler
@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float16, "float16.*use mixed precision, which keeps parameters in float32"),
        (torch.bfloat16, "bfloat16.*use mixed precision, which keeps parameters in float32"),
        (torch.complex64, "parameters must be float32 or float64, got torch.complex64"),
    ],
    ids=["float16", "bfloat16", "complex64"],
)
def test_parameters_are_of_32_or_64_bits(sampler, dtype, message):
    with pytest.raises(ValueError, match=message):
        build(sampler, [nn.Parameter(torch.zeros(3, dtype=dtype))])


@each_sampler
@pytest.mark.parametrize("place", ["one_group", "later_group"])
def test_sparse_gradients_are_refused_and_nothing_has_moved(sampler, place):
    embedding = nn.Embedding(5, 3, sparse=True)
    params = [*parameters(), embedding.weight]
    groups = params if place == "one_group" else [{"params": [each]} for each in params]
    optimizer = build(sampler, groups)
    before, noise = values(params), optimizer.generator.get_state()
    for param in params[:-1]:
        param.grad = torch.ones_like(param)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse.*Use sparse=False in nn\.Embedding"):
        optimizer.step()
    assert_equal(values(params), before)
    assert torch.equal(optimizer.generator.get_state(), noise)


@each_sampler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a generator of another device")
@pytest.mark.gpu
def test_a_generator_of_another_device_is_refused(sampler):
    with pytest.raises(ValueError, match=r"generator must be on the CPU.*torch\.Generator\(\)"):
        make(sampler, generator=torch.Generator("cuda"))


@each_sampler
def test_the_state_of_another_optimizer_is_refused_and_nothing_has_changed(sampler):
    optimizer, params = make(sampler), parameters()
    before = optimizer.state_dict()
    plain = torch.optim.SGD(params, lr=0.1)
    take_steps(plain, params, range(2))
    with pytest.raises(ValueError, match=f"not the state of {type(optimizer).__name__}"):
        optimizer.load_state_dict(plain.state_dict())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]


@pytest.mark.parametrize("sampler", ["psgld", "sghmc"])
def test_the_state_of_another_sampler_is_refused(sampler):
    params = parameters()
    other = build("sgld", params)
    take_steps(other, params, range(2))
    with pytest.raises(ValueError, match=f"not the state of {sampler.upper()}"):
        make(sampler).load_state_dict(other.state_dict())


def test_sgld_refuses_the_state_of_a_sampler_with_a_momentum():
    params = parameters()
    other = build("sghmc", params)
    take_steps(other, params, range(2))
    with pytest.raises(ValueError, match="not the state of SGLD"):
        make("sgld").load_state_dict(other.state_dict())
