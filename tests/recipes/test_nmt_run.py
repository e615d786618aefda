"""The translation recipe from the command line: fit, validate, test, predict, go on."""

from pathlib import Path

import pytest
import torch
import yaml

from lightning_revflip.cli import main
from lightning_revflip.convert import load_from_checkpoint
from recipes.nmt.batches import Pair, collate
from recipes.nmt.module import Translator
from recipes.nmt.tokenization import Tokenizer
from recipes.nmt.vocabulary import UNKNOWN, Vocabulary
from tests.helpers.recipe_runs import config_args, last_values
from tests.recipes.small_nmt import write_text

pytestmark = pytest.mark.usefixtures("cwd")
TINY = (
    "--model.embedding_size=12",
    "--model.hidden_size=20",
    "--model.beam_size=2",
    "--model.max_length_ratio=0.01",
    "--model.max_extra_length=8",
    "--data.max_train_pairs=200",
    "--trainer.limit_val_batches=2",
    "--trainer.limit_test_batches=2",
    "--trainer.log_every_n_steps=1",
)
REVERSIBLE = ("base", "small", "lstm", "emb20h", "rev3", "csv")


def revflip(subcommand: str, *args: str, configs: tuple[str, ...] = ()) -> None:
    main([subcommand, *config_args("nmt", *configs), *args])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a short reversible run on number words, which logged to CSV."""
    folder = tmp_path_factory.mktemp("fit")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("REVFLIP_DATA", raising=False)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr("sys.argv", ["revflip"])
        patch.chdir(folder)
        revflip("fit", *TINY, "--trainer.max_epochs=2", configs=REVERSIBLE)
    return folder / "runs" / "nmt" / "version_0"


def from_run(run: Path) -> tuple[str, str]:
    """The run's own configuration and its last checkpoint."""
    return f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"


def predict(run: Path, *args: str) -> None:
    config, _ = from_run(run)
    checkpoint = f"--ckpt_path={random_checkpoint(run)}"
    revflip("predict", config, *config_args("nmt", "predict"), checkpoint, *args)


def random_checkpoint(run: Path) -> Path:
    """One with large random weights: after two epochs all lines get the same translation."""
    path = run / "random.ckpt"
    if not path.exists():
        checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        generator = torch.Generator().manual_seed(0)
        for value in checkpoint["state_dict"].values():
            value.normal_(generator=generator)
        torch.save(checkpoint, path)
    return path


# --- fit, validate, test ---------------------------------------------------------------------


def test_fit_then_validate_and_test_from_its_own_config(run, tmp_path):
    fitted = last_values(run)
    scores = ("perplexity", "bleu", "bleu_tokenized", "exact_match")
    for name in ("train/loss", "train/perplexity", "train/lr", "val/perplexity"):
        assert fitted[name] > 0
    assert {f"val/{name}" for name in scores} <= set(fitted)
    assert fitted["train/tokens_per_second"] > 0
    assert 0 < fitted["reversible/bits_per_unit_step"] <= 3
    assert fitted["memory/saved_for_backward_bytes"] > 0

    revflip("validate", *from_run(run))
    validated = last_values(tmp_path / "runs" / "nmt" / "version_0")
    for name in scores:
        assert validated[f"val/{name}"] == pytest.approx(fitted[f"val/{name}"], rel=1e-6)

    revflip("test", *from_run(run))
    tested = last_values(tmp_path / "runs" / "nmt" / "version_1")
    assert tested["test/perplexity"] > 1
    assert {f"test/{name}" for name in scores} <= set(tested)


def test_run_has_its_checkpoints_and_records_its_configuration(run):
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {
        "last.ckpt",
        f"epoch001-perplexity{last_values(run)['val/perplexity']:.2f}.ckpt",
    }
    record = yaml.safe_load((run / "hparams.yaml").read_text())
    assert record["seed_everything"] == 1111
    assert record["model"]["init_args"]["context"] == "embedding+slice:20"
    assert record["versions"]["torch"] == torch.__version__


