"""Small sample banks with known values."""

import contextlib
import json

import torch

from lightning_revflip.posterior.layout import Layout
from lightning_revflip.posterior.policies import make_policy
from lightning_revflip.posterior.writer import ChainWriter

LAYOUT = Layout(("weight", "bias"), ((3, 2), (3,)))


def row(serial, chain=0):
    """Parameters of a sample: small whole numbers, which every dtype of storage holds exactly."""
    return (torch.arange(9) + serial + 100 * chain).remainder(251).float()


def rows(serials, chain=0):
    """Shape (k, 9), also for no samples."""
    return torch.cat([torch.empty(0, 9), *(row(serial, chain)[None] for serial in serials)])


def make_writer(path, **settings):
    return ChainWriter(path, LAYOUT, **{"max_samples": None, "shard_samples": 4, **settings})


def append(writer, count):
    """Offer some samples; the training step of each is ten times its serial number."""
    for _ in range(count):
        writer.append(10 * writer.seen, row(writer.seen, writer.chain))


def fill(path, count, **settings):
    """A closed chain to which some samples were offered."""
    with make_writer(path, **settings) as writer:
        append(writer, count)
    return path


def serials(bank, chain=0):
    """Serial numbers of the samples of a chain."""
    return [step // 10 for step in bank.steps[chain]]


def files(path, chain=0):
    """Names of the files of a chain, and those that its manifest names."""
    folder = path / f"chain-{chain:04d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    there = {file.name for file in folder.iterdir()}
    return there, {"manifest.json", "lock", *(shard["file"] for shard in manifest["shards"])}


def held(name, max_samples, offered, seed=0):
    """What a policy holds after so many samples, one decision after the other."""
    policy, kept = make_policy(name, max_samples, seed), []
    for serial in range(offered):
        decision = policy.decide(serial)
        policy.accept(serial)
        for leaving in decision.leaving:
            kept.remove(leaving)
        if decision.kept:
            kept.append(serial)
    return kept


@contextlib.contextmanager
def full_disk(monkeypatch):
    """Every write of a file ends in the middle, as on a full disk."""

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_revflip.posterior.files.os.fsync", no_space)
        yield
