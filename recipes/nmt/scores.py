"""What is said of the translations of a split: perplexity, BLEU in two forms, exact matches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torchmetrics import MeanMetric

from recipes.common.perplexity import Perplexity
from recipes.nmt.bleu import BLEU
from recipes.nmt.tokenization import Tokenizer


class Scores(nn.Module):
    """Metrics of one split, logged under their names."""

    def __init__(self) -> None:
        super().__init__()
        self.perplexity = Perplexity()
        self.bleu = BLEU(lower_case=True)
        self.bleu_tokenized = BLEU(tokenize="none")
        self.exact_match = MeanMetric()

    def compare(
        self, found: Sequence[list[str]], references: Sequence[str], tokenizer: Tokenizer
    ) -> list[str]:
        """Count translations, given as tokens, against lines of text; perplexity is not touched.

        Returns:
            The translations as lines of text.
        """
        wanted = [tokenizer.tokenize(reference) for reference in references]
        texts = [tokenizer.detokenize(tokens) for tokens in found]
        self.bleu.update(texts, references)
        joined = ([" ".join(tokens) for tokens in side] for side in (found, wanted))
        self.bleu_tokenized.update(*joined)
        self.exact_match.update(torch.tensor([a == b for a, b in zip(found, wanted, strict=True)]))
        return texts
