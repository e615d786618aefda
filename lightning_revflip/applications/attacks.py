"""Attacks by the gradient: FGSM and PGD, on one network or on the mean of several.

The loss is the negative log of the mean probability of the label over all networks of a predictor:
an attack on an ensemble knows all of its members.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_revflip.applications.predictors import Predictor, check_predictor

Norm = Literal["linf", "l2"]
Range = tuple[float, float]

_TINY = torch.finfo(torch.float32).tiny
"""Keeps a division by the norm of a zero from being one by 0."""


class Attack(Protocol):
    """What `under_attack` calls: `fgsm`, or a `functools.partial` of `pgd` with other settings."""

    def __call__(
        self, predictor: Predictor, inputs: Tensor, labels: Tensor, epsilon: float, /
    ) -> Tensor:
        """Inputs at a distance of at most epsilon that the predictor takes for something else."""


def fgsm(
    predictor: Predictor,
    inputs: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    norm: Norm = "linf",
    data_range: Range = (0.0, 1.0),
    targeted: bool = False,
) -> Tensor:
    """The fast gradient sign method: one step of the full size.

    x' = clip(x + epsilon sign(grad_x loss(x, y)))      (Goodfellow et al., 2015, arXiv 1412.6572)

    In the L2 norm the step is along the gradient itself, divided by its norm.

    Args:
        predictor: the networks to attack.
        inputs: x, floating point, shape (batch, ...).
        labels: y, int64, shape (batch,): the true classes; the wanted ones if `targeted`.
        epsilon: size of the step, from 0 to the width of `data_range`.
        norm: in which the step has this size: the largest change of an element, or the Euclidean
            norm of the change.
        data_range: smallest and largest value of an element of the inputs.
        targeted: go towards the labels instead of away from them.

    Returns:
        x', in the shape of the inputs and within `data_range`.

    Raises:
        ValueError: for an epsilon or inputs outside of the data range, and a gradient that is not
            finite.
        TypeError: for what is no predictor.
    """
    check_predictor(predictor, "predictor")
    _check_inputs(inputs, epsilon, norm, data_range)
    direction = _direction(predictor, inputs, labels, norm, targeted)
    return (inputs + epsilon * direction).clamp(*data_range)


def pgd(
    predictor: Predictor,
    inputs: Tensor,
    labels: Tensor,
    epsilon: float,
    *,
    steps: int = 40,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    norm: Norm = "linf",
    data_range: Range = (0.0, 1.0),
    targeted: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent: many small steps, each back into the ball around the input.

    x' <- clip(project(x' + step_size sign(grad_x' loss(x', y))))    (Madry et al., 2018, arXiv
    1706.06083)

    Of several restarts the one that misleads the networks is taken for each input, that of the
    largest loss if several or none do.

    Args:
        predictor: the networks to attack.
        inputs: x, floating point, shape (batch, ...).
        labels: y, int64, shape (batch,): the true classes; the wanted ones if `targeted`.
        epsilon: radius of the ball, from 0 to the width of `data_range`.
        steps: how many.
        step_size: of each; None: 2.5 epsilon / steps, enough to cross the ball.
        restarts: how often to try.
        random_start: from a point of the ball that is drawn uniformly, instead of from x.
        norm: of the ball and the steps, see `fgsm`.
        data_range: smallest and largest value of an element of the inputs.
        targeted: go towards the labels instead of away from them.
        generator: to draw starts from; None: torch's global one.

    Returns:
        x', in the shape of the inputs, in the ball and within `data_range`.

    Raises:
        ValueError: for an epsilon or inputs outside of the data range, sizes that make no sense,
            and a gradient that is not finite.
        TypeError: for what is no predictor.
    """
    check_predictor(predictor, "predictor")
    _check_inputs(inputs, epsilon, norm, data_range)
    for name, value in {"steps": steps, "restarts": restarts}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if restarts > 1 and not random_start:
        raise ValueError(
            f"restarts need random_start, as they would all be the same; got {restarts}."
        )
    size = 2.5 * epsilon / steps if step_size is None else step_size
    if size < 0:
        raise ValueError(f"step_size must not be negative, got {step_size}.")
    best = None
    for _ in range(restarts):
        point = inputs
        if random_start:
            start = _draw(inputs, epsilon, norm, generator)
            point = (inputs + start).clamp(*data_range)
        for _ in range(steps):
            point = point + size * _direction(predictor, point, labels, norm, targeted)
            change = _project(point - inputs, epsilon, norm)
            point = (inputs + change).clamp(*data_range)
        best = point if best is None else _better(predictor, best, point, labels, targeted)
    assert best is not None
    return best


