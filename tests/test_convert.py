"""Swapping modules of an ordinary model."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_revflip.convert import (
    ConversionSpec,
    apply_spec,
    convert,
    load_from_checkpoint,
    recorded_spec,
    spec_of_checkpoint,
)
from lightning_revflip.reversible import RevGRU, RevLSTM
from tests.helpers.models import LateTagger, Tagger, loader, quiet_trainer

RULES = {nn.GRU: RevGRU, nn.LSTM: RevLSTM}


class Model(nn.Module):
    """An encoder and a decoder that share one layer, and a stack that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(4, 6, num_layers=2, bidirectional=True, dropout=0.25)
        self.decoder = nn.ModuleDict({"shared": nn.LSTM(4, 6, batch_first=True, bias=False)})
        self.again = self.decoder["shared"]
        self.stack = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 8))


def test_every_gru_and_lstm_is_replaced_with_its_arguments_kept() -> None:
    model = Model()
    convert(model, RULES, max_forget_bits=2.5, chunk_steps=7)
    encoder, shared, last = model.encoder, model.decoder["shared"], model.stack[1]
    assert (type(encoder), type(shared), type(last)) == (RevGRU, RevLSTM, RevGRU)
    assert (encoder.num_layers, encoder.bidirectional, encoder.dropout) == (2, True, 0.25)
    assert (shared.batch_first, shared.bias, last.hidden_size) == (True, False, 8)
    assert {part.max_forget_bits for part in (encoder, shared, last)} == {2.5}
    assert {part.chunk_steps for part in (encoder, shared, last)} == {7}


def test_a_shared_module_stays_shared_and_is_converted_once() -> None:
    model = Model()
    spec = convert(model, RULES)
    assert model.again is model.decoder["shared"]
    assert [c.paths for c in spec.conversions] == [
        ["encoder"],
        ["decoder.shared", "again"],
        ["stack.1"],
    ]


def test_dtype_train_flag_and_requires_grad_are_kept() -> None:
    model = Model().double().eval()
    model.stack[1].weight_hh_l0.requires_grad_(False)
    model.encoder.train()
    convert(model, RULES)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not model.stack[1].training
    assert model.encoder.training
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["stack.1.weight_hh_l0"]


def test_the_device_is_kept() -> None:
    model = Model().to("meta")
    convert(model, RULES)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_patterns_and_types_choose_the_targets() -> None:
    by_pattern, by_type = Model(), Model()
    convert(by_pattern, RULES, targets=["stack.*", "enc*"])
    convert(by_type, RULES, targets=[nn.LSTM])
    assert [type(m) for m in (by_pattern.encoder, by_pattern.again)] == [RevGRU, nn.LSTM]
    assert [type(m) for m in by_pattern.stack] == [nn.Linear, RevGRU]
    assert [type(m) for m in (by_type.encoder, by_type.again)] == [nn.GRU, RevLSTM]


def test_converting_twice_changes_nothing() -> None:
    model = Model()
    convert(model, RULES)
    parts = dict(model.named_modules())
    assert convert(model, RULES) == ConversionSpec()
    assert dict(model.named_modules()) == parts


def test_a_factory_function_can_be_a_rule() -> None:
    model = Model()
    spec = convert(model, {nn.Linear: wide_linear}, factor=3)
    assert model.stack[0].out_features == 12
    other = Model()
    apply_spec(other, spec)
    assert other.stack[0].out_features == 12


def wide_linear(linear: nn.Linear, factor: int) -> nn.Linear:
    return nn.Linear(linear.in_features, factor * linear.out_features)


def test_a_spec_survives_json_and_rebuilds_the_same_structure() -> None:
    model = Model()
    spec = convert(model, RULES, max_forget_bits=None)
    restored = ConversionSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    twin = Model()
    apply_spec(twin, restored)
    assert restored == spec
    assert recorded_spec(twin) == recorded_spec(model) == spec
    twin.load_state_dict(model.state_dict())
    assert str(twin) == str(model)


def test_a_converted_model_can_be_copied() -> None:
    model = Model()
    convert(model, RULES)
    twin = copy.deepcopy(model)
    assert str(twin) == str(model)
    assert twin.again is twin.decoder["shared"]
    assert twin.again is not model.again


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.RNN(4, 4), r"'0\.bad' is a RNN, which Rev\w+ cannot replace"),
        (nn.GRUCell(4, 4), r"'0\.bad' is a GRUCell, which RevGRU cannot replace"),
        (nn.LSTMCell(4, 4), r"'0\.bad' is a LSTMCell, which RevLSTM cannot replace"),
        (nn.LSTM(4, 6, proj_size=2), r"cannot convert '0\.bad': RevLSTM has no projection"),
        (nn.GRU(4, 5), r"cannot convert '0\.bad': hidden_size must be .*even.*got 5"),
        (type("MyGRU", (nn.GRU,), {})(4, 4), r"'0\.bad' is a MyGRU, .* only GRU itself"),
    ],
)
def test_what_cannot_be_replaced_is_named_and_nothing_is_changed(
    part: nn.Module, message: str
) -> None:
    model = nn.Sequential(nn.ModuleDict({"bad": part}), nn.GRU(4, 4))
    with pytest.raises(ValueError, match=message):
        convert(model, RULES)
    assert type(model[1]) is nn.GRU
    convert(model, RULES, targets=["1"])
    assert type(model[1]) is RevGRU


