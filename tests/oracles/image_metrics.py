"""Metrics of image sets in numpy and scipy, written from the papers' formulas: every pair in a loop, nothing streamed or tiled."""

import numpy as np
from scipy import linalg


def frechet_distance(mean_a, covariance_a, mean_b, covariance_b):
    """Heusel et al. 2017, equation 6, with a general matrix square root."""
    root = linalg.sqrtm(covariance_a @ covariance_b)
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.trace(root).real)


def _distance(a, b):
    return np.sqrt(((a - b) ** 2).sum())


def fraction_inside(points, support, k):
    """Kynkaanniemi et al. 2019, equation 1, a point at a time."""
    radius = [sorted(_distance(s, t) for j, t in enumerate(support) if j != i)[k - 1] for i, s in enumerate(support)]
    return np.mean([any(_distance(p, s) <= r for s, r in zip(support, radius, strict=True)) for p in points])


def inception_score(probabilities, splits):
    """exp of H(y) - H(y|x), the mutual information, averaged over splits."""
    scores = []
    for part in np.array_split(probabilities, splits):
        marginal = part.mean(0)
        within = np.mean([-sum(p * np.log(p) for p in row if p > 0) for row in part])
        scores.append(np.exp(-sum(p * np.log(p) for p in marginal if p > 0) - within))
    return np.mean(scores)


def polynomial_mmd2(x, y):
    """Gretton et al. 2012, lemma 6, pair by pair."""

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    def within(s):
        return np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])

    return within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def nearest(a, b):
    return np.array([min(_distance(x, y) for y in b) for x in a])


def mean_pairwise_distance(x):
    return np.mean([_distance(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i < j])
