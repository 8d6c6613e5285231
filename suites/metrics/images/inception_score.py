"""Inception Score, from class probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.errors import UserError
from distillbench.suites.metrics.images.distances import checked


def inception_score(probabilities: Tensor, *, splits: int = 10) -> float:
    """exp of the mean KL(p(y|x) || p(y)), averaged over splits (Salimans et al. 2016, section 4); in [1, C].

    1 where every image gets the same distribution, C where each is certain and all classes are equally frequent. p(y) is the mean over the
    split. Splits are consecutive, as in the first implementation, so samples in the order of their classes have to be shuffled.

    Args:
        probabilities: (N, C), rows sum to 1.
        splits: number of parts, as even as ``torch.tensor_split`` makes them; 10 in the paper.

    Raises:
        UserError: rows are no probabilities, or a split would have fewer than 2 samples.
    """
    p = checked(probabilities, "class probabilities", least=2 * splits).double()
    if bool((p < 0).any()) or not torch.allclose(p.sum(1), torch.ones_like(p[:, 0]), atol=1e-4):
        raise UserError("the Inception Score takes class probabilities: rows of at least 0 that sum to 1 (a softmax, not logits)")
    scores = []
    for part in p.tensor_split(splits):
        marginal = part.mean(0)
        # xlogy is 0 at 0, which a certain classifier reaches.
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(1)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())
