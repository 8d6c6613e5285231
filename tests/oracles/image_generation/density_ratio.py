"""f-divergences between Gaussians, from their definition, in numpy float64. No curvature is written down: f alone is.

p is the teacher, q the student, r = p / q, D_f = E_q f(r).
"""

import functools

import numpy as np
from numpy.polynomial.legendre import leggauss

legendre = functools.cache(leggauss)

F = {
    "reverse_kl": lambda r, k: -np.log(r),
    "forward_kl": lambda r, k: r * np.log(r),
    "jensen_shannon": lambda r, k: r * np.log(r) - (r + 1) * np.log((r + 1) / 2),
    "softened_reverse_kl": lambda r, k: (r + 1) * np.log((r + 1) / (2 * r)),
    "squared_hellinger": lambda r, k: 1 - np.sqrt(r),
    "jeffreys": lambda r, k: (r - 1) * np.log(r),
    "neyman": lambda r, k: (1 - r) ** 2 / r,
    "pearson": lambda r, k: (r - 1) ** 2,
    "power": lambda r, k: (r**k - 1 - k * (r - 1)) / (k * (k - 1)),
}


def curvature(ratio, divergence, power, add=0.0):
    """r^2 f''(r) as the second derivative of f(e^u) less the first, by differences of sixth order; ``add`` (r - 1) is added to f."""

    def f(u):
        return F[divergence](np.exp(u), power) + add * (np.exp(u) - 1)

    u, step = np.log(ratio), 0.02
    first = (45 * (f(u + step) - f(u - step)) - 9 * (f(u + 2 * step) - f(u - 2 * step)) + f(u + 3 * step) - f(u - 3 * step)) / (60 * step)
    second = (
        -490 * f(u) + 270 * (f(u + step) + f(u - step)) - 27 * (f(u + 2 * step) + f(u - 2 * step)) + 2 * (f(u + 3 * step) + f(u - 3 * step))
    ) / (180 * step**2)
    return second - first


def density(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def divergence(name, power, teacher, student):
    """D_f between Gaussians given as (mean, variance), by Gauss-Legendre over all that has weight."""
    node, weight = legendre(300)
    width = 9 * np.sqrt(max(teacher[1], student[1]))
    x = (teacher[0] + student[0]) / 2 + width * node
    p, q = density(x, *teacher), density(x, *student)
    return float((width * weight * q * F[name](p / q, power)).sum())


def divergence_gradient(name, power, teacher, b, a, noise, step=1e-4):
    """d D_f / d(b, a) for a student N(b, a^2 + noise), by central differences."""

    def at(b, a):
        return divergence(name, power, teacher, (b, a**2 + noise))

    return np.array([(at(b + step, a) - at(b - step, a)) / (2 * step), (at(b, a + step) - at(b, a - step)) / (2 * step)])


def normal_rule(count=60):
    """Nodes and weights of E over a standard normal."""
    node, weight = np.polynomial.hermite_e.hermegauss(count)
    return node, weight / weight.sum()
