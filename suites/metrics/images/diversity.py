"""How different the samples of one condition (a class, a prompt) are from one another, relative to real data."""

from __future__ import annotations

from torch import Tensor

from distillbench.errors import UserError
from distillbench.suites.metrics.images.distances import TILE, checked, distance_tiles


def mean_pairwise_distance(features: Tensor, *, tile: int = TILE) -> float:
    """Mean Euclidean distance over all pairs of different rows.   (N, D), N >= 2; >= 0."""
    x = checked(features, "features", least=2)
    return float(sum(float(d.sum()) for _, _, d in distance_tiles(x, x, tile=tile)) / (len(x) * (len(x) - 1)))


def diversity_by_condition(features: Tensor, conditions: Tensor, reference: Tensor, reference_conditions: Tensor) -> dict[int, float]:
    """Mean pairwise distance within each condition over that of real data in the same condition.

    1 is as diverse as the data, 0 a condition in which every sample is the same; above 1 is more spread out than the data, as noise
    is. Every condition of the samples is judged.

    Args:
        features: (N, D) of the samples.
        conditions: (N,) integers.
        reference: (M, D) of real data.
        reference_conditions: (M,) integers.

    Raises:
        UserError: labels do not match rows, or a condition has fewer than 2 rows on a side, or real data without spread.
    """
    for rows, labels, what in ((features, conditions, "samples"), (reference, reference_conditions, "real examples")):
        checked(rows, what, least=2)
        if labels.shape != (len(rows),):
            raise UserError(f"{len(rows)} {what} come with conditions of shape {tuple(labels.shape)}: one condition a row is needed")
    ratios = {}
    for condition in sorted(int(c) for c in conditions.unique()):
        ours, real = features[conditions == condition], reference[reference_conditions == condition]
        for count, what in ((len(ours), "samples"), (len(real), "real examples")):
            if count < 2:
                raise UserError(f"condition {condition} has {count} {what}: diversity needs at least 2 in every condition")
        spread = mean_pairwise_distance(real)
        if not spread:
            raise UserError(f"real examples of condition {condition} are all the same: diversity has nothing to compare with")
        ratios[condition] = mean_pairwise_distance(ours) / spread
    return ratios


def diversity(features: Tensor, conditions: Tensor, reference: Tensor, reference_conditions: Tensor) -> float:
    """Mean of :func:`diversity_by_condition`, every condition with equal weight; 1 is as diverse as the data, 0 collapsed."""
    ratios = diversity_by_condition(features, conditions, reference, reference_conditions)
    return sum(ratios.values()) / len(ratios)
