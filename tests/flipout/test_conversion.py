"""Ordinary models become flipout models in place and keep everything that they have."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lightning_revflip.convert import ConversionSpec, apply_spec, convert
from lightning_revflip.flipout import (
    FLIPOUT_LAYERS,
    DropConnect,
    FlipoutConv1d,
    FlipoutConv2d,
    FlipoutConv3d,
    FlipoutEmbedding,
    FlipoutGRU,
    FlipoutLinear,
    FlipoutLSTM,
    Gaussian,
    PerturbedLayer,
    kl,
    sampling,
)

KINDS = {
    "linear": (lambda **kw: nn.Linear(4, 3, **kw), FlipoutLinear, (5, 4)),
    "conv1d": (lambda **kw: nn.Conv1d(4, 3, 2, **kw), FlipoutConv1d, (5, 4, 6)),
    "conv2d": (lambda **kw: nn.Conv2d(4, 3, 2, bias=False, **kw), FlipoutConv2d, (5, 4, 6, 3)),
    "conv3d": (lambda **kw: nn.Conv3d(4, 3, 2, **kw), FlipoutConv3d, (5, 4, 3, 3, 3)),
    "embedding": (lambda **kw: nn.Embedding(4, 3, **kw), FlipoutEmbedding, None),
    "lstm": (lambda **kw: nn.LSTM(4, 3, 2, bidirectional=True, **kw), FlipoutLSTM, (5, 2, 4)),
    "gru": (lambda **kw: nn.GRU(4, 3, 2, batch_first=True, **kw), FlipoutGRU, (5, 2, 4)),
}
EACH = pytest.mark.parametrize("name", KINDS)


def build(name, **kwargs):
    torch.manual_seed(0)
    make, kind, shape = KINDS[name]
    x = torch.tensor([[1, 3], [0, 1]]) if shape is None else torch.randn(shape)
    return make(**kwargs), kind, x


def first(output):
    return output[0] if isinstance(output, tuple) else output


@EACH
def test_a_layer_keeps_identity_parameters_and_mean_output(name):
    module, kind, x = build(name)
    parameters, before = dict(module.named_parameters()), first(module(x))
    spec = convert(module, FLIPOUT_LAYERS)
    assert type(module) is kind
    assert [conversion.paths for conversion in spec.conversions] == [[""]]
    for parameter_name, parameter in parameters.items():
        assert module.get_parameter(parameter_name) is parameter
    assert torch.equal(first(module.eval()(x)), before)
    assert not torch.equal(first(module.train()(x)), before)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_is_kept(name, dtype):
    module, _, x = build(name, dtype=dtype)
    convert(module, FLIPOUT_LAYERS)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    output = first(module(x.to(dtype) if x.is_floating_point() else x))
    assert output.dtype == dtype
    output.sum().backward()
    assert {parameter.grad.dtype for parameter in module.parameters()} == {dtype}


@EACH
def test_device_is_kept_also_without_memory(name):
    module, _, _ = build(name, device="meta")
    convert(module, FLIPOUT_LAYERS)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    module.to_empty(device="cpu").reset_parameters()
    for parameter_name, parameter in module.named_parameters():
        if parameter_name.endswith("rho"):
            spread = nn.functional.softplus(parameter)
            torch.testing.assert_close(spread, torch.full_like(spread, 0.05))


@EACH
def test_frozen_layers_stay_frozen(name):
    module, _, x = build(name)
    module.requires_grad_(False)
    convert(module, FLIPOUT_LAYERS)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not first(module(x)).requires_grad


@EACH
def test_plain_checkpoints_load_and_flipout_checkpoints_are_complete(name):
    plain, _, x = build(name)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1.0)
    converted, _, _ = build(name)
    convert(converted, FLIPOUT_LAYERS, perturbation=Gaussian(0.3))
    spread = {n: p.detach().clone() for n, p in converted.named_parameters() if n.endswith("rho")}
    converted.load_state_dict(plain.state_dict())
    assert torch.equal(first(converted.eval()(x)), first(plain(x)))
    for parameter_name, value in spread.items():
        assert torch.equal(converted.get_parameter(parameter_name), value)
    state = converted.state_dict()
    assert set(state) == set(plain.state_dict()) | set(spread)
    lost = dict(state)
    del lost[next(iter(plain.state_dict()))]
    with pytest.raises(RuntimeError, match="Missing key"):
        converted.load_state_dict(lost)


def test_a_checkpoint_with_some_of_the_spread_is_incomplete():
    net = nn.Sequential(nn.LSTM(3, 4, 2))
    convert(net, FLIPOUT_LAYERS)
    state = net.state_dict()
    del state["0.weight_hh_l1_rho"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0.weight_hh_l1_rho"):
        net.load_state_dict(state)


def test_loading_a_plain_checkpoint_leaves_the_users_dict_alone():
    state = nn.Linear(3, 2).state_dict()
    FlipoutLinear(3, 2).load_state_dict(state)
    assert set(state) == {"weight", "bias"}


@EACH
def test_hooks_and_optimizers_go_on(name):
    module, _, x = build(name)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    convert(module, FLIPOUT_LAYERS)
    first(module(x)).sum().backward()
    before = next(module.parameters()).detach().clone()
    optimizer.step()
    assert calls == [1]
    assert not torch.equal(next(module.parameters()), before)


class Tied(nn.Module):
    """Embedding and output layer with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, words):
        return self.out(self.embed(words))


