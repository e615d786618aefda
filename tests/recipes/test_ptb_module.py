"""The language model of the PTB recipe: dropout, schedule, carried state, metrics, resume."""

import ast
import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

import recipes
from lightning_revflip.callbacks import ReversibleRNN
from lightning_revflip.reversible import RevGRU, RevLSTM
from recipes.ptb.data import PennTreebank, Prompt
from recipes.ptb.module import LanguageModel
from recipes.ptb.streams import IGNORED, Window
from tests.recipes.random_text import VOCABULARY, RandomText, quiet_trainer

NO_DROPOUT = dict.fromkeys(
    ["output_dropout", "hidden_dropout", "input_dropout", "embedding_dropout", "weight_drop"], 0.0
)


def small_model(**kwargs) -> LanguageModel:
    defaults = {"vocab_size": VOCABULARY, "embedding_size": 8, "hidden_sizes": [8], "lr": 1.0}
    return LanguageModel(**{**defaults, **NO_DROPOUT, **kwargs})


# --- learning rate ---------------------------------------------------------------------------


class OneWindow(LightningDataModule):
    """A single window with a given scale of the learning rate."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        inputs, targets = torch.randint(VOCABULARY, (2, 5, 3))
        self.window = Window(inputs, targets, True, scale)

    def train_dataloader(self):
        return DataLoader([self.window], batch_size=None)


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_step_follows_the_length_of_the_window(tmp_path, scale):
    torch.manual_seed(0)
    model = small_model(lr=3.0, clip_norm=1e9, weight_decay=0.0)
    data = OneWindow(scale)
    before = copy.deepcopy(model)
    logits, _ = before(data.window.inputs)
    F.cross_entropy(logits.flatten(0, 1), data.window.targets.flatten()).backward()

    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(model, data)
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(new, old - 3.0 * scale * old.grad)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 3.0


@pytest.mark.parametrize(("trainer_norm", "expected"), [(None, 0.1), (0.02, 0.02)])
def test_gradient_is_clipped_by_the_model_unless_the_trainer_says_otherwise(
    tmp_path, trainer_norm, expected
):
    torch.manual_seed(0)
    model = small_model(lr=1.0, clip_norm=0.1, weight_decay=0.0)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    quiet_trainer(tmp_path, max_steps=1, gradient_clip_val=trainer_norm).fit(model, OneWindow(1.0))
    moved = nn.utils.parameters_to_vector(model.parameters()) - before
    assert moved.norm().item() == pytest.approx(expected, rel=1e-3)


def test_nothing_is_dropped_in_evaluation():
    model = LanguageModel(VOCABULARY, embedding_size=8, hidden_sizes=[8]).eval()
    inputs = torch.randint(VOCABULARY, (5, 2))
    assert torch.equal(model(inputs)[0], model(inputs)[0])


# --- state and metrics -----------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_state_carried_over_windows_reads_the_text_as_one(cell):
    model = small_model(cell=cell, hidden_sizes=[12, 8]).eval()
    inputs = torch.randint(VOCABULARY, (12, 3))
    whole, _ = model(inputs)
    first, states = model(inputs[:5])
    second, _ = model(inputs[5:], states)
    torch.testing.assert_close(torch.cat([first, second]), whole)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_perplexity_is_that_of_a_direct_count_over_all_tokens(tmp_path, batch):
    torch.manual_seed(0)
    model = small_model().eval()
    nn.init.normal_(model.embedding.weight)  # far from uniform, so that windows differ
    data = RandomText(batch=batch)
    result = quiet_trainer(tmp_path).validate(model, data, verbose=False)[0]["val/perplexity"]

    with torch.no_grad():
        log_probs = model.double()(data.streams.inputs)[0].log_softmax(-1)
    total = count = 0.0
    for step, row in enumerate(data.streams.targets.tolist()):
        for column, target in enumerate(row):
            if target != IGNORED:
                total -= log_probs[step, column, target].item()
                count += 1
    assert count == 240
    assert result == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)


def test_validation_does_not_disturb_the_training_state(tmp_path):
    def weights_after_training(**kwargs) -> torch.Tensor:
        torch.manual_seed(0)
        model = small_model()
        quiet_trainer(tmp_path, max_epochs=1, **kwargs).fit(model, RandomText())
        return nn.utils.parameters_to_vector(model.parameters())

    often = weights_after_training(val_check_interval=2)
    assert torch.equal(often, weights_after_training(limit_val_batches=0))


class States(Callback):
    """Records whether training windows begin with a state of zeros."""

    def __init__(self) -> None:
        self.fresh: list[bool] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        hook = lambda _, args: self.fresh.append(args[1] is None)  # noqa: E731
        self._handle = pl_module.rnns[0].register_forward_pre_hook(hook)

    def on_train_batch_end(self, *args):
        self._handle.remove()


def test_state_is_reset_where_a_stream_starts(tmp_path):
    states = States()
    trainer = quiet_trainer(tmp_path, max_epochs=2, limit_train_batches=3, callbacks=[states])
    trainer.fit(small_model(), RandomText())
    assert states.fresh == [True, False, False] * 2


# --- resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, cell):
    """From within an epoch and from its end, before and after the learning rate has fallen."""

    def run(callbacks, ckpt_path=None):
        seed_everything(0, verbose=False)
        model = small_model(cell=cell, lr=20.0, clip_norm=1.0, patience=0)
        trainer = quiet_trainer(
            tmp_path, max_epochs=4, callbacks=callbacks, enable_checkpointing=bool(callbacks)
        )
        trainer.fit(model, RandomText(), ckpt_path=ckpt_path, weights_only=True)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        return nn.utils.parameters_to_vector(model.parameters()), rate

    every_step = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    every_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    weights, rate = run([every_step, every_epoch])
    assert rate < 20.0
    for name in ["step=2", "step=8", "step=16", "epoch=0", "epoch=1", "epoch=2"]:
        resumed_weights, resumed_rate = run([], tmp_path / f"{name}.ckpt")
        assert torch.equal(resumed_weights, weights), name
        assert resumed_rate == rate, name


def test_checkpoint_alone_restores_a_model_whose_vocabulary_the_data_gave(tmp_path):
    data = PennTreebank(source="embedded")
    model = small_model(vocab_size=None)
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=1)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = LanguageModel.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert restored.hparams["vocab_size"] == len(data.vocabulary)
    assert torch.equal(restored.embedding.weight, model.embedding.weight)
    assert restored.softmax.weight is restored.embedding.weight


# --- prediction ------------------------------------------------------------------------------


def test_greedy_continuation_takes_the_likeliest_token_after_the_whole_text():
    torch.manual_seed(0)
    model = small_model().eval()
    nn.init.normal_(model.embedding.weight)
    prompt = torch.randint(VOCABULARY, (4, 1))
    with torch.no_grad():
        tokens, log_probs = model.predict_step(Prompt(prompt, 6, 0.0), 0)
        text = prompt[:, 0]
        for _ in range(6):
            logits, _ = model(text[:, None])
            text = torch.cat([text, logits[-1, 0].argmax()[None]])
        expected = model(text[:, None])[0][:-1, 0].log_softmax(-1)
    assert torch.equal(tokens, text)
    torch.testing.assert_close(log_probs, expected.gather(1, text[1:, None])[:, 0])


def test_sampling_follows_the_temperature():
    torch.manual_seed(0)
    model = small_model().eval()
    nn.init.normal_(model.embedding.weight)
    prompt = torch.tensor([[3]])
    with torch.no_grad():
        probs = (model(prompt)[0][0, 0] / 2.0).softmax(0)
        drawn = [model.predict_step(Prompt(prompt, 1, 2.0), 0).tokens[-1] for _ in range(2000)]
    shares = torch.bincount(torch.stack(drawn), minlength=VOCABULARY) / 2000
    torch.testing.assert_close(shares, probs, atol=0.04, rtol=0)


# --- reversibility, which the model knows nothing of -----------------------------------------


@pytest.mark.parametrize(("cell", "swapped"), [("lstm", RevLSTM), ("gru", RevGRU)])
def test_callback_makes_the_model_reversible_with_all_its_dropout(tmp_path, cell, swapped):
    model = LanguageModel(VOCABULARY, cell, 8, [12, 8], lr=1.0)
    before = copy.deepcopy(model.state_dict())
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[ReversibleRNN()]).fit(model, RandomText())
    assert all(type(rnn) is swapped for rnn in model.rnns)
    assert {name.split(".")[-1] for name in before if "rnns" in name} == {
        name.split(".")[-1] for name in model.state_dict() if "rnns" in name
    }
    assert all(p.isfinite().all() for p in model.parameters())


def test_model_names_no_reversible_layer():
    """Nor a callback: `ReversibleRNN` alone makes it reversible."""
    folder = Path(recipes.__path__[0])
    taken = set()
    for file in ["ptb/module.py", "ptb/dropout.py", "ptb/decay.py", "common/perplexity.py"]:
        for node in ast.walk(ast.parse((folder / file).read_text())):
            names = {alias.name for alias in getattr(node, "names", [])}
            module = getattr(node, "module", None) or ""
            if module.startswith("lightning_revflip"):
                assert module == "lightning_revflip.reversible"
                taken |= names
            assert not any(name.startswith("lightning_revflip") for name in names)
    assert taken == {"LinearCrossEntropy", "LockedDropout", "SequenceNoise"}


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden_sizes": [8, 9]}, r"must be embedding_size \(8\).*got \[8, 9\]"),
        ({"hidden_sizes": []}, "must be embedding_size"),
        ({"cell": "rnn"}, "'lstm' or 'gru', got 'rnn'"),
        ({"weight_drop": 1.0}, "weight_drop must be at least 0 and below 1"),
        ({"memory": "little"}, "'plain' or 'sequence', got 'little'"),
        ({"memory": "sequence", "chunk_steps": 0}, "at least 1, or None to choose.*got 0"),
        ({"chunk_steps": 8}, "needs memory='sequence'; got 8 with memory='plain'"),
    ],
)
def test_arguments_that_do_not_fit_are_rejected(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small_model(**kwargs)


def test_unknown_vocabulary_is_explained(tmp_path):
    with pytest.raises(RuntimeError, match="vocab_size"):
        small_model(vocab_size=None)(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="data module has no `vocabulary`"):
        quiet_trainer(tmp_path, max_steps=1).fit(small_model(vocab_size=None), RandomText())
