"""FIRST in numpy: KL between normalised top-K probabilities, two re-calibrations, and the calibration error by bins."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax

Array = NDArray[np.float64]


def first_loss(student_top: Array, teacher_top: Array, *, normaliser: str, other: bool) -> Array:
    values = []
    for q, p in zip(student_top, teacher_top, strict=True):
        distributions = []
        for a in (p, q):
            if other:
                a = np.append(a, 1 - a.sum())
            distributions.append(softmax(a) if normaliser == "softmax" else (a + 1e-6) / (a + 1e-6).sum())
        values.append(rel_entr(*distributions).sum())
    return np.array(values)


def calibration_error(confidence: Array, right: NDArray[np.bool_], bins: int = 10) -> float:
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(total)


def taught(p: Array, c: float | None, *, other: bool) -> Array:
    """All outcomes that a student is taught, (N, K), or (N, K + 1) with the rest as the last one; each row sums to 1."""
    rows = []
    for row in p:
        inside = row / row.sum() if c is None else np.exp(row / c - np.max(row / c)) / np.exp(row / c - np.max(row / c)).sum()
        rows.append(np.append(inside * row.sum(), 1 - row.sum()) if other else inside)
    return np.array(rows)


def best_temperature(p: Array, right: NDArray[np.bool_], grid: tuple[float, ...], *, other: bool) -> float | None:
    best, least = None, calibration_error(taught(p, None, other=other)[:, 0], right)
    for c in grid:
        error = calibration_error(taught(p, c, other=other)[:, 0], right)
        if error < least - 1e-12:
            best, least = c, error
    return best