def test_two_epochs_in_one_go_are_one_and_one_more(tmp_path):
    """Bit for bit: weights, optimizer, and the shuffling of the second epoch."""
    text = [f"--data.{name}={value}" for name, value in write_text(tmp_path).items()]
    args = [*TINY, *text, "--model.dropout=0", "--data.batch_size=8"]
    for epochs in (2, 1):
        revflip("fit", *args, f"--trainer.max_epochs={epochs}", configs=REVERSIBLE)
    runs = tmp_path / "runs" / "nmt"
    revflip("fit", *from_run(runs / "version_1"), "--trainer.max_epochs=2")
    whole, resumed = (
        torch.load(runs / f"version_{number}" / "checkpoints" / "last.ckpt", weights_only=True)
        for number in (0, 2)
    )
    assert (whole["epoch"], whole["global_step"]) == (resumed["epoch"], resumed["global_step"])
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (whole, resumed)]
    for number, state in states[0].items():
        assert torch.equal(states[1][number]["exp_avg_sq"], state["exp_avg_sq"])
    found = [last_values(runs / f"version_{number}")["val/perplexity"] for number in (0, 2)]
    assert found[0] == found[1]


def test_checkpoint_brings_the_sizes_of_the_vocabularies(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["source_vocab_size"] is None
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    words = checkpoint["ParallelText"]["source_vocabulary"]["tokens"]
    assert checkpoint["hyper_parameters"]["source_vocab_size"] == len(words)


@pytest.mark.parametrize(
    "args",
    [
        ["--model.beam_size=1"],
        ["--model.init_args.beam_size", "1"],
        ['--model.init_args={"beam_size": 1}'],
        ["--config=beam.yaml"],
    ],
)
def test_arguments_of_the_model_can_be_changed_after_training(run, tmp_path, args):
    (tmp_path / "beam.yaml").write_text("model:\n  init_args:\n    beam_size: 1\n")
    revflip("test", *from_run(run), *args)
    record = yaml.safe_load((tmp_path / "runs/nmt/version_0/config.yaml").read_text())
    assert record["model"]["init_args"]["beam_size"] == 1
    assert record["model"]["init_args"]["hidden_size"] == 20  # from the checkpoint or the run


def test_the_checkpoint_gives_what_no_configuration_names(run, tmp_path):
    configs = config_args("nmt", "base", "rev3", "csv", "plain")
    data = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]
    files = (f"--data.{name}={value}" for name, value in data.items() if value is not None)
    revflip("test", *configs, *files, f"--ckpt_path={random_checkpoint(run)}")
    record = yaml.safe_load((tmp_path / "runs/nmt/version_0/config.yaml").read_text())
    assert record["model"]["init_args"]["hidden_size"] == 20
    assert record["model"]["init_args"]["memory"] == "plain"


# --- predict ---------------------------------------------------------------------------------


def translated_alone(run: Path, line: str) -> str:
    """A line by itself, from the checkpoint: beam search, and source words for unknown ones."""
    path = random_checkpoint(run)
    model = load_from_checkpoint(Translator, path, weights_only=True).eval()
    state = torch.load(path, weights_only=True)["ParallelText"]
    source, target = (Vocabulary(**state[f"{side}_vocabulary"]) for side in ("source", "target"))
    words = Tokenizer(**state["source_tokenizer"]).tokenize(line)
    if not words:
        return ""
    batch = collate([Pair(0, source.encode(words), [])])
    (translation,) = model.translate(batch, 2)
    (weights,) = model.attention_weights(batch, [translation.tokens])
    found = target.decode(translation.tokens)
    for place, token in enumerate(translation.tokens):
        if token == UNKNOWN:
            found[place] = words[weights[place, :-1].argmax()]
    return Tokenizer(**state["target_tokenizer"]).detokenize(found)


