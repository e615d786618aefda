"""`ActiveLearning`: rounds that start anew, label what was asked for, and go on after a kill."""

import json

import pytest
import torch

from lightning_revflip.applications import ActiveLearning, Pool
from lightning_revflip.posterior import predictive_entropy

SIZE = 60


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes of points in the plane, around the corners of a triangle."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(SIZE) % 3
    centres = torch.tensor([[0.0, 0], [3, 0], [0, 3]])
    return centres[labels] + torch.randn(SIZE, 2, generator=generator), labels


class NearestCentres:
    """Classifies by the distance to the mean of each class, several times with other noise."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int]] = []

    def __call__(self, inputs, labels, seed):
        self.calls.append((labels.tolist(), seed))
        centres = torch.stack([inputs[labels == label].mean(0) for label in range(3)])
        noise = torch.randn(8, 3, 2, generator=torch.Generator().manual_seed(seed))
        return lambda x: (-torch.cdist(x.expand(8, -1, -1), centres + 0.3 * noise)).softmax(-1)


def learner(train=None, **settings) -> ActiveLearning:
    inputs, labels = examples()
    settings = {
        "labels_per_round": 4,
        "evaluate": {"all": (inputs, labels)},
        "batch_size": 7,
        "seed": 5,
        **settings,
    }
    return ActiveLearning(
        train or NearestCentres(), inputs, labels, Pool(SIZE, [0, 1, 2]), **settings
    )


@pytest.mark.parametrize("acquisition", ["random", "entropy", "bald", "variation_ratio"])
def test_each_round_trains_on_all_labels_so_far_and_labels_some_more(acquisition):
    train = NearestCentres()
    learning = learner(train, acquisition=acquisition, num_candidates=20)
    rounds = learning.run(5)
    order = learning.pool.labelled.tolist()
    assert [each.num_labelled for each in rounds] == [3, 7, 11, 15, 19]
    assert order == [0, 1, 2, *(example for each in rounds for example in each.acquired)]
    assert len(set(order)) == 23
    known = [(torch.tensor(order[:size]) % 3).tolist() for size in (3, 7, 11, 15, 19)]
    assert [labels for labels, _ in train.calls] == known
    assert len({seed for _, seed in train.calls}) == 5


def test_labels_the_candidates_with_the_highest_score():
    learning = learner(acquisition="entropy")
    predictions = []

    def remembering(inputs, labels, seed):
        predictions.append(NearestCentres()(inputs, labels, seed))
        return predictions[-1]

    learning.train = remembering
    inputs, _ = examples()
    before = learning.pool.unlabelled
    acquired = learning.step().acquired
    scores = predictive_entropy(predictions[0](inputs[before]))
    assert acquired == before[scores.argsort(descending=True)[:4]].tolist()


def test_candidates_limit_what_can_be_picked():
    seen = []

    def first(probs, count, generator):
        seen.append(probs.shape)
        return torch.arange(count)

    learner(acquisition=first, num_candidates=9).run(2)
    assert seen == [(8, 9, 3), (8, 9, 3)]


def test_accuracy_is_that_of_the_mean_prediction():
    inputs, labels = examples()

    def train(*_):
        votes = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.9, 0.1]])  # the mean says class 1
        return lambda x: votes.unsqueeze(1).expand(2, len(x), 3)

    evaluate = {"all": (inputs, labels), "some": (inputs[:4], labels[:4])}
    found = learner(train, evaluate=evaluate).step().accuracy
    assert found == {"all": pytest.approx(1 / 3), "some": pytest.approx(1 / 4)}


@pytest.mark.parametrize("acquisition", ["random", "bald", "batch_bald"])
def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path, acquisition):
    settings = {"acquisition": acquisition, "num_candidates": 15}
    whole = learner(**settings).run(6)
    path = tmp_path / "runs" / "state.json"

    class KilledError(Exception):
        pass

    def killed(inputs, labels, seed):
        if len(labels) == 15:
            raise KilledError
        return NearestCentres()(inputs, labels, seed)

    with pytest.raises(KilledError):
        learner(killed, path=path, **settings).run(6)
    train = NearestCentres()
    resumed = learner(train, path=path, **settings)
    assert len(resumed.rounds) == 3
    assert resumed.run(6) == whole
    assert len(train.calls) == 3
    assert learner(path=path, **settings).run(6) == whole


@pytest.mark.parametrize(("acquisition", "trainings"), [("random", 2), ("entropy", 5)])
def test_measures_the_first_of_every_few_rounds(acquisition, trainings):
    train = NearestCentres()
    sparse = learner(train, acquisition=acquisition, evaluate_every=3).run(5)
    every = learner(acquisition=acquisition).run(5)
    assert [bool(each.accuracy) for each in sparse] == [True, False, False, True, False]
    assert [each.acquired for each in sparse] == [each.acquired for each in every]
    assert sparse[0] == every[0]
    assert sparse[3] == every[3]
    assert len(train.calls) == trainings


def test_reports_new_rounds():
    learning, seen = learner(), []
    learning.run(1)
    learning.run(3, report=seen.append)
    assert seen == learning.rounds[1:]


def test_seeds_give_other_rounds():
    rounds = [learner(acquisition="random", seed=seed).run(2) for seed in (0, 0, 1)]
    assert rounds[0] == rounds[1] != rounds[2]


# --- errors ----------------------------------------------------------------------------------


def test_a_pool_that_will_run_out_is_reported_before_anything_is_trained():
    train = NearestCentres()
    learning = learner(train)
    with pytest.raises(ValueError, match=r"runs out: 60 .* of 60 only 57 are not labelled"):
        learning.run(15)
    assert not train.calls
    assert len(learning.run(14)) == 14  # to the last example but one
    with pytest.raises(ValueError, match="only 1 are not labelled yet"):
        learning.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"acquisition": "best"}, "must be one of random, entropy, bald, .*, got 'best'"),
        ({"labels_per_round": 0}, "labels_per_round must be at least 1"),
        ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_candidates": 3}, "4 labels a round cannot be picked from num_candidates=3"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        learner(**settings)


def test_an_acquisition_function_must_pick_as_many_as_it_is_asked_for():
    learning = learner(acquisition=lambda probs, count, generator: torch.arange(count - 1))
    with pytest.raises(ValueError, match="must pick 4 candidates, got 3"):
        learning.step()
    assert len(learning.pool.labelled) == 3


def test_examples_must_fit_the_pool():
    inputs, labels = examples()
    with pytest.raises(ValueError, match="60 inputs and 60 labels for a pool of 50"):
        ActiveLearning(NearestCentres(), inputs, labels, Pool(50, [0]))
    with pytest.raises(ValueError, match="no label to start with"):
        ActiveLearning(NearestCentres(), inputs, labels, Pool(SIZE))


def test_a_state_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "state.json"
    learner(path=path).run(2)
    with pytest.raises(ValueError, match="a run with seed=5, but now it is 6"):
        learner(path=path, seed=6)
    with pytest.raises(ValueError, match="acquisition=bald, but now it is random"):
        learner(path=path, acquisition="random")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 1}', "half"])
def test_a_damaged_state_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "state.json"
    learner(path=path).run(1)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2] if content == "half" else content)
    before = path.read_text()
    with pytest.raises(ValueError, match="is damaged, or not the state of active learning"):
        learner(path=path)
    assert path.read_text() == before


def test_a_state_of_a_later_version_is_refused(tmp_path):
    path = tmp_path / "state.json"
    learner(path=path).run(1)
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}))
    with pytest.raises(ValueError, match="has version 9, expected 1"):
        learner(path=path)
