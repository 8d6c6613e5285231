"""Huang et al. 2022, section 4, in numpy: one pair of vectors at a time."""

from __future__ import annotations

import numpy as np
from scipy.special import softmax


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of each pair of rows, from the sums of its definition, with 1e-8 beside the norms."""
    found = []
    for u, v in zip(a, b, strict=True):
        n = len(u)
        cov = (u * v).sum() - u.sum() * v.sum() / n
        var_u, var_v = ((u - u.sum() / n) ** 2).sum(), ((v - v.sum() / n) ** 2).sum()
        found.append(cov / (np.sqrt(var_u * var_v) + 1e-8))
    return np.array(found)


def inter_class_loss(student_logits: np.ndarray, teacher_logits: np.ndarray, *, temperature: float) -> np.ndarray:
    """T^2 (1 - rho) of the rows."""
    y_s, y_t = softmax(student_logits / temperature, axis=1), softmax(teacher_logits / temperature, axis=1)
    return temperature**2 * (1 - correlation(y_s, y_t))


def intra_class_loss(student_logits: np.ndarray, teacher_logits: np.ndarray, *, temperature: float) -> np.ndarray:
    """T^2 mean_j (1 - rho) of the columns."""
    y_s, y_t = softmax(student_logits / temperature, axis=1), softmax(teacher_logits / temperature, axis=1)
    columns = [1 - correlation(y_s[None, :, j], y_t[None, :, j])[0] for j in range(y_s.shape[1])]
    return np.array(temperature**2 * sum(columns) / len(columns))
