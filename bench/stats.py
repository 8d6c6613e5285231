"""Intervals, paired tests and ranks with doubt. Seeds are the unit; lengths are (n_seeds,) float arrays throughout.

The interval and the test are Student's t over seeds: exact for normal seed noise at any n >= 2, and with the
error rates that ``tests/bench/test_stats.py`` shows by simulation at the seed counts in use. A sign-flip permutation test
over 5 seeds could never reach 0.05 two-sided, so it is not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

LEVEL = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided interval; ``low`` and ``high`` are NaN where there is none (fewer than 2 seeds)."""

    estimate: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether the whole interval lies on one side of ``value``."""
        return bool(self.low > value or self.high < value)


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean over seeds with its t interval. Raises ValueError for no values."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("no values")
    mean = float(x.mean())
    if x.size < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(special.stdtrit(x.size - 1, 0.5 + level / 2) * x.std(ddof=1) / math.sqrt(x.size))
    return Interval(mean, mean - half, mean + half)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float], level: float = LEVEL) -> Interval | None:
    """Mean of a - b over the seeds both have, with its t interval; None where they share fewer than two seeds."""
    shared = sorted(a.keys() & b.keys())
    if len(shared) < 2:
        return None
    return mean_interval([a[s] - b[s] for s in shared], level)


def paired_p(a: Mapping[int, float], b: Mapping[int, float], resolution: float = 0.0) -> float:
    """Two-sided p of the paired t test over shared seeds; 1 where fewer than two are shared or all differences are 0.

    Args:
        resolution: the step in which scores can differ (1/n for an accuracy over n images). Differences are known no
            better than that: the standard deviation is taken as at least resolution/sqrt(6), the rounding noise of two
            scores, so that equal differences by chance never look certain.
    """
    d = np.asarray([[a[s] - b[s] for s in sorted(a.keys() & b.keys())]], dtype=np.float64)
    return float(_paired_p(d, resolution)[0])


def _paired_p(d: Floats, resolution: float) -> Floats:
    """:func:`paired_p` of every row of differences (pairs, seeds), NaN where a seed is not shared: (pairs,)."""
    shared = ~np.isnan(d)
    n = shared.sum(axis=1)
    degrees = np.maximum(n - 1, 1)
    mean = np.where(shared, d, 0.0).sum(axis=1) / np.maximum(n, 1)
    off = np.where(shared, d - mean[:, None], 0.0)
    spread = np.sqrt((off * off).sum(axis=1) / degrees)
    largest = np.where(shared, np.abs(d), 0.0).max(axis=1, initial=0.0)
    spread = np.maximum(np.maximum(spread, resolution / math.sqrt(6)), 1e-12 * largest)
    told = (n >= 2) & (mean != 0) & (spread > 0)
    t = np.abs(mean) * np.sqrt(n) / np.where(told, spread, 1.0)
    p: Floats = np.where(told, 2 * special.stdtr(degrees, -t), 1.0)
    return p


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given (family-wise error rate)."""
    return [float(v) for v in _holm(np.asarray(p_values, dtype=np.float64))]


def _holm(p: Floats) -> Floats:
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * (p.size - np.arange(p.size)))
    out = np.empty_like(p)
    out[order] = np.minimum(adjusted, 1.0)
    return out


def ranks(
    scores: Mapping[str, Mapping[int, float]], *, higher_is_better: bool, resolution: float = 0.0, alpha: float = 1 - LEVEL
) -> dict[str, int]:
    """Rank of every entry: 1 + how many are significantly better (paired t over seeds, Holm over all pairs).

    Entries that nothing separates share a rank. ``scores`` maps entry -> seed -> score.
    """
    names = sorted(scores)
    if len(names) < 2:
        return dict.fromkeys(names, 1)
    seeds = sorted(set().union(*scores.values()))
    table = np.asarray([[scores[name].get(seed, math.nan) for seed in seeds] for name in names], dtype=np.float64)
    # One entry against all later ones at a time: no (pairs, seeds) array, and 2,000 entries take a second instead of a minute.
    p_values, ahead = [], []
    for i in range(len(names) - 1):
        d = table[i] - table[i + 1 :]
        p_values.append(_paired_p(d, resolution))
        ahead.append(np.nansum(d, axis=1) > 0)
    apart = _holm(np.concatenate(p_values)) < alpha
    first, second = np.triu_indices(len(names), k=1)
    behind = np.where(np.concatenate(ahead) == higher_is_better, second, first)[apart]
    return dict(zip(names, (1 + np.bincount(behind, minlength=len(names))).tolist(), strict=True))


def gap_closed(
    method: Mapping[int, float], scratch: Mapping[int, float], teacher: Mapping[int, float], level: float = LEVEL
) -> Interval | None:
    """(method - scratch) / (teacher - scratch) over shared seeds, with Fieller's interval for a ratio of paired means.

    None where the teacher and scratch are not separated at ``level`` (the ratio would be noise over noise) or where
    fewer than two seeds are shared. Works for metrics of either direction.
    """
    shared = sorted(method.keys() & scratch.keys() & teacher.keys())
    n = len(shared)
    if n < 2:
        return None
    up = np.asarray([method[s] - scratch[s] for s in shared], dtype=np.float64)
    down = np.asarray([teacher[s] - scratch[s] for s in shared], dtype=np.float64)
    t2 = float(special.stdtrit(n - 1, 0.5 + level / 2)) ** 2
    var_up, var_down = up.var(ddof=1) / n, down.var(ddof=1) / n
    covariance = float(np.cov(up, down, ddof=1)[0, 1]) / n
    a = float(down.mean() ** 2 - t2 * var_down)
    if a <= 0:
        return None
    b = float(up.mean() * down.mean() - t2 * covariance)
    c = float(up.mean() ** 2 - t2 * var_up)
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Interval(float(up.mean() / down.mean()), (b - root) / a, (b + root) / a)
