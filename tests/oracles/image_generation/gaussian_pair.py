"""Data N(M, S^2) and a generator x = b + a z in one dimension, seen at one noise level: denoisers and divergences in closed form."""

import numpy as np

M, S, A, B, SIGMA = 0.7, 0.5, 0.9, 0.1, 0.8
KEEP = S**2 / (S**2 + SIGMA**2)  # of the teacher's answer


def exact(noisy, mean, variance):
    """E[x | x + SIGMA eps = noisy] for x of N(mean, variance); works for arrays and tensors."""
    return mean + variance / (variance + SIGMA**2) * (noisy - mean)


def quadrature(nodes=8):
    """Nodes (z, eps) and weights of a Gauss-Hermite rule for two independent standard normals."""
    node, weight = np.polynomial.hermite_e.hermegauss(nodes)
    weight = weight / weight.sum()
    z, eps = np.meshgrid(node, node)
    return z.ravel(), eps.ravel(), np.outer(weight, weight).ravel()


def expected(distance, a, b, *, of=None, nodes=60):
    """E distance(f_phi - f_psi) for the generator (a, b), at x_t from it or from another generator ``of``."""
    a0, b0 = of or (a, b)
    node, weight = np.polynomial.hermite_e.hermegauss(nodes)
    x = b0 + np.sqrt(a0**2 + SIGMA**2) * node
    return (weight * distance(exact(x, M, S**2) - exact(x, b, a**2))).sum() / weight.sum()


def slope(function, a, b, step=1e-5):
    """The derivatives of ``function(a, b)`` by a and by b: central differences."""
    return np.array(
        [
            (function(a + step, b) - function(a - step, b)) / (2 * step),
            (function(a, b + step) - function(a, b - step)) / (2 * step),
        ]
    )
