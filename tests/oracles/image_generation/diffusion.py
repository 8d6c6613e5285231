"""Diffusion on Gaussians in closed form, in numpy and scipy float64."""

import numpy as np
from scipy.special import logsumexp


def log_density(x, sigma, means, std):
    """log p(x; sigma) of equally likely N(m_k, std^2 I) plus noise N(0, sigma^2 I), for one point x (d,)."""
    variance = std**2 + sigma**2
    terms = [-((x - m) @ (x - m)) / (2 * variance) for m in means]
    return logsumexp(terms) - np.log(len(means)) - len(x) / 2 * np.log(2 * np.pi * variance)


def posterior_mean(x, sigma, means, std):
    """E[x_0 | x] by Bayes' rule over the components, for one point x (d,)."""
    variance = std**2 + sigma**2
    likelihood = np.array([np.exp(-((x - m) @ (x - m)) / (2 * variance)) for m in means])
    each = np.array([(sigma**2 * m + std**2 * x) / variance for m in means])
    return likelihood @ each / likelihood.sum()


def gaussian_path(x, sigma, after, *, mean, variance):
    """Where the probability-flow ODE of N(mean, variance) takes x from noise level sigma to after."""
    return mean + (x - mean) * np.sqrt((variance + after**2) / (variance + sigma**2))


def heun_multiplier(t, after, *, variance):
    """The factor of one Heun step from t to after for N(0, variance): k(t) = t / (variance + t^2)."""

    def k(s):
        return s / (variance + s**2)

    step = after - t
    return 1 + step / 2 * (k(t) + k(after) * (1 + step * k(t)))


def mmd2(x, y, *, bandwidths):
    """Unbiased MMD^2 pair by pair."""

    def k(a, b):
        return np.mean([np.exp(-((a - b) @ (a - b)) / (2 * h * h)) for h in bandwidths])

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(k(a, b) for a in x for b in y) / (n * m)
    return xx + yy - 2 * xy