def test_a_parametrized_or_hooked_layer_is_refused() -> None:
    parametrized = nn.Sequential(nn.GRU(4, 4))
    parametrize.register_parametrization(parametrized[0], "weight_hh_l0", nn.Identity())
    with pytest.raises(ValueError, match="'0' is parametrized. Convert it first"):
        convert(parametrized, RULES)
    hooked = nn.Sequential(nn.GRU(4, 4))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"'0' has hooks \(_forward_hooks\)"):
        convert(hooked, RULES)


def test_tied_and_frozen_layers_are_refused() -> None:
    tied = Model()
    tied.stack[1] = nn.GRU(4, 6)
    tied.stack.append(nn.GRU(6, 6))
    tied.stack[2].weight_hh_l0 = tied.stack[1].weight_hh_l0
    with pytest.raises(ValueError, match="'stack.1' shares parameters with 'stack.2'"):
        convert(tied, RULES)
    frozen = Model()
    frozen.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match="'encoder' is frozen .* would stay at random weights"):
        convert(frozen, RULES)
    watched = Model()
    watched.encoder.weight_hh_l0.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match=r"'encoder' has hooks \(_backward_hooks\)"):
        convert(watched, RULES)


def test_a_spec_is_not_applied_twice() -> None:
    model = Model()
    first = convert(model, RULES, targets=["encoder"])
    both = first + convert(model, RULES, targets=["stack.*"], max_forget_bits=1.0)
    twin = Model()
    apply_spec(twin, first)
    apply_spec(twin, both)
    assert str(twin) == str(model)
    assert recorded_spec(twin) == both


def test_a_model_that_is_itself_a_gru_is_refused() -> None:
    with pytest.raises(ValueError, match="the model itself is a GRU, .* Wrap it"):
        convert(nn.GRU(4, 4), RULES)


def test_targets_that_match_nothing_or_no_rule_are_refused() -> None:
    for target in ("dec", "stack.0"):
        message = f"target '{target}' matches no GRU or LSTM. There are: encoder, decoder.shared, "
        with pytest.raises(ValueError, match=message):
            convert(Model(), RULES, targets=["encoder", target])
    with pytest.raises(ValueError, match="targets must be a list of patterns or types, got 'enc'"):
        convert(Model(), RULES, targets="enc")


def test_a_model_without_recurrent_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Sequential holds no GRU or LSTM to convert. It holds: L"):
        convert(nn.Sequential(nn.Linear(2, 2)), RULES)


def test_a_spec_does_not_fit_another_structure() -> None:
    spec = convert(Model(), RULES)
    with pytest.raises(ValueError, match=r"expects a torch\.nn\.modules\.rnn:GRU at 'encoder', f"):
        apply_spec(nn.Sequential(nn.GRU(4, 4)), spec)


def test_a_local_replacement_cannot_be_repeated() -> None:
    spec = convert(Model(), {nn.Linear: lambda linear: nn.Linear(4, 4)})
    with pytest.raises(ValueError, match="cannot be imported; a conversion can only be repeated"):
        apply_spec(Model(), spec)


@pytest.mark.parametrize("model_class", [Tagger, LateTagger])
def test_a_checkpoint_of_a_converted_model_loads_into_the_plain_class(
    tmp_path, model_class: type[Tagger]
) -> None:
    from lightning_revflip.callbacks import ReversibleRNN

    model = model_class()
    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN(max_forget_bits=2.0)])
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = load_from_checkpoint(model_class, tmp_path / "model.ckpt")
    assert type(loaded) is model_class
    assert loaded.rnn.max_forget_bits == 2.0
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded(torch.arange(6)[None]), model(torch.arange(6)[None]))


def test_the_spec_of_a_checkpoint_has_what_all_callbacks_converted_once(tmp_path) -> None:
    from lightning_revflip.callbacks import Flipout, ReversibleRNN

    model = Tagger()
    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN(), Flipout()])
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    spec, fresh = spec_of_checkpoint(checkpoint), Tagger()
    apply_spec(fresh, spec)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert spec == recorded_spec(model)
    assert str(fresh) == str(model)
    assert spec_of_checkpoint({"state_dict": {}}) == ConversionSpec()


def test_a_checkpoint_of_the_command_line_loads(tmp_path) -> None:
    from lightning_revflip.callbacks import ReversibleRNN

    model = Tagger()
    trainer = quiet_trainer(tmp_path, callbacks=[ReversibleRNN(max_forget_bits=2.0)])
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=False)
    checkpoint["hyper_parameters"] = {  # as LightningCLI saves them in subclass mode
        "_class_path": f"{Tagger.__module__}.Tagger",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "init_args": {"rnn": "LSTM"},
    }
    torch.save(checkpoint, tmp_path / "cli.ckpt")
    own = vars(Tagger).get("on_load_checkpoint")
    loaded = load_from_checkpoint(Tagger, tmp_path / "cli.ckpt")
    assert str(loaded.rnn) == str(model.rnn)
    assert vars(Tagger).get("on_load_checkpoint") is own


def test_a_checkpoint_without_conversions_loads_as_usual(tmp_path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.fit(Tagger(), loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    assert type(load_from_checkpoint(Tagger, tmp_path / "plain.ckpt").rnn) is nn.LSTM
