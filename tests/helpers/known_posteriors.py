"""Posteriors that are known exactly, and the laws to which chains of a step size converge.

The loss L is a mean over the examples, N their number, T the temperature and p the precision of a
normal prior, so that the posterior is exp(-U / T) with U = N L + p/2 |theta|^2. All in float64.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# --- linear regression ----------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearRegression:
    """y = x theta + N(0, 1) with the prior N(0, 1 / prior_precision), and batches of its data.

    Attributes:
        x: inputs, shape (N, d).
        y: outputs, shape (N,).
        batches: indices of examples, shape (batches, batch_size); each example equally often.
        prior_precision: of the prior.
    """

    x: Tensor
    y: Tensor
    batches: Tensor
    prior_precision: float

    @classmethod
    def generate(
        cls,
        num_data: int,
        prior_precision: float = 0.0,
        *,
        batch_size: int | None = None,
        spectrum: Iterable[float] = (1.0, 1.5, 2.0),
        seed: int = 0,
    ) -> "LinearRegression":
        """Data whose loss has the same Hessian, of this spectrum, whatever the number of examples.

        Without `batch_size` all the data are one batch, else there are 200 of this size or more:
        whole partitions of the data.
        """
        generator = torch.Generator().manual_seed(seed)
        scales = torch.tensor(list(spectrum), dtype=torch.float64)
        d = len(scales)
        normal = torch.randn(num_data, d, dtype=torch.float64, generator=generator)
        white = torch.linalg.qr(normal).Q * num_data**0.5
        turn = torch.linalg.qr(torch.ones(d, d, dtype=torch.float64).tril()).Q
        x = white @ scales.sqrt().diag() @ turn
        truth = torch.linspace(-1, 1, d, dtype=torch.float64)
        y = x @ truth + torch.randn(num_data, dtype=torch.float64, generator=generator)
        batches = torch.arange(num_data)[None]
        if batch_size is not None:
            partitions = max(1, 200 * batch_size // num_data)
            orders = [torch.randperm(num_data, generator=generator) for _ in range(partitions)]
            batches = torch.cat(orders).view(-1, batch_size)
        return cls(x, y, batches, prior_precision)

    @property
    def num_data(self) -> int:
        return len(self.x)

    @cached_property
    def hessians(self) -> Tensor:
        """Of the mean loss (y - x theta)^2 / 2 of each batch, shape (batches, d, d)."""
        x = self.x[self.batches]
        return x.mT @ x / x.shape[1]

    @cached_property
    def slopes(self) -> Tensor:
        """Minus the gradient of the same at theta = 0, shape (batches, d)."""
        x = self.x[self.batches]
        return (x * self.y[self.batches][..., None]).mean(1)

    @property
    def curvature(self) -> Tensor:
        """Hessian of U/N."""
        eye = torch.eye(self.hessians.shape[-1], dtype=torch.float64)
        return self.hessians.mean(0) + self.prior_precision / self.num_data * eye

    @property
    def mean(self) -> Tensor:
        """Mean of the posterior, at every temperature."""
        return torch.linalg.solve(self.curvature, self.slopes.mean(0))

    def covariance(self, temperature: float = 1.0) -> Tensor:
        """Covariance of the posterior."""
        return temperature / self.num_data * torch.linalg.inv(self.curvature)

    def gradient(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        """Gradient of the mean loss of one batch for each row of `theta`, drawn anew for each."""
        if len(self.hessians) == 1:
            return theta @ self.hessians[0] - self.slopes[0]
        batch = torch.randint(len(self.hessians), (len(theta),), generator=generator)
        return (self.hessians[batch] @ theta[..., None]).squeeze(-1) - self.slopes[batch]

    def gradient_noise(self, second_moment: Tensor) -> Tensor:
        """Covariance of a batch's gradient around that of all the data.

        Args:
            second_moment: E (theta - mean)(theta - mean)^T, where E theta = mean; shape (d, d).
        """
        errors = self.hessians - self.hessians.mean(0)
        at_mean = errors @ self.mean - (self.slopes - self.slopes.mean(0))
        around = (errors @ second_moment @ errors).mean(0)
        return around + at_mean.mT @ at_mean / len(at_mean)


def stationary_covariance(
    problem: LinearRegression,
    sampler: str,
    lr: float,
    *,
    temperature: float = 1.0,
    friction: float = 0.1,
    preconditioner: Tensor | None = None,
) -> Tensor:
    """Covariance of theta to which a chain of this step size converges, shape (d, d).

    The step is linear: z' = F z + J e + xi, with z the distance from the posterior mean (and the
    velocity), e the error of the batch's gradient, and xi of covariance Q. Hence
    S = F S F^T + J E[e e^T] J^T + Q, where E[e e^T] depends linearly on S.

    Args:
        preconditioner: the diagonal of G for "psgld", shape (d,), taken as constant.
    """
    P = problem.curvature
    d = len(P)
    eye = torch.eye(d, dtype=torch.float64)
    heat = lr * temperature / problem.num_data
    if sampler == "sghmc":
        c = 1 - friction
        kick = torch.cat([torch.cat([eye, 0 * eye], 1), torch.cat([-lr * P, eye], 1)])
        move = torch.cat([torch.cat([eye, eye / 2], 1), torch.cat([0 * eye, eye], 1)])
        damp = torch.block_diag(eye, c * eye)
        F = move @ damp @ move @ kick
        J = (move @ damp @ move)[:, d:] * -lr
        Q = move @ torch.block_diag(0 * eye, (1 - c**2) * heat * eye) @ move.T
    else:
        G = eye if preconditioner is None else preconditioner.double().diag()
        F, J, Q = eye - lr / 2 * G @ P, -lr / 2 * G, heat * G

    def step(S: Tensor) -> Tensor:
        return F @ S @ F.T + J @ problem.gradient_noise(S[:d, :d]) @ J.T + Q

    return solve_affine(step, len(F))[:d, :d]


def solve_affine(step: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The fixed point S = step(S) of an affine map of matrices, shape (size, size)."""
    constant = step(torch.zeros(size, size, dtype=torch.float64))
    basis = torch.eye(size**2, dtype=torch.float64).view(-1, size, size)
    linear = torch.stack([(step(unit) - constant).flatten() for unit in basis], dim=1)
    eye = torch.eye(size**2, dtype=torch.float64)
    return torch.linalg.solve(eye - linear, constant.flatten()).view(size, size)


