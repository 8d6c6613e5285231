"""Dual-head distillation from its equations: numpy, float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def binary_kl_norm(auxiliary_logits: Array, teacher_logits: Array, *, temperature: float) -> Array:
    """The Bernoulli divergences, each from its two probabilities in logarithms."""
    u = (auxiliary_logits - teacher_logits) / temperature
    log_yes, log_no = -np.logaddexp(0, -u), -np.logaddexp(0, u)
    divergence = 0.5 * (np.log(0.5) - log_yes) + 0.5 * (np.log(0.5) - log_no)
    return np.asarray(temperature**2 * divergence.sum(axis=1))


def align(label_gradient: Array, teacher_gradient: Array) -> Array:
    """Gram-Schmidt, only where the two conflict."""
    direction = label_gradient / np.linalg.norm(label_gradient)
    against = min(float(teacher_gradient @ direction), 0.0)
    return np.asarray(label_gradient + teacher_gradient - against * direction)
