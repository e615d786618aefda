"""`revflip doctor`: what is broken is a problem, what is only missing is a note."""

import importlib.metadata
import sys

import pytest
import torch

from lightning_revflip.cli import diagnosis, doctor, main, selftest
from lightning_revflip.cli.diagnosis import Finding
from lightning_revflip.reversible import RevGRU, RevLSTM

CPU = torch.device("cpu")


@pytest.fixture
def findings(monkeypatch):
    """What a check finds, by subject, for a user without data and without a login."""
    for name in ("REVFLIP_DATA", "REVFLIP_NATIVE", "WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)

    def run(check) -> dict[str, Finding]:
        return {each.subject: each for each in check()}

    return run


@pytest.fixture
def empty_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_doctor_reports_every_section_and_succeeds(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as exit:
        main(["doctor"])
    text = capsys.readouterr().out
    assert exit.value.code == 0, text
    for told in ("Packages", "torch", "C compiler", "Weights & Biases", "Penn Treebank", "RevLSTM"):
        assert told in text
    assert "No problem was found." in text


def test_doctor_fails_if_the_self_test_does(capsys, monkeypatch):
    def broken(device: torch.device) -> str:
        raise selftest.SelfTestError("gradients differ")

    monkeypatch.setitem(selftest.CHECKS, "RevGRU", broken)
    with pytest.raises(SystemExit) as exit:
        main(["doctor"])
    assert exit.value.code == 1
    assert "SelfTestError: gradients differ" in " ".join(capsys.readouterr().out.split())


def test_check_that_breaks_off_is_a_problem_and_no_traceback():
    def check():
        yield Finding("ok", "first", "fine")
        raise ModuleNotFoundError("No module named 'packaging'")

    first, second = doctor._complete(check)
    assert first.status == "ok"
    assert second.status == "problem"
    assert "packaging" in second.found


@pytest.mark.parametrize(
    ("name", "needed", "status"),
    [
        ("torch", ">=2.4", "ok"),
        ("torch", ">=2000", "problem"),
        ("no-such-package", ">=1", "problem"),
    ],
)
def test_required_package_below_its_floor_or_missing_is_a_problem(name, needed, status):
    finding = diagnosis.check_requirement(name, needed)
    assert finding.status == status
    assert (f"pip install '{name}{needed}'" in finding.found) == (status == "problem")


def test_missing_wandb_is_a_note(monkeypatch, findings):
    version = importlib.metadata.version

    def without_wandb(name: str) -> str:
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", without_wandb)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(diagnosis, "find_spec", lambda name: None)
    assert findings(diagnosis.check_packages)["wandb"].status == "note"
    assert findings(diagnosis.check_wandb)["wandb"].status == "note"


def test_native_code_without_a_compiler_is_a_note_that_says_why(findings, monkeypatch, empty_home):
    monkeypatch.setenv("CC", "no-such-compiler")
    found = findings(diagnosis.check_native)
    monkeypatch.undo()
    assert all(each.status == "ok" for each in findings(diagnosis.check_native).values())
    assert {each.status for each in found.values()} == {"note"}
    assert all("no-such-compiler" in each.found for each in found.values())


def test_a_compiler_that_does_not_work_is_a_note(findings, monkeypatch):
    monkeypatch.setenv("CC", "false")
    assert findings(diagnosis.check_machine)["C compiler"].status == "note"


def test_native_code_that_is_switched_off_is_a_note(findings, monkeypatch):
    monkeypatch.setenv("REVFLIP_NATIVE", "0")
    found = findings(diagnosis.check_native)
    monkeypatch.delenv("REVFLIP_NATIVE")
    findings(diagnosis.check_native)  # which loads it again, for other tests
    assert all("REVFLIP_NATIVE=0" in each.found for each in found.values())


def test_login_is_found_without_telling_what_it_is(findings, empty_home, monkeypatch):
    assert findings(diagnosis.check_wandb)["login"].status == "note"
    (empty_home / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    found = findings(diagnosis.check_wandb)
    assert found["login"].status == "ok"
    assert "secret" not in str(found)
    (empty_home / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = findings(diagnosis.check_wandb)
    assert found["login"].status == "ok"
    assert "secret" not in str(found)


def test_data_that_is_not_there_is_a_note(findings, empty_home):
    found = findings(diagnosis.check_data)
    names = ("Penn Treebank", "Multi30k", "MNIST", "notMNIST", "Omniglot", "REVFLIP_DATA")
    assert {name: found[name].status for name in names} == dict.fromkeys(names, "note")


def test_data_that_the_recipe_would_refuse_is_a_problem(findings, empty_home, monkeypatch):
    for split in ("train", "valid", "test"):
        file = empty_home / "ptb" / f"ptb.{split}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("not the published text")
    monkeypatch.setenv("REVFLIP_DATA", str(empty_home))
    found = findings(diagnosis.check_data)
    assert found["Penn Treebank"].status == "problem"
    assert "ptb.train.txt is not the published" in found["Penn Treebank"].found
    monkeypatch.setenv("REVFLIP_DATA", str(empty_home / "no_such_folder"))
    assert findings(diagnosis.check_data)["REVFLIP_DATA"].status == "problem"


@pytest.mark.parametrize("kind", [RevGRU, RevLSTM])
def test_self_test_notices_wrong_gradients(kind, monkeypatch):
    torch.manual_seed(0)
    assert "undone bit for bit" in selftest.check_reversal(kind, CPU)
    plain_pass = selftest.plain_pass
    monkeypatch.setattr(selftest, "plain_pass", lambda *args: 1.02 * plain_pass(*args))
    with pytest.raises(selftest.SelfTestError, match="gradients differ"):
        selftest.check_reversal(kind, CPU)


def test_self_test_notices_a_wrong_spread(monkeypatch):
    torch.manual_seed(0)
    assert selftest.check_flipout(CPU)
    assert selftest.check_sampler(CPU)
    half = selftest.Gaussian(init_std=0.07)
    monkeypatch.setattr(selftest, "Gaussian", lambda init_std: half)
    with pytest.raises(selftest.SelfTestError, match="variance"):
        selftest.check_flipout(CPU)
    sampler = selftest.SGLD
    monkeypatch.setattr(
        selftest, "SGLD", lambda params, **settings: sampler(params, temperature=0.5, **settings)
    )
    with pytest.raises(selftest.SelfTestError, match="variance"):
        selftest.check_sampler(CPU)


def test_self_test_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    assert all(each.status == "ok" for each in doctor.self_test())
    assert torch.rand(1) == expected
