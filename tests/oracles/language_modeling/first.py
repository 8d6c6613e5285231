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