@pytest.mark.parametrize("together", [True, False], ids=["together", "one_after_the_other"])
def test_tied_weights_share_their_spread(together):
    model = Tied()
    if together:
        convert(model, FLIPOUT_LAYERS)
    else:
        convert(model, FLIPOUT_LAYERS, targets=["embed"])
        convert(model, FLIPOUT_LAYERS, targets=["out"])
    assert len(list(model.parameters())) == 2
    assert torch.equal(kl(model), kl(model.out))
    model(torch.tensor([[1, 2]])).sum().backward()
    again = Tied()
    convert(again, FLIPOUT_LAYERS)
    again.load_state_dict(model.state_dict())
    assert again.out.weight_rho is again.embed.weight_rho


def test_tied_weights_see_one_draw_in_shared_sampling():
    model = Tied().eval()
    convert(model, FLIPOUT_LAYERS)
    with torch.no_grad(), sampling(model, "shared"):
        embedded = model.embed(torch.arange(7))
        logits = model.out(torch.eye(4))
    torch.testing.assert_close(embedded, logits.T)


def test_the_spec_repeats_the_conversion():
    torch.manual_seed(0)
    model, other = (nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 5)) for _ in "ab")
    spec = convert(
        model, FLIPOUT_LAYERS, targets=["2"], perturbation=DropConnect(), base_perturbations=4
    )
    state = pickle.loads(pickle.dumps(spec.to_dict()))
    apply_spec(other, ConversionSpec.from_dict(state))
    assert repr(other) == repr(model)
    assert type(other[0]) is nn.Conv2d
    other.load_state_dict(model.state_dict())


def test_arguments_reach_the_layers_and_unknown_ones_are_refused():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    convert(model, FLIPOUT_LAYERS, example_dim=1, base_perturbations=2)
    assert [layer.example_dim for layer in model] == [1, 1]
    assert [layer.base_perturbations for layer in model] == [2, 2]
    plain = nn.Sequential(nn.Conv1d(2, 2, 2), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="cannot convert '0'.*has no argument example_dim"):
        convert(plain, FLIPOUT_LAYERS, example_dim=1)
    assert type(plain[1]) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (parametrizations.weight_norm, "parametrized"),
        (nn.utils.weight_norm, "weight is no parameter"),
        (lambda module: prune.random_unstructured(module, "weight", 0.5), "weight is no parameter"),
    ],
    ids=["parametrized", "weight_norm", "prune"],
)
def test_weights_that_are_computed_are_refused(wrap, message):
    model = nn.Sequential(nn.Linear(3, 3), wrap(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=message):
        convert(model, FLIPOUT_LAYERS)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}], ids=str
)
def test_options_of_embeddings_that_are_not_supported_are_named(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"cannot convert '0'.*does not support {name}"):
        convert(nn.Sequential(nn.Embedding(5, 3, **option)), FLIPOUT_LAYERS)
    with pytest.raises(ValueError, match=f"does not support {name}"):
        FlipoutEmbedding(5, 3, **option)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, nn.RNN])
