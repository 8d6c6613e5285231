"""Self-distillation in ridge regression by its closed forms in the kernel's eigenvalues: numpy, float64, no iteration.

a_i = d_i / (d_i + lambda), m_i = (1 - alpha) a_i and b_{t,i} = m_i^(t-1) a_i + alpha a_i (1 - m_i^(t-1)) / (1 - m_i) give the
predictions y_t = V diag(b_t) V^T y on the training inputs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def shrinkage(eigenvalues: Array, *, ridge: float, truth_weight: float, rounds: int) -> Array:
    """b_t: what is left of each eigendirection of the targets after t rounds."""
    a = eigenvalues / (eigenvalues + ridge)
    m = (1 - truth_weight) * a
    kept = m ** (rounds - 1)
    return np.asarray(kept * a + truth_weight * a * (1 - kept) / (1 - m))


def predictions(kernel: Array, targets: Array, *, ridge: float, truth_weight: float, rounds: int) -> Array:
    """y_t on the training inputs."""
    d, v = np.linalg.eigh(kernel)
    return np.asarray(v @ (shrinkage(d, ridge=ridge, truth_weight=truth_weight, rounds=rounds)[:, None] * (v.T @ targets)))


def kernel_coefficients(kernel: Array, targets: Array, *, ridge: float, truth_weight: float, rounds: int) -> Array:
    """c_t of f_t(x) = k(x, X) c_t: what reproduces y_t, for a kernel of full rank."""
    d, v = np.linalg.eigh(kernel)
    b = shrinkage(d, ridge=ridge, truth_weight=truth_weight, rounds=rounds)
    return np.asarray(v @ ((b / d)[:, None] * (v.T @ targets)))


def cross_entropy(logits: Array, labels: NDArray[np.int64]) -> Array:
    """-log p(label): what the network is trained on before the closed forms."""
    return np.array([np.log(np.exp(z - z[y]).sum()) for z, y in zip(logits, labels, strict=True)])
