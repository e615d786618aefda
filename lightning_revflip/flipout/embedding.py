"""`FlipoutEmbedding`: nn.Embedding with perturbed weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_revflip.flipout.draw import Draw
from lightning_revflip.flipout.layer import Estimator, PerturbedLayer
from lightning_revflip.flipout.noise import hashed_signs
from lightning_revflip.flipout.perturbation_sample import sample
from lightning_revflip.flipout.perturbations import Perturbation


class FlipoutEmbedding(PerturbedLayer, nn.Embedding):
    """An embedding whose weights are perturbed independently for each example.

    A word has the same perturbed embedding wherever it occurs in an example. Noise is drawn for the
    words that occur only. The row of `padding_idx` is not perturbed; `kl` counts it as any other.

    Args:
        num_embeddings: as for nn.Embedding.
        embedding_dim: as for nn.Embedding.
        padding_idx: as for nn.Embedding.
        max_norm: only None; present because nn.Embedding has it.
        norm_type: of `max_norm`.
        scale_grad_by_freq: only False, likewise.
        sparse: only False, likewise.
        device: of the parameters.
        dtype: of the parameters.
        perturbation: how weights are perturbed; by default `Gaussian()`.
        estimator: `flipout` or `shared`.
        base_perturbations: how many independent dW a batch gets.
        example_dim: which dimension of the input counts examples; 1 for (steps, batch).

    Raises:
        ValueError: for settings that do not fit together or are not supported.

    Examples:
        >>> layer = FlipoutEmbedding(100, 16)
        >>> layer(torch.randint(100, (8, 20))).shape
        torch.Size([8, 20, 16])
    """

    unsupported = (nn.EmbeddingBag,)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        perturbation: Perturbation | None = None,
        estimator: Estimator = "flipout",
        base_perturbations: int = 1,
        example_dim: int = 0,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        _check_supported(self)
        self._configure(example_dim)
        self._perturb(perturbation, estimator, base_perturbations)

    @classmethod
    def check_upgrade(cls, module: nn.Module, **arguments: Any) -> None:
        """Raise a ValueError if `upgrade` could not be called; changes nothing."""
        super().check_upgrade(module, **arguments)
        assert isinstance(module, nn.Embedding)
        _check_supported(module)

    def _configure(self, example_dim: int = 0) -> None:
        self.example_dim = example_dim

    def forward(self, input: Tensor) -> Tensor:
        """Embeddings (..., embedding_dim) of int64 indices (...); a scalar is one example."""
        draws = self.draws()
        if draws is None:
            return super().forward(input)
        draw = draws["weight"]
        if not draw.signed:
            return F.embedding(input, self.weight + self._delta(draw), self.padding_idx)
        if input.dim() == 0:
            return self._perturbed(input.view(1), draw)[0]
        if not -input.dim() <= self.example_dim < input.dim():
            raise ValueError(
                f"example_dim={self.example_dim} is no dimension of an input of shape "
                f"{tuple(input.shape)}. Use example_dim=0 if examples come first."
            )
        dim = self.example_dim % input.dim()
        return self._perturbed(input.movedim(dim, 0), draw).movedim(0, dim)

    def _perturbed(self, words: Tensor, draw: Draw) -> Tensor:
        """Embeddings of (examples, ...)."""
        output = F.embedding(words, self.weight, self.padding_idx)
        examples, ones = len(words), [1] * (words.dim() - 1)
        s = self._word_signs(words, draw).to(output.dtype).unsqueeze(-1)
        r = draw.output_signs(examples, self.embedding_dim, output)
        assert r is not None
        parts = [
            self._delta_of(words[group], draw, number).to(output.dtype)
            for number, group in enumerate(draw.groups(examples))
        ]
        return output + torch.cat(parts) * s * r.view(examples, *ones, self.embedding_dim)

    def _word_signs(self, words: Tensor, draw: Draw) -> Tensor:
        """s_n in the rows of some words, (examples, ...)."""
        if draw.seed is None:
            every = draw.input_signs(len(words), self.num_embeddings, self.weight)
            assert every is not None
            return every.gather(1, words.unsqueeze(-1).flatten(1)).view(words.shape)
        examples = torch.arange(len(words), device=words.device)
        return hashed_signs(draw.seed, examples.view(-1, *[1] * (words.dim() - 1)), words)

    def _delta(self, draw: Draw) -> Tensor:
        """The dW of the whole table."""
        seed = draw.weight_seed(0)
        delta = sample(self.perturbation, seed, self.weight, self.spread("weight"))
        if self.padding_idx is None:
            return delta
        rows = torch.arange(self.num_embeddings, device=delta.device)
        return delta * (rows != self.padding_idx).unsqueeze(1)

    def _delta_of(self, words: Tensor, draw: Draw, group: int) -> Tensor:
        """The dW of a group in the rows of some words, (..., embedding_dim)."""
        if draw.seed is None:
            return F.embedding(words, self._delta(draw))
        rows, places = torch.unique(words, return_inverse=True)
        mean, spread = self.weight[rows], [part[rows] for part in self.spread("weight")]
        delta = sample(self.perturbation, draw.weight_seed(group), mean, spread)
        if self.padding_idx is not None:
            delta = delta * (rows != self.padding_idx).unsqueeze(1)
        return F.embedding(places, delta)

    def extra_repr(self) -> str:
        """The arguments that are not usual."""
        text = super().extra_repr()
        return text if self.example_dim == 0 else f"{text}, example_dim={self.example_dim}"


def _check_supported(embedding: nn.Embedding) -> None:
    options = {
        "max_norm": embedding.max_norm is not None,
        "scale_grad_by_freq": embedding.scale_grad_by_freq,
        "sparse": embedding.sparse,
    }
    found = [name for name, is_set in options.items() if is_set]
    if found:
        raise ValueError(
            f"FlipoutEmbedding does not support {' and '.join(found)}. Build the embedding without."
        )
