"""Improved consistency training, from the equations, in numpy and scipy float64."""

from fractions import Fraction

import numpy as np
from scipy.stats import norm


def ict_loss(output, target, gap, *, huber):
    c = huber * np.sqrt(output[0].size)
    return np.array([(np.sqrt(np.sum((o - t) ** 2) + c**2) - c) / g for o, t, g in zip(output, target, gap, strict=True)])


def level_probabilities(sigmas, *, mean, std):
    edges = norm.cdf(np.log(sigmas), loc=mean, scale=std)
    mass = np.abs(np.diff(edges))
    return mass / mass.sum()


def intervals(steps, *, s0, s1):
    """All K of them: a new stage begins at every multiple of K', the largest whole number with K' (log2 floor(s1 / s0) + 1) <= K."""
    stages = Fraction(np.log2(s1 // s0)) + 1
    length = 0
    while (length + 1) * stages <= steps:
        length += 1
    counts = [s0]
    for k in range(1, steps):
        counts.append(min(2 * counts[-1], s1) if k % max(length, 1) == 0 else counts[-1])
    return counts
