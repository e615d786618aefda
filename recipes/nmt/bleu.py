"""Corpus BLEU over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

ORDERS = 4  # BLEU counts n-grams of 1 to 4 tokens


class BLEU(Metric):
    """BLEU of all sentences together (Papineni et al., 2002), as sacrebleu computes it.

    Two numbers go by this name, and they differ by several points:

    - of detokenised text, which sacrebleu tokenises itself, `tokenize="13a"`: comparable between
      papers (Post, 2018, arXiv 1804.08771);
    - of text that is tokenised already, `tokenize="none"`: comparable only where the tokens are the
      same. With lower-cased text this is the one of the reversible-RNN paper.

    The states are the counts of n-grams and of tokens, so that batches and processes add up to the
    BLEU of the whole, which no mean over batches is. An order of n-grams without any match counts
    as half a match, the next one as a quarter (sacrebleu's smoothing "exp"); BLEU is 0 if nothing
    matches at all, or no hypothesis has 4 tokens.

    Args:
        tokenize: name of one of sacrebleu's tokenizers.
        lower_case: compare without regard to case.

    Raises:
        ModuleNotFoundError: without the extra `recipes`.
        ValueError: for a tokenizer that sacrebleu does not know.

    Example:
        >>> bleu = BLEU()
        >>> bleu.update(["A dog runs home.", "Yes"], ["A dog runs home.", "No"])
        >>> round(bleu.compute().item(), 2)
        95.54
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor
    totals: Tensor
    sys_len: Tensor
    ref_len: Tensor

    def __init__(self, tokenize: str = "13a", lower_case: bool = False) -> None:
        super().__init__()
        try:
            from sacrebleu.metrics import bleu
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "BLEU needs sacrebleu: pip install 'lightning-revflip[recipes]'."
            ) from error
        if tokenize not in bleu.BLEU.TOKENIZERS:
            raise ValueError(
                f"tokenize must be one of sacrebleu's {', '.join(sorted(bleu.BLEU.TOKENIZERS))}; "
                f"got {tokenize!r}."
            )
        # `force`: do not warn of tokenised text where this is meant.
        self._sacrebleu = bleu.BLEU(lower_case, force=tokenize == "none", tokenize=tokenize)
        # Integers are exact at any size, and no conversion of a model's precision touches them.
        zeros = torch.zeros(ORDERS, dtype=torch.int64)
        self.add_state("counts", zeros, dist_reduce_fx="sum")
        self.add_state("totals", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("sys_len", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("ref_len", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, hypotheses: Sequence[str], references: Sequence[str]) -> None:
        """Add a batch of sentences, each with its one reference; a sentence may be empty.

        Raises:
            TypeError: for a single string in place of a list.
            ValueError: if there are not as many references as hypotheses.
        """
        if isinstance(hypotheses, str) or isinstance(references, str):
            raise TypeError(
                "hypotheses and references must be lists of sentences, got a single string. Put it "
                "into a list."
            )
        if len(hypotheses) != len(references):
            raise ValueError(
                "Expected one reference for each hypothesis, got "
                f"{len(hypotheses)} hypotheses and {len(references)} references."
            )
        if not hypotheses:
            return
        batch = self._sacrebleu.corpus_score(hypotheses, [references])
        self.counts += torch.tensor(batch.counts, device=self.counts.device)
        self.totals += torch.tensor(batch.totals, device=self.totals.device)
        self.sys_len += batch.sys_len
        self.ref_len += batch.ref_len

    def compute(self) -> Tensor:
        """Between 0 and 100, float64, on the CPU; 0 before the first sentence."""
        score = self._sacrebleu.compute_bleu(
            self.counts.tolist(),
            self.totals.tolist(),
            int(self.sys_len),
            int(self.ref_len),
            smooth_method=self._sacrebleu.smooth_method,
        )
        return torch.tensor(score.score, dtype=torch.float64)

    @property
    def signature(self) -> str:
        """What to report beside the number: sacrebleu's version, tokenizer, case, smoothing."""
        # It names the number of references, which sacrebleu knows after a first score.
        self._sacrebleu.corpus_score([""], [[""]])
        return str(self._sacrebleu.get_signature())
