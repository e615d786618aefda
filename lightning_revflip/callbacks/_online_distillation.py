"""Distillation of a chain's last samples, while the chain goes on: plain torch, without Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from lightning_revflip.apd import (
    Codec,
    DistilledPosterior,
    IdentityCodec,
    ParameterCodec,
    moment_errors,
    random_batches,
    sliced_wasserstein,
)
from lightning_revflip.flipout.noise import derive
from lightning_revflip.modules.apd import APDModule
from lightning_revflip.posterior import Layout

_BUILD, _TRAIN, _COMPARE, _SAMPLE = range(4)
"""What random numbers are for."""


class SampleBuffer:
    """The last samples, first in, first out.

    Args:
        layout: names and shapes of the parameters of a sample.
        size: number of samples that it holds.
    """

    def __init__(self, layout: Layout, size: int) -> None:
        self.layout = layout
        self.seen = 0
        """Number of samples that came in."""
        self._rows = torch.empty(size, layout.numel)

    def __len__(self) -> int:
        return min(self.seen, len(self._rows))

    @property
    def full(self) -> bool:
        """Whether the next sample replaces one."""
        return self.seen >= len(self._rows)

    @property
    def rows(self) -> Tensor:
        """The samples, in no order, shape (len, P), float32."""
        return self._rows[: len(self)]

    def add(self, rows: Tensor) -> None:
        """Take in samples, shape (k, P)."""
        for row in rows:
            self._rows[self.seen % len(self._rows)] = row
            self.seen += 1

    def chunks(self, size: int) -> Iterator[Tensor]:
        """The samples, at most `size` at a time."""
        yield from torch.split(self.rows, size)

    def state_dict(self) -> dict[str, Any]:
        """The samples, and how many there were."""
        return {"layout": self.layout.to_json(), "seen": self.seen, "rows": self.rows.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises a ValueError for samples of another architecture, and another size."""
        self.layout.check(Layout.from_json(state_dict["layout"]), "the model of the checkpoint")
        size, rows = len(self._rows), state_dict["rows"]
        if len(rows) != min(state_dict["seen"], size):
            raise ValueError(
                f"the checkpoint has a buffer of {len(rows)} samples, which does not fit into "
                f"buffer_size={size}. Resume with the buffer_size of before."
            )
        self.seen = state_dict["seen"]
        self.rows.copy_(rows)


class OnlineDistillation:
    """A generator that follows the samples in a buffer.

    All random numbers follow from `seed` and the number of samples seen, and none is torch's global
    generator's, so that a chain is the same whether it is distilled or not.

    Args:
        module: has the settings; networks are built into it.
        buffer: has the samples.
        rank: of the codec; None: codes are the weights themselves.
        batch_size: codes of a step of the critic.
        seed: of all random numbers.
    """

    def __init__(
        self,
        module: APDModule,
        buffer: SampleBuffer,
        rank: int | None,
        batch_size: int,
        seed: int,
    ) -> None:
        self.module = module
        self.buffer = buffer
        self.rank = rank
        self.batch_size = batch_size
        self.seed = seed
        self.fitted_at: int | None = None
        """Number of samples seen when the codec was fitted last; None: it was not."""
        self._optimizers: tuple[torch.optim.Adam, torch.optim.Adam] | None = None

    def fit(self) -> None:
        """Fit the codec to the buffer. Codes mean something else then: all networks begin anew."""
        if self.rank is None:
            self._build(IdentityCodec.fit(self.buffer))
        else:
            self._build(ParameterCodec.fit(self.buffer, self.rank))
        self.fitted_at = self.buffer.seen

    def _build(self, codec: Codec) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, self.buffer.seen, _BUILD))
            self.module.build(codec)
        networks = self.module.networks
        self._optimizers = networks.optimizers(self.module.lr, self.module.betas)

    def train(self, steps: int) -> dict[str, float]:
        """Train on the samples in the buffer.

        Returns:
            What the last step found, and distances of generated codes from those of the buffer.
        """
        assert self._optimizers is not None
        module, random = self.module, self._random(_TRAIN)
        codes = module.codec.encode(self.buffer.rows)
        batches = random_batches(codes, self.batch_size, random)
        found: dict[str, Tensor] = {}
        with torch.enable_grad():
            for _ in range(steps):
                few = islice(batches, module.critic_steps)
                found = module.networks.step(few, *self._optimizers, random)
        found |= self._distances(codes)
        return {name: float(value) for name, value in found.items()}

    @torch.no_grad()
    def _distances(self, codes: Tensor) -> dict[str, Tensor]:
        random = self._random(_COMPARE)
        generator = self.module.networks.averaged
        generated = generator(generator.draw_latents(len(codes), random))
        mean_error, covariance_error = moment_errors(generated, codes)
        return {
            "sliced_wasserstein": sliced_wasserstein(generated, codes, generator=random),
            "mean_error": mean_error,
            "covariance_error": covariance_error,
        }

    def posterior(self) -> DistilledPosterior:
        """What has been learnt so far; a copy."""
        return self.module.posterior()

    def sample(self, n: int) -> Tensor:
        """Generated networks, shape (n, P)."""
        posterior = self.posterior()
        samples = posterior.sample(n, self._random(_SAMPLE))
        return torch.cat([samples[name].flatten(1) for name in posterior.layout.names], dim=1)

    def _random(self, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive(self.seed, self.buffer.seen, purpose))

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Buffer, codec, networks and optimizers: plain values and tensors."""
        state: dict[str, Any] = {"buffer": self.buffer.state_dict(), "fitted_at": self.fitted_at}
        if self._optimizers is not None:
            codec = self.module.codec
            state["codec"] = {"settings": codec.settings(), "tensors": codec.to_tensors()}
            state["networks"] = self.module.networks.state_dict()
            state["optimizers"] = [each.state_dict() for each in self._optimizers]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; raises a ValueError for a state of another architecture."""
        self.buffer.load_state_dict(state_dict["buffer"])
        self.fitted_at = state_dict["fitted_at"]
        if self.fitted_at is None:
            return
        self._build(Codec.from_tensors(**state_dict["codec"]))
        self.module.networks.load_state_dict(state_dict["networks"])
        assert self._optimizers is not None
        for optimizer, state in zip(self._optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
