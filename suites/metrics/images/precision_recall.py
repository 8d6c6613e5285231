"""Improved precision and recall of a sample set in a feature space."""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.suites.metrics.images.distances import TILE, checked, distance_tiles, nearest


def fraction_inside(points: Tensor, support: Tensor, *, k: int = 3, tile: int = TILE) -> float:
    """Share of points that lie in the support's manifold estimate; in [0, 1].

    That is the union of balls about the support's samples, each out to its k-th nearest other sample (Kynkaanniemi et al. 2019,
    equation 1).   points (N, D), support (M, D), M > k.
    """
    radius = nearest(support, support, k=k, itself=True, tile=tile)[:, -1]
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for i, j, distances in distance_tiles(points, support, tile=tile):
        rows, columns = distances.shape
        inside[i : i + rows] |= (distances <= radius[j : j + columns]).any(1)
    return float(inside.double().mean())


def precision_recall(features: Tensor, reference: Tensor, *, k: int = 3, tile: int = TILE) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equation 2), each in [0, 1].

    Precision is the fraction of samples inside the reference's manifold, recall the fraction of the reference inside the samples'
    manifold. Both depend on the set sizes: draw as many samples as there are in the reference. Memory does not grow with N M.

    Args:
        features: (N, D) of the samples, N > k.
        reference: (M, D) of real data, M > k.
        k: which neighbour sets a ball's radius; 3 in the paper.
        tile: rows and columns of distances held at a time.

    Raises:
        UserError: a set has at most k samples or holds features that are not finite.
    """
    x, y = checked(features, "features", least=k + 1), checked(reference, "reference features", least=k + 1)
    return fraction_inside(x, y, k=k, tile=tile), fraction_inside(y, x, k=k, tile=tile)