# --- chains beside each other ---------------------------------------------------------------------


def run_chains(
    optimizer: torch.optim.Optimizer,
    theta: Tensor,
    gradient: Callable[[Tensor], Tensor],
    *,
    burn_in: int,
    samples: int,
    every: int,
) -> Tensor:
    """Samples of many chains, each a row of one parameter, shape (samples, chains, d).

    Args:
        theta: the parameter, shape (chains, d).
        gradient: from `theta` to the gradient of each chain's own mean loss, the same shape.
    """
    kept = []
    for step in range(1, burn_in + samples * every + 1):
        with torch.no_grad():
            theta.grad = gradient(theta.detach())
        optimizer.step()
        if step > burn_in and (step - burn_in) % every == 0:
            kept.append(theta.detach().clone())
    return torch.stack(kept)


@dataclass(frozen=True)
class Agreement:
    """How far samples are from a law, with standard errors from the spread between chains.

    Attributes:
        mean: largest distance of a coordinate's mean, in standard deviations of the law.
        mean_error: largest standard error of the same.
        covariance: Frobenius distance of the covariance, over the norm of the law's.
        covariance_error: standard error of the same.
    """

    mean: float
    mean_error: float
    covariance: float
    covariance_error: float

    def within(self, mean: float, covariance: float) -> bool:
        """Whether both distances are in these limits, which must be three standard errors wide."""
        assert self.mean_error < mean / 3, f"too few samples for the mean: {self}"
        assert self.covariance_error < covariance / 3, f"too few samples for the covariance: {self}"
        return self.mean < mean and self.covariance < covariance


def agreement(samples: Tensor, mean: Tensor, covariance: Tensor) -> Agreement:
    """Samples of independent chains, shape (samples, chains, d), against a law's two moments.

    The covariance is taken around the mean of the law.
    """
    away = samples.double() - mean
    scale = covariance.diagonal().sqrt()
    means = away.mean(0) / scale
    squares = torch.einsum("tci,tcj->cij", away, away) / len(away)
    chains = len(means)
    norm = float(covariance.norm())
    return Agreement(
        float(means.mean(0).abs().max()),
        float(means.std(0).max()) / chains**0.5,
        float((squares.mean(0) - covariance).norm()) / norm,
        float(squares.var(0).sum().sqrt()) / chains**0.5 / norm,
    )


# --- logistic regression --------------------------------------------------------------------------


@dataclass(frozen=True)
class LogisticRegression:
    """Two classes, labels in {0, 1}, two weights and the prior N(0, 1 / prior_precision)."""

    x: Tensor
    y: Tensor
    prior_precision: float

    @classmethod
    def generate(cls, num_data: int, prior_precision: float, seed: int = 0) -> "LogisticRegression":
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_data, 2, dtype=torch.float64, generator=generator)
        x[:, 1] = 0.6 * x[:, 0] + 0.8 * x[:, 1]
        chance = torch.sigmoid(x @ torch.tensor([1.5, -1.0], dtype=torch.float64))
        y = torch.bernoulli(chance, generator=generator)
        return cls(x, y, prior_precision)

    def gradient(self, theta: Tensor, batch: Tensor | None = None) -> Tensor:
        """Gradient of each row's mean loss, over its own row of indices `batch` or all the data."""
        if batch is None:
            return (torch.sigmoid(theta @ self.x.T) - self.y) @ self.x / len(self.x)
        x = self.x[batch]
        logits = (x @ theta[..., None]).squeeze(-1)
        errors = torch.sigmoid(logits) - self.y[batch]
        return (errors[:, None] @ x).squeeze(1) / batch.shape[1]

    def potential(self, theta: Tensor) -> Tensor:
        """U, shape (points,), of points of shape (points, 2)."""
        logits = theta @ self.x.T
        losses = torch.nn.functional.softplus(logits) - self.y * logits
        return losses.sum(1) + self.prior_precision / 2 * theta.square().sum(1)


def moments_on_grid(
    potential: Callable[[Tensor], Tensor], low: float, high: float, points: int
) -> tuple[Tensor, Tensor]:
    """Mean (2,) and covariance (2, 2) of the density exp(-potential) by quadrature on a square."""
    axis = torch.linspace(low, high, points, dtype=torch.float64)
    theta = torch.cartesian_prod(axis, axis)
    weight = torch.softmax(-potential(theta), dim=0)
    mean = weight @ theta
    away = theta - mean
    return mean, away.T @ (weight[:, None] * away)
