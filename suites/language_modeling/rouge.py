"""ROUGE-L as the instruction-following papers take it, by the rouge-score package."""

from __future__ import annotations

from collections.abc import Sequence


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The F-measure of the longest common subsequence of stemmed words, in [0, 1]: the best over each prediction's references.

    Words are runs of letters and digits in lower case (Lin 2004, with Porter's stemmer, as MiniLLM and DistiLLM score it). A prediction
    without words scores 0. The papers print a hundred times the mean.

    Raises:
        ValueError: a prediction without a reference.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [float(scorer.score_multi(list(r), p)["rougeL"].fmeasure) for p, r in zip(predictions, references, strict=True)]
