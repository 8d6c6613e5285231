"""Whether a generator repeats its training set, told by nearest neighbours with held-out data as the yardstick."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distillbench.errors import UserError
from distillbench.suites.metrics.images.distances import TILE, checked, nearest


@dataclass(frozen=True)
class Memorisation:
    """How near samples lie to the training set, next to how near held-out data lie to it.

    Attributes:
        copied_fraction: fraction of samples at most as far from their nearest training example as the nearest ``quantile`` of the
            held-out data are; about ``quantile`` for a generator that does not copy, 1 for a copied training set.
        closer_fraction: probability that a random sample is nearer to the training set than a random held-out example, ties half;
            0.5 for a generator that does not copy, 1 for a copied training set, below 0.5 for one that is off the data.
        distance_ratio: median nearest distance of samples over that of held-out data; 1 is fair, 0 a copy.
    """

    copied_fraction: float
    closer_fraction: float
    distance_ratio: float


def memorisation(samples: Tensor, train: Tensor, held_out: Tensor, *, quantile: float = 0.01, tile: int = TILE) -> Memorisation:
    """Compare nearest distances to the training set from samples and from held-out data (after Meehan et al. 2020).

    Their statistic is the rank statistic behind ``closer_fraction``. The distance is Euclidean in whatever the rows are: pixels
    find exact copies, features also near ones.

    Args:
        samples: (N, D).
        train: (M, D), what the generator and its teacher saw.
        held_out: (K, D) of the same distribution as ``train`` and unseen, K >= 1 / quantile so that the quantile exists.
        quantile: in (0, 1), the fraction of held-out data that would be called copied.
        tile: rows and columns of distances held at a time.

    Raises:
        UserError: too few rows, values that are not finite, or a quantile outside (0, 1).
    """
    if not 0 < quantile < 1:
        raise UserError(f"quantile {quantile} does not lie between 0 and 1: 0.01 calls 1% of held-out data copied")
    x, y = checked(samples, "samples"), checked(train, "training examples")
    z = checked(held_out, "held-out examples", least=round(1 / quantile))
    mine, theirs = nearest(x, y, tile=tile)[:, 0], nearest(z, y, tile=tile)[:, 0].sort().values
    # An order statistic and not an interpolation, so that exact copies among the held-out data leave a threshold of 0.
    threshold = theirs[round(quantile * len(theirs)) - 1]
    farther = len(theirs) - torch.searchsorted(theirs, mine, right=True)
    tied = len(theirs) - farther - torch.searchsorted(theirs, mine)
    typical, median = float(theirs.median()), float(mine.median())
    return Memorisation(
        copied_fraction=float((mine <= threshold).double().mean()),
        closer_fraction=float((farther + tied.double() / 2).mean() / len(theirs)),
        distance_ratio=median / typical if typical else float("inf") if median else 1.0,
    )
