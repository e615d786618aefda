"""Words that the target vocabulary lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recipes.nmt.batches import Batch, select
from recipes.nmt.vocabulary import UNKNOWN

if TYPE_CHECKING:
    from recipes.nmt.module import Translator


def copy_unknown(
    model: Translator,
    batch: Batch,
    translations: Sequence[Sequence[int]],
    words: Sequence[list[str]],
    sources: Sequence[Sequence[str]],
) -> None:
    """Put the source word that was attended to most in the place of each unknown word.

    (Luong et al., 2015, arXiv 1410.8206, copy words in this manner.) Names and numbers, which are
    most often unknown, are the same in both languages.

    Args:
        model: the translator.
        batch: what it translated.
        translations: the numbers of the target tokens of each sentence.
        words: these tokens; unknown ones are replaced in place.
        sources: the source tokens of each sentence.
    """
    wanted = [i for i, tokens in enumerate(translations) if UNKNOWN in tokens and sources[i]]
    if not wanted:
        return
    weights = model.attention_weights(select(batch, wanted), [translations[i] for i in wanted])
    for sentence, seen in zip(wanted, weights, strict=True):
        closest = seen[:, : len(sources[sentence])].argmax(1).tolist()
        for place, token in enumerate(translations[sentence]):
            if token == UNKNOWN:
                words[sentence][place] = sources[sentence][closest[place]]
