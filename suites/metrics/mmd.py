"""Maximum mean discrepancy between two samples, under a fixed mixture of Gaussian kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mixture_kernel(a: Tensor, b: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """k(a, b) = mean over h of exp(-|a - b|^2 / (2 h^2)).   (N, d), (M, d) -> (N, M), in [0, 1]."""
    squared = ((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T).clamp_(min=0)
    total = torch.zeros_like(squared)
    for h in bandwidths:
        total += torch.exp(squared / (-2 * h**2))
    return total / len(bandwidths)


def mmd2(samples: Tensor, reference: Tensor, *, bandwidths: Sequence[float]) -> float:
    """Unbiased MMD^2 (Gretton et al. 2012, lemma 6).   (N, d) and (M, d), N, M >= 2; at most 2, may be slightly negative.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j), computed in float64. Its expectation is 0
    exactly where both distributions are the same. Bandwidths decide what it sees: one near the finest scale that matters has to be there.
    """
    x, y = samples.double().flatten(1), reference.double().flatten(1)
    n, m = len(x), len(y)
    # k(a, a) = 1, so the diagonal of each square adds exactly its length.
    within = sum((float(mixture_kernel(s, s, bandwidths).sum()) - count) / (count * (count - 1)) for s, count in ((x, n), (y, m)))
    return within - 2 * float(mixture_kernel(x, y, bandwidths).mean())
