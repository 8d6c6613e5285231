"""Euclidean distances between large feature sets, a tile at a time, and the check that every metric makes of its input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distillbench.errors import UserError

TILE = 4096  # rows and columns of one tile of distances: 128 MB in float64
FLOOR = 1e-12  # squared distances below this part of the squared norms are rounding and count as 0


def checked(features: Tensor, what: str, *, least: int = 1) -> Tensor:
    """The features, if they are (N, D) with N >= ``least`` and finite.

    Raises:
        UserError: they are not.
    """
    if features.ndim != 2 or not features.shape[1]:
        raise UserError(f"{what} have shape {tuple(features.shape)}: one row per sample, (N, D), is needed")
    if len(features) < least:
        raise UserError(f"{len(features)} {what} are too few: at least {least} are needed")
    if not bool(features.isfinite().all()):
        bad = int((~features.isfinite().all(1)).sum())
        raise UserError(f"{bad} of {len(features)} {what} are not finite: mend the model or the extractor that made them")
    return features


def distance_tiles(a: Tensor, b: Tensor, *, tile: int = TILE) -> Iterator[tuple[int, int, Tensor]]:
    """First row, first column and distances (<= tile, <= tile) of every tile of the (N, M) distance matrix, row by row.

    |a - b|^2 = |a|^2 + |b|^2 - 2 a . b in float64, about the mean of b so that little cancels. Copies are at distance 0 exactly.
    """
    centre = b.mean(0, dtype=torch.float64)
    for i in range(0, len(a), tile):
        x = a[i : i + tile].double() - centre
        for j in range(0, len(b), tile):
            y = b[j : j + tile].double() - centre
            norms = x.square().sum(1)[:, None] + y.square().sum(1)
            squared = torch.addmm(norms, x, y.T, alpha=-2)
            yield i, j, squared.masked_fill_(squared <= FLOOR * norms, 0).sqrt_()


def nearest(a: Tensor, b: Tensor, *, k: int = 1, itself: bool = False, tile: int = TILE) -> Tensor:
    """Distances from each row of a (N, D) to its k nearest rows of b (M, D), ascending.   -> (N, k) float64.

    With ``itself``, a and b are the same set and no row is its own neighbour.
    """
    best = torch.full((len(a), k), torch.inf, dtype=torch.float64, device=a.device)
    for i, j, distances in distance_tiles(a, b, tile=tile):
        if itself and i == j:
            distances.fill_diagonal_(torch.inf)
        rows = slice(i, i + len(distances))
        best[rows] = torch.cat([best[rows], distances], dim=1).topk(k, dim=1, largest=False).values.sort(1).values
    return best
