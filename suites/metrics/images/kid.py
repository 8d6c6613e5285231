"""Kernel Inception Distance: MMD^2 under a cubic kernel, which unlike a Frechet distance has no bias from the number of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.suites.metrics.images.distances import checked


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def polynomial_mmd2(features: Tensor, reference: Tensor) -> float:
    """Unbiased MMD^2 (Gretton et al. 2012, lemma 6) under k(x, y) = (x . y / D + 1)^3 (Binkowski et al. 2018, section 4).

    (N, D) and (M, D), N, M >= 2. Its expectation is 0 for equal distributions, so it may be slightly negative.
    """
    x, y = features.double(), reference.double()
    within = torch.zeros((), dtype=torch.float64, device=x.device)
    for s in (x, y):
        square = _kernel(s, s)
        within += (square.sum() - square.trace()) / (len(s) * (len(s) - 1))
    return float(within - 2 * _kernel(x, y).mean())


def kid(features: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> float:
    """Mean of :func:`polynomial_mmd2` over random subsets drawn without replacement; around 0 where the distributions are equal.

    Args:
        features: (N, D) of the samples, N >= subset_size.
        reference: (M, D) of real data, M >= subset_size.
        subsets: how many pairs of subsets; 100 in common use.
        subset_size: samples of each, >= 2; 1000 in common use.
        seed: the same subsets at every call; for each subset the reference is drawn first.

    Raises:
        UserError: there are fewer than ``subset_size`` (or 2) on a side, or features are not finite.
    """
    least = max(subset_size, 2)
    x, y = checked(features, "features", least=least), checked(reference, "reference features", least=least)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        from_reference = torch.randperm(len(y), generator=generator)[:subset_size]
        from_samples = torch.randperm(len(x), generator=generator)[:subset_size]
        values.append(polynomial_mmd2(x[from_samples.to(x.device)], y[from_reference.to(y.device)]))
    return sum(values) / len(values)