LINES = [
    "seventy-three thousand and two",
    "",
    "one zebra",
    " \t ",
    "  Forty   TWO ",
    " ".join(["ninety-nine", "thousand,"] * 1100),
    "日本語 \u2028 🙂",
    "one",
    "",
]


@pytest.mark.parametrize(("ending", "final"), [("\n", False), ("\r\n", True), ("\r\n", False)])
def test_predict_translates_a_file_line_by_line(run, tmp_path, ending, final):
    lines = LINES if ending == "\n" else LINES[:5]
    text = ending.join([*lines, "nine"]) + (ending if final else "")
    Path("input").write_bytes(text.encode())
    args = ("--data.eval_batch_size=3", "--trainer.callbacks.path=out/put")
    predict(run, "--data.input=input", *args)
    found = Path("out/put").read_bytes().decode()
    assert found.endswith("\n")
    assert found.split("\n")[:-1] == [translated_alone(run, line) for line in [*lines, "nine"]]
    assert len({*found.split("\n")}) > len(lines) / 2


def test_predict_prints_without_a_path(run, capsys):
    Path("input").write_text("one\n\ntwo hundred\n")
    capsys.readouterr()
    predict(run, "--data.input=input")
    expected = "".join(f"{translated_alone(run, line)}\n" for line in ("one", "", "two hundred"))
    assert expected in capsys.readouterr().out


def test_an_empty_file_has_an_empty_translation(run):
    Path("input").touch()
    predict(run, "--data.input=input", "--trainer.callbacks.path=output")
    assert Path("output").read_bytes() == b""


def test_files_that_cannot_be_translated_are_named(run):
    Path("input").write_bytes(b"one\ntwo\xff\n")
    with pytest.raises(ValueError, match=r"input, line 2: byte 0xff is not UTF-8.*iconv"):
        predict(run, "--data.input=input", "--trainer.callbacks.path=output")
    with pytest.raises(FileNotFoundError, match="There is no file absent, given as input"):
        predict(run, "--data.input=absent", "--trainer.callbacks.path=output")
    with pytest.raises(ValueError, match=r"nothing to translate. Give .*--data\.input"):
        predict(run)
    assert not Path("output").exists()


def test_predict_and_test_need_no_training_text(tmp_path):
    text = write_text(tmp_path)
    args = [f"--data.{name}={value}" for name, value in text.items()]
    revflip("fit", *TINY, *args, "--trainer.max_epochs=1", configs=("base", "small", "gru", "csv"))
    run = tmp_path / "runs" / "nmt" / "version_0"
    for name in ("train_source", "train_target"):
        Path(text[name]).unlink()
    without = ["--data.train_source=null", "--data.train_target=null"]
    revflip("test", *from_run(run), *without)
    assert last_values(tmp_path / "runs" / "nmt" / "version_1")["test/perplexity"] > 1

    for path in tmp_path.glob("*.*urce"):
        path.unlink()
    Path("input").write_text("eins zwei\nZebra\n")
    predict(run, "--data.input=input", "--trainer.callbacks.path=output")
    assert Path("output").read_text().count("\n") == 2


def test_without_a_path_nothing_but_translations_is_printed(run, tmp_path, capfd):
    (tmp_path / "in.txt").write_text("one\n\ntwo hundred\n", encoding="utf-8")
    predict(run, "--data.input=in.txt", "--trainer.callbacks.path=out.txt")
    capfd.readouterr()
    predict(run, "--data.input=in.txt")
    assert capfd.readouterr().out == (tmp_path / "out.txt").read_text(encoding="utf-8")


# --- it learns -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_reversible_model_learns_number_words(tmp_path):
    revflip("fit", "--trainer.max_epochs=3", configs=REVERSIBLE)
    run = tmp_path / "runs" / "nmt" / "version_0"
    revflip("test", *from_run(run))
    found = last_values(tmp_path / "runs" / "nmt" / "version_1")
    assert found["test/exact_match"] >= 0.95
    assert found["test/perplexity"] < 1.1
