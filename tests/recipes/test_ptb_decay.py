"""The learning-rate rule of the PTB recipe."""

import pytest
import torch

from recipes.ptb.decay import NonMonotonicDecay


def test_rate_is_divided_when_a_result_is_worse_than_the_best_of_all_but_the_last_ones():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=16.0)
    decay = NonMonotonicDecay(optimizer, divide_by=4, patience=2)
    # Each result is compared with the best but for the two before it, if there are so many.
    for result, best, rate in [
        (5.0, None, 16),
        (4.0, None, 16),
        (3.0, None, 16),
        (5.0, 5.0, 16),  # not worse
        (6.0, 4.0, 4),
        (3.5, 3.0, 1),  # an improvement on the last ones is not enough
        (3.0, 3.0, 1),
        (4.0, 3.0, 0.25),
        (2.0, 3.0, 0.25),
    ]:
        assert min(decay.results[:-2], default=None) == best
        decay.step(result)
        assert optimizer.param_groups[0]["lr"] == rate


def test_decay_goes_on_from_its_saved_state():
    results = [5, 4, 3, 5, 6, 3.5, 3, 4, 2]

    def rate_after(restart_at: int) -> float:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=16.0)
        decay = NonMonotonicDecay(optimizer, divide_by=4, patience=2)
        for number, result in enumerate(results):
            if number == restart_at:
                saved, decay = decay.state_dict(), NonMonotonicDecay(optimizer, 4, 2)
                decay.load_state_dict(saved)
            decay.step(torch.tensor(result))
        return optimizer.param_groups[0]["lr"]

    assert [rate_after(at) for at in range(len(results))] == [0.25] * len(results)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"divide_by": 1.0}, "above 1"), ({"patience": -1}, "0 or more validations, got -1")],
)
def test_decay_rejects_what_cannot_work(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NonMonotonicDecay(torch.optim.SGD([torch.zeros(1)], lr=1.0), **kwargs)
