"""Predictions of stacked samples are those of each sample loaded into the module."""

import copy

import pytest
import torch
from torch import nn

from lightning_revflip.posterior import Layout, LowRankGaussian, predict
from tests.helpers.predictors import (
    Attention,
    Branching,
    InPlace,
    LastState,
    Tied,
    TwoInputs,
    one_by_one,
    stacked,
)

MODULES = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (7, 4)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)
        ),
        (7, 1, 5, 5),
    ),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(), nn.Linear(6, 3)), (7, 4)),
    "attention": (Attention, (7, 5, 4)),
    "gru": (lambda: LastState(nn.GRU(4, 6, batch_first=True)), (7, 5, 4)),
    "lstm": (lambda: LastState(nn.LSTM(4, 6, 2, batch_first=True)), (7, 5, 4)),
    "branching": (Branching, (7, 4)),
    "in_place": (InPlace, (7, 4)),
    "tied": (Tied, (7, 4)),
}
WITHOUT_VMAP = ("gru", "lstm", "branching", "in_place")


def made(name):
    torch.manual_seed(0)
    build, shape = MODULES[name]
    return build(), torch.randn(shape)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
@pytest.mark.parametrize("name", MODULES)
def test_prediction_is_that_of_each_sample_loaded_into_the_module(name, chunk_size):
    module, x = made(name)
    samples = stacked(module)
    expected = one_by_one(module, samples, x).softmax(-1)
    torch.testing.assert_close(
        predict(module, samples, x, chunk_size=chunk_size), expected, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("name", WITHOUT_VMAP)
def test_what_vmap_cannot_run_is_computed_sample_by_sample(name):
    module, x = made(name)
    samples = stacked(module)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    predict(module, samples, x, chunk_size=3, transform=None)
    assert len(calls) == 5


def test_a_network_runs_once_for_a_chunk():
    module, x = made("linear")
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    predict(module, stacked(module, 25), x, chunk_size=8)
    assert len(calls) == 1 + 3  # the first sample alone, and 24 others


def test_samples_whose_results_exceed_the_cache_are_computed_one_by_one():
    module, _ = made("linear")
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(100_000, 4)  # 15 intermediate results an example and sample: 6 MB
    predict(module, stacked(module), x, transform=None)
    assert len(calls) == 5


def test_samples_may_have_buffers():
    module, x = made("conv")
    samples = stacked(module)
    samples["1.running_mean"] = torch.randn(5, 2)
    samples["1.num_batches_tracked"] = torch.arange(5)
    expected = one_by_one(module, samples, x)
    predictions = predict(module, samples, x, transform=None)
    torch.testing.assert_close(predictions, expected, atol=1e-6, rtol=1e-5)


def test_missing_parameters_are_those_of_the_module():
    module, x = made("linear")
    samples = {"2.bias": stacked(module)["2.bias"]}
    expected = one_by_one(module, samples, x)
    predictions = predict(module, samples, x, transform=None)
    torch.testing.assert_close(predictions, expected)


def test_a_tuple_holds_several_inputs():
    torch.manual_seed(0)
    module, x, y = TwoInputs(), torch.randn(7, 4), torch.randn(7, 2)
    samples = stacked(module)
    expected = one_by_one(module, samples, x, y)
    torch.testing.assert_close(predict(module, samples, (x, y), transform=None), expected)


def test_transform_makes_a_tensor_of_what_a_module_returns():
    gru, x = nn.GRU(4, 6), torch.randn(5, 7, 4)
    samples = stacked(gru)
    with pytest.raises(TypeError, match=r"got tuple. Give a transform"):
        predict(gru, samples, x, transform=None)
    assert predict(gru, samples, x, transform=lambda output: output[0]).shape == (5, 5, 7, 6)


def test_the_module_stays_as_it_was():
    module, x = made("conv")
    module[0].eval()
    state = copy.deepcopy(module.state_dict())
    modes = [part.training for part in module.modules()]
    predictions = predict(module, stacked(module), x)
    assert not predictions.requires_grad
    assert [part.training for part in module.modules()] == modes
    for name, value in module.state_dict().items():
        assert value.equal(state[name])


def test_modes_are_restored_after_an_error():
    module, _ = made("conv")
    module[0].eval()
    modes = [part.training for part in module.modules()]
    with pytest.raises(RuntimeError, match="channels"):
        predict(module, stacked(module), torch.randn(7, 3, 5, 5))
    assert [part.training for part in module.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_samples_take_the_dtype_of_the_module(dtype):
    module, x = made("linear")
    samples = {name: value.to(dtype) for name, value in stacked(module).items()}
    expected = one_by_one(module, samples, x).softmax(-1)
    torch.testing.assert_close(predict(module, samples, x), expected)


def test_outputs_of_low_precision_are_widened_before_the_softmax():
    module, x = made("linear")
    samples = stacked(module)
    with torch.autocast("cpu", torch.bfloat16):
        predictions = predict(module, samples, x)
        outputs = predict(module, samples, x, transform=None)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(predictions, outputs.float().softmax(-1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(predictions.sum(-1), torch.ones(5, 7))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_samples_move_to_the_device_of_the_module():
    module, x = made("conv")
    samples = stacked(module)
    expected = one_by_one(module, samples, x).softmax(-1)
    predictions = predict(module.cuda(), samples, x.cuda())
    torch.testing.assert_close(predictions.cpu(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda samples: {"head.weight": samples["0.weight"]}, "has no parameter or buffer head"),
        (
            lambda samples: samples | {"0.bias": torch.zeros(5, 9)},
            r"the shape \(n, 6\), got \(5, 9",
        ),
        (lambda samples: samples | {"0.bias": torch.zeros(6)}, r"the shape \(n, 6\), got \(6,\)"),
        (
            lambda samples: samples | {"0.bias": torch.zeros(4, 6)},
            "0.bias has 4 samples and 0.weig",
        ),
        (lambda samples: {name: value[:0] for name, value in samples.items()}, "at least 1"),
        (lambda samples: {}, "at least one stacked parameter"),
    ],
    ids=["unknown", "shape", "not_stacked", "number", "empty", "nothing"],
)
def test_samples_of_another_module_are_refused(change, message):
    module, x = made("linear")
    with pytest.raises(ValueError, match=message):
        predict(module, change(stacked(module)), x)


def test_chunk_size_below_1_is_refused():
    module, x = made("linear")
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        predict(module, stacked(module), x, chunk_size=0)


# --- of a posterior ------------------------------------------------------------------------------


def gaussian(module):
    layout = Layout.of_parameters(module)
    mean = torch.randn(layout.numel, generator=torch.Generator().manual_seed(0))
    components = torch.nn.functional.normalize(torch.ones(1, layout.numel))
    return LowRankGaussian(layout, mean, components, torch.ones(1), num_samples=6)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_a_posterior_predicts_with_its_samples(chunk_size):
    module, x = made("linear")
    posterior = gaussian(module)
    samples = posterior.sample(10, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    predictions = posterior.predict(module, x, 10, chunk_size=chunk_size, generator=generator)
    torch.testing.assert_close(predictions, predict(module, samples, x))


def test_a_posterior_predicts_with_as_many_samples_as_it_holds():
    module, x = made("linear")
    assert gaussian(module).predict(module, x).shape == (6, 7, 3)


def test_a_posterior_refuses_no_samples():
    module, x = made("linear")
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        gaussian(module).predict(module, x, 0)
