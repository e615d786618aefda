"""Modules that take on another class in place, as the flipout layers do."""

import copy
import json
import warnings
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_revflip.convert import (
    ConversionSpec,
    apply_spec,
    convert,
    load_from_checkpoint,
    recorded_spec,
)
from lightning_revflip.reversible import RevGRU, RevLSTM
from tests.helpers.models import Tagger, loader, quiet_trainer


class Offset:
    """An argument that is an object: where the extra weights start."""

    def __init__(self, start: float) -> None:
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}.")
        self.start = start

    def to_config(self) -> dict:
        return {"class_path": f"{__name__}:Offset", "init_args": {"start": self.start}}


class Added:
    """Adds a trainable `weight_extra` of the same shape to `weight`."""

    unsupported: ClassVar[tuple[type[nn.Module], ...]] = (nn.Bilinear,)
    bypassed: ClassVar[tuple[type[nn.Module], ...]] = (nn.MultiheadAttention,)

    @classmethod
    def check_upgrade(cls, module: nn.Module, offset: Offset | None = None) -> None:
        if module.weight.numel() == 1:
            raise ValueError("a single weight is not enough.")

    @classmethod
    def upgrade(
        cls, module: nn.Module, *, shared: dict[nn.Parameter, dict], offset: Offset | None = None
    ) -> None:
        start = 0.0 if offset is None else offset.start
        extra = nn.Parameter(torch.full_like(module.weight, start))
        module.__class__ = cls
        module.weight_extra = shared.setdefault(module.weight, extra)

    @classmethod
    def shared_parameters(cls, module: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
        return {module.weight: module.weight_extra}


class AddedLinear(Added, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + self.weight_extra, self.bias)


class AddedEmbedding(Added, nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.embedding(x, self.weight + self.weight_extra)


class ScaledLSTM(RevLSTM):
    """A reversible layer with one more parameter."""

    @classmethod
    def check_upgrade(cls, module: nn.Module, start: float = 1.0) -> None: ...

    @classmethod
    def upgrade(cls, module: nn.Module, *, shared: dict, start: float = 1.0) -> None:
        module.__class__ = cls
        module.scale = nn.Parameter(torch.tensor(start))

    @classmethod
    def shared_parameters(cls, module: nn.Module) -> dict:
        return {}


RULES = {nn.Linear: AddedLinear, nn.Embedding: AddedEmbedding}


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def test_an_upgraded_module_is_the_same_object_with_the_same_parameters() -> None:
    net = model().double().eval()
    net[0].requires_grad_(False)
    net[2].note = "mine"
    layers, weights = list(net), list(net.parameters())
    calls = []
    net[0].register_forward_hook(lambda *_: calls.append("forward"))
    net[2].weight.register_hook(lambda grad: calls.append("gradient"))
    x = torch.randn(5, 4, dtype=torch.float64)
    before = net(x)
    convert(net, RULES)
    assert all(new is old for new, old in zip(net, layers, strict=True))
    assert all(any(old is p for p in net.parameters()) for old in weights)
    assert [type(layer) for layer in net] == [AddedLinear, nn.Tanh, AddedLinear]
    assert (net[2].note, net[2].training, net[0].weight.requires_grad) == ("mine", False, False)
    assert net[2].weight_extra.dtype is torch.float64
    calls.clear()
    after = net(x)
    after.sum().backward()
    assert torch.equal(after, before)
    assert calls == ["forward", "gradient"]


def test_a_model_that_is_itself_a_linear_layer_is_upgraded() -> None:
    layer = nn.Linear(4, 2)
    spec = convert(layer, RULES)
    assert type(layer) is AddedLinear
    assert spec.conversions[0].paths == [""]
    twin = nn.Linear(4, 2)
    apply_spec(twin, spec)
    twin.load_state_dict(layer.state_dict())
    assert recorded_spec(twin) == spec


def test_a_checkpoint_of_the_plain_model_loads() -> None:
    plain, net = model(), model()
    convert(net, RULES)
    missing, unexpected = net.load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["0.weight_extra", "2.weight_extra"], [])
    x = torch.randn(5, 4)
    assert torch.equal(net(x), plain(x))


class Tied(nn.Module):
    """A language model's table, used to read words in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight


def test_tied_weights_share_what_is_added_to_them() -> None:
    net = Tied()
    spec = convert(net, RULES)
    twin = Tied()
    apply_spec(twin, spec)
    for each in (net, twin):
        assert each.head.weight is each.embedding.weight
        assert each.head.weight_extra is each.embedding.weight_extra


@pytest.mark.parametrize("first", ["embedding", "head"])
def test_tied_weights_share_what_is_added_to_them_in_two_conversions(first: str) -> None:
    second = {"embedding": "head", "head": "embedding"}[first]
    net, twin = Tied(), Tied()
    for name in (first, second):
        module = getattr(net, name)
        kind = next(kind for kind in RULES if isinstance(module, kind))
        apply_spec(twin, convert(net, {kind: RULES[kind]}))
    assert net.head.weight_extra is net.embedding.weight_extra
    assert twin.head.weight_extra is twin.embedding.weight_extra
    assert recorded_spec(twin) == recorded_spec(net)


def test_converting_twice_changes_nothing() -> None:
    net = model()
    convert(net, RULES)
    parameters = dict(net.named_parameters())
    assert convert(net, RULES) == ConversionSpec()
    assert all(p is parameters[name] for name, p in net.named_parameters())


def test_a_refusal_of_one_module_leaves_all_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4), nn.Linear(1, 1))
    keys = list(net.state_dict())
    with pytest.raises(ValueError, match="cannot convert '2': a single weight is not enough"):
        convert(net, {**RULES, nn.GRU: RevGRU})
    with pytest.raises(ValueError, match="cannot convert '0': .* unexpected .* 'strength'"):
        convert(net, RULES, targets=["0"], strength=2)
    assert [type(layer) for layer in net] == [nn.Linear, nn.GRU, nn.Linear]
    assert list(net.state_dict()) == keys
    assert recorded_spec(net) == ConversionSpec()
    convert(net, {**RULES, nn.GRU: RevGRU}, targets=["0", "1"])
    assert [type(layer) for layer in net] == [AddedLinear, RevGRU, nn.Linear]


def test_a_parametrized_layer_is_refused() -> None:
    net = model()
    parametrize.register_parametrization(net[2], "weight", nn.Identity())
    with pytest.raises(ValueError, match="'2' is parametrized. Convert it first"):
        convert(net, RULES)
    assert type(net[0]) is nn.Linear


def test_unsupported_relatives_are_named_unless_targets_leave_them_out() -> None:
    net = nn.ModuleDict({"fine": nn.Linear(4, 4), "both": nn.Bilinear(4, 4, 2)})
    with pytest.raises(ValueError, match="'both' is a Bilinear, which AddedLinear cannot replace"):
        convert(net, RULES)
    assert type(net["fine"]) is nn.Linear
    convert(net, RULES, targets=["fine"])
    assert type(net["fine"]) is AddedLinear


def test_children_that_their_parent_does_not_call_are_left_alone_with_one_warning() -> None:
    plain = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16), num_layers=2, enable_nested_tensor=False
    )
    net = copy.deepcopy(plain)
    message = (
        "'layers.0.self_attn.out_proj', 'layers.1.self_attn.out_proj' cannot be converted: "
        "MultiheadAttention computes with the parameters of its children without calling them"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        spec = convert(net, RULES)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert [path for c in spec.conversions for path in c.paths] == [
        f"layers.{layer}.linear{i}" for layer in (0, 1) for i in (1, 2)
    ]
    twin = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_spec(twin, spec)
        convert(twin, RULES, targets=["*.linear?"])
    assert str(twin) == str(net)


@pytest.mark.parametrize("strict", [True, False])
def test_a_target_that_names_a_child_which_is_not_called_is_refused(strict: bool) -> None:
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)})
    with pytest.raises(ValueError, match="'attention.out_proj' cannot be converted: Multihead"):
        convert(net, RULES, targets=["head", "attention.out_proj"], strict=strict)
    assert type(net["head"]) is nn.Linear


def test_a_model_whose_only_layers_are_not_called_has_nothing_to_convert() -> None:
    net = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="holds no Linear or Embedding .*'0.out_proj' cannot be"):
        convert(net, RULES)
    with pytest.raises(ValueError, match=r"target '\*.out_proj' matches no Linear .*'0.out_proj'"):
        convert(net, RULES, targets=["*.out_proj"])
    with pytest.warns(UserWarning, match="'0.out_proj' cannot be converted"):
        assert convert(net, RULES, strict=False) == ConversionSpec()


def test_an_object_is_recorded_as_plain_values_and_built_again() -> None:
    net = model()
    spec = convert(net, RULES, offset=Offset(0.25))
    config = {"class_path": f"{__name__}:Offset", "init_args": {"start": 0.25}}
    assert [c.kwargs for c in spec.conversions] == 2 * [{"offset": config}]
    assert json.loads(json.dumps(spec.to_dict())) == spec.to_dict()
    twin, third = model(), model()
    apply_spec(twin, ConversionSpec.from_dict(spec.to_dict()))
    assert convert(third, RULES, offset=config) == spec == recorded_spec(twin)
    for each in (net, twin, third):
        assert torch.equal(each[2].weight_extra, torch.full((2, 3), 0.25))


def test_a_spec_with_objects_passes_a_weights_only_checkpoint(tmp_path) -> None:
    spec = convert(model(), RULES, offset=Offset(0.25))
    torch.save(spec.to_dict(), tmp_path / "spec.pt")
    loaded = torch.load(tmp_path / "spec.pt", weights_only=True)
    assert ConversionSpec.from_dict(loaded) == spec


class Described:
    """An object with a description of any form."""

    def __init__(self, config: object = None) -> None:
        self.config = config

    def to_config(self) -> object:
        return self.config


FORGETFUL = {"class_path": f"{__name__}:Described", "init_args": {}}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.float32, "offset must consist of None, numbers, .* got torch.float32 of type dtype"),
        ({"a": [object()]}, r"offset\['a'\] must consist of"),
        (Offset, "offset must consist of"),
        (Described({"start": 1}), r"Described.to_config\(\) must return .* got {'start': 1}"),
        (Described(FORGETFUL), r"Described.to_config\(\) must describe the object completely"),
        (Described({**FORGETFUL, "init_args": {"wrong": 1}}), "cannot build .*Described from"),
    ],
    ids=["dtype", "nested", "class", "form", "incomplete", "wrong"],
)
def test_an_argument_that_could_not_be_repeated_is_refused(value, message: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=message):
        convert(net, RULES, offset=value)
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize(
    ("class_path", "init_args", "message"),
    [
        ("subprocess:Popen", {"args": ["true"]}, "subprocess:Popen is not a class with to_config"),
        ("no_such_module:Offset", {}, "no_such_module has not been imported"),
        (f"{__name__}:Offset", {"start": -1.0}, "cannot build .* start must not be negative"),
    ],
    ids=["not for this", "missing", "bad argument"],
)
def test_a_recorded_object_that_cannot_be_built_is_refused(class_path, init_args, message) -> None:
    state = convert(model(), RULES, targets=["0"], offset=Offset(1.0)).to_dict()
    state["conversions"][0]["kwargs"]["offset"] = {"class_path": class_path, "init_args": init_args}
    with pytest.raises(ValueError, match=message):
        apply_spec(model(), ConversionSpec.from_dict(state))


def test_a_replacement_can_be_upgraded_and_both_are_repeated_in_order() -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.LSTM(4, 6), nn.Identity())

    net, twin = build(), build()
    first = convert(net, {nn.LSTM: RevLSTM}, max_forget_bits=2.0)
    layer = net[0]
    second = convert(net, {RevLSTM: ScaledLSTM}, start=0.5)
    assert net[0] is layer
    assert recorded_spec(net) == first + second
    apply_spec(twin, recorded_spec(net))
    assert (type(twin[0]), twin[0].max_forget_bits, twin[0].scale.item()) == (ScaledLSTM, 2.0, 0.5)
    assert recorded_spec(twin) == recorded_spec(net)
    # What the two callbacks of a Trainer do again in the next stage.
    assert convert(net, {nn.LSTM: RevLSTM}, max_forget_bits=2.0) == ConversionSpec()
    assert convert(net, {RevLSTM: ScaledLSTM}, start=0.5) == ConversionSpec()


def test_what_was_done_before_a_spec_failed_is_recorded() -> None:
    spec = convert(model(), RULES)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Identity())
    with pytest.raises(ValueError, match="expects a .*:Linear at '2', found Identity"):
        apply_spec(net, spec)
    assert recorded_spec(net) == ConversionSpec(spec.conversions[:1])
    net[2] = nn.Linear(3, 2)
    apply_spec(net, spec)
    assert recorded_spec(net) == spec


def test_a_lightning_checkpoint_of_an_upgraded_model_loads_into_the_plain_class(tmp_path) -> None:
    from lightning.pytorch import Callback

    class Upgrading(Callback):
        def setup(self, trainer, pl_module, stage) -> None:
            convert(pl_module, {nn.LSTM: RevLSTM})
            convert(pl_module, RULES, offset=Offset(0.125))
            self.spec = recorded_spec(pl_module)

        def state_dict(self) -> dict:
            return {"conversion": self.spec.to_dict()}

    net = Tagger()
    trainer = quiet_trainer(tmp_path, callbacks=[Upgrading()])
    trainer.fit(net, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_from_checkpoint(Tagger, tmp_path / "model.ckpt", weights_only=True)
    assert [type(m) for m in loaded.children()] == [AddedEmbedding, RevLSTM, AddedLinear]
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