def _check_inputs(inputs: Tensor, epsilon: float, norm: Norm, data_range: Range) -> None:
    low, high = data_range
    if not low < high:
        raise ValueError(f"data_range must be (smallest, largest), got {data_range}.")
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm must be 'linf' or 'l2', got {norm!r}.")
    width = high - low
    if norm == "l2" and inputs.dim() > 1:
        width *= inputs[0].numel() ** 0.5 if len(inputs) else 1.0
    if not 0 <= epsilon <= width:
        raise ValueError(
            f"epsilon must be from 0 to {width:g}, the widest that inputs from {low:g} to {high:g} "
            f"can be changed in this norm, got {epsilon}. It has the unit of the inputs: give "
            "data_range if they are not from 0 to 1."
        )
    if not inputs.is_floating_point():
        raise ValueError(f"inputs must be floating-point numbers, got {inputs.dtype}.")
    if not ((inputs >= low) & (inputs <= high)).all():
        raise ValueError(
            f"inputs must be from {low:g} to {high:g}, the data_range, got {inputs.min():g} to "
            f"{inputs.max():g}. Give the range of your data, or scale them to this one."
        )


def _direction(
    predictor: Predictor, inputs: Tensor, labels: Tensor, norm: Norm, targeted: bool
) -> Tensor:
    """A step of size 1 in the norm that makes the loss larger, for a target smaller."""
    _, gradient = predictor.log_likelihood(inputs, labels)
    if not gradient.isfinite().all():
        raise ValueError("the gradient of the loss is not finite: has the model diverged?")
    if not targeted:
        gradient = -gradient
    if norm == "linf":
        return gradient.sign()
    # Gradients of confident networks are so small that their squares would be 0.
    largest = gradient.abs().flatten(1).amax(1).clamp(min=_TINY)
    return _unit(gradient / largest.view(-1, *[1] * (gradient.dim() - 1)))


def _unit(values: Tensor) -> Tensor:
    """Each example divided by its norm, unless that is 0."""
    return values / _norms(values).clamp(min=_TINY)


def _project(change: Tensor, epsilon: float, norm: Norm) -> Tensor:
    """The nearest change in the ball."""
    if norm == "linf":
        return change.clamp(-epsilon, epsilon)
    return change * (epsilon / _norms(change).clamp(min=_TINY)).clamp(max=1)


def _draw(inputs: Tensor, epsilon: float, norm: Norm, generator: torch.Generator | None) -> Tensor:
    """A change that is uniform in the ball."""
    device = inputs.device if generator is None else generator.device
    change = torch.empty(inputs.shape, dtype=inputs.dtype, device=device)
    if norm == "linf":
        return change.uniform_(-epsilon, epsilon, generator=generator).to(inputs.device)
    change.normal_(generator=generator)
    radius = torch.rand(len(change), generator=generator, device=device, dtype=change.dtype)
    radius = radius.pow(1 / max(1, change[0].numel())).view(-1, *[1] * (change.dim() - 1))
    return (_unit(change) * radius * epsilon).to(inputs.device)


def _norms(values: Tensor) -> Tensor:
    """Euclidean norms of the examples, in a shape that divides them."""
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return norms.view(-1, *[1] * (values.dim() - 1))


def _better(
    predictor: Predictor, first: Tensor, second: Tensor, labels: Tensor, targeted: bool
) -> Tensor:
    """For each input the more successful of two attacks."""
    (hit, loss), (other_hit, other_loss) = (
        _success(predictor, point, labels, targeted) for point in (first, second)
    )
    replace = (other_hit & ~hit) | ((other_hit == hit) & (other_loss > loss))
    return torch.where(replace.view(-1, *[1] * (first.dim() - 1)), second, first)


def _success(
    predictor: Predictor, inputs: Tensor, labels: Tensor, targeted: bool
) -> tuple[Tensor, Tensor]:
    """Whether an attack has reached its aim, and its loss."""
    log_likelihood, _ = predictor.log_likelihood(inputs, labels)
    chosen = predictor(inputs).mean(0).argmax(-1)
    if targeted:
        return chosen == labels, log_likelihood
    return chosen != labels, -log_likelihood