def test_recurrent_modules_without_a_flipout_layer_are_refused_by_name(cell):
    model = nn.ModuleDict({"linear": nn.Linear(3, 3), "cell": cell(3, 4)})
    with pytest.raises(ValueError, match=f"'cell' is a {cell.__name__}"):
        convert(model, FLIPOUT_LAYERS)
    assert type(model["linear"]) is nn.Linear
    convert(model, FLIPOUT_LAYERS, targets=["linear"])
    assert type(model["linear"]) is FlipoutLinear


def test_attention_is_named_and_left_and_the_rest_of_an_encoder_is_converted():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    with pytest.warns(UserWarning, match=r"layers.0.self_attn.out_proj.*MultiheadAttention"):
        convert(model, FLIPOUT_LAYERS)
    found = [name for name, m in model.named_modules() if isinstance(m, PerturbedLayer)]
    assert found == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    with pytest.raises(ValueError, match="computes with the parameters of its children"):
        convert(model, FLIPOUT_LAYERS, targets=["layers.0.self_attn.out_proj"])


def test_converting_twice_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), FlipoutLinear(3, 2, perturbation=DropConnect()))
    convert(model, FLIPOUT_LAYERS)
    before = copy.deepcopy(model.state_dict())
    assert not convert(model, FLIPOUT_LAYERS).conversions
    assert set(model.state_dict()) == set(before)
    assert model[1].perturbation == DropConnect()


def test_a_pretrained_embedding_can_be_built():
    table = torch.randn(5, 3)
    layer = FlipoutEmbedding.from_pretrained(table, padding_idx=1)
    assert torch.equal(layer.weight, table)
    assert not layer.weight_rho.requires_grad


@pytest.mark.parametrize(
    "relative",
    [
        nn.ConvTranspose1d(3, 3, 2),
        nn.ConvTranspose2d(3, 3, 2),
        nn.ConvTranspose3d(3, 3, 2),
        nn.Bilinear(3, 3, 2),
        nn.EmbeddingBag(5, 3),
    ],
    ids=lambda module: type(module).__name__,
)
def test_relatives_without_a_flipout_layer_are_refused_by_name(relative):
    model = nn.ModuleDict({"linear": nn.Linear(3, 3), "other": relative})
    with pytest.raises(ValueError, match=f"'other' is a {type(relative).__name__}"):
        convert(model, FLIPOUT_LAYERS)
    assert type(model["linear"]) is nn.Linear


def test_tied_weights_cannot_have_perturbations_of_different_kinds():
    model = nn.ModuleDict({"e": nn.Embedding(5, 3), "d": nn.Linear(3, 5, bias=False)})
    model["d"].weight = model["e"].weight
    convert(model, FLIPOUT_LAYERS, targets=["e"])
    with pytest.raises(ValueError, match="tied to a weight of another layer"):
        convert(model, FLIPOUT_LAYERS, targets=["d"], perturbation=DropConnect())
    assert type(model["d"]) is nn.Linear


def test_flipout_layers_tied_by_hand_need_a_tied_spread():
    model = nn.ModuleDict({"e": FlipoutEmbedding(5, 3), "d": FlipoutLinear(3, 5, bias=False)})
    model["d"].weight = model["e"].weight
    with pytest.raises(ValueError, match="tied to a weight that has another spread"):
        kl(model)
    model["d"].weight_rho = model["e"].weight_rho
    torch.testing.assert_close(kl(model), kl(model["e"]))
