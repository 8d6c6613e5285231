"""Intervals, paired tests and ranks with doubt. Seeds are the unit; lengths are (n_seeds,) float arrays throughout.

The interval and the test are Student's t over seeds: exact for normal seed noise at any n >= 2, and with the
error rates that ``tests/test_stats.py`` shows by simulation at the seed counts in use. A sign-flip permutation test
over 5 seeds could never reach 0.05 two-sided, so it is not used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEVEL = 0.95


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
    shared = sorted(a.keys() & b.keys())
    if len(shared) < 2:
        return 1.0
    d = np.asarray([a[s] - b[s] for s in shared], dtype=np.float64)
    spread = max(float(d.std(ddof=1)), resolution / math.sqrt(6), 1e-12 * float(np.abs(d).max()))
    if d.mean() == 0 or spread == 0:
        return 1.0
    t = abs(float(d.mean())) / (spread / math.sqrt(d.size))
    return float(2 * special.stdtr(d.size - 1, -t))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given (family-wise error rate)."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * (p.size - np.arange(p.size)))
    out = np.empty_like(p)
    out[order] = np.minimum(adjusted, 1.0)
    return [float(v) for v in out]


def ranks(
    scores: Mapping[str, Mapping[int, float]], *, higher_is_better: bool, resolution: float = 0.0, alpha: float = 1 - LEVEL
) -> dict[str, int]:
    """Rank of every entry: 1 + how many are significantly better (paired t over seeds, Holm over all pairs).

    Entries that nothing separates share a rank. ``scores`` maps entry -> seed -> score.
    """
    names = sorted(scores)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    adjusted = holm([paired_p(scores[a], scores[b], resolution) for a, b in pairs]) if pairs else []
    better = dict.fromkeys(names, 0)
    for (a, b), p in zip(pairs, adjusted, strict=True):
        if p < alpha:
            shared = scores[a].keys() & scores[b].keys()
            ahead = sum(scores[a][s] - scores[b][s] for s in shared) > 0
            better[b if ahead == higher_is_better else a] += 1
    return {n: 1 + better[n] for n in names}


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
