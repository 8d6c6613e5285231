"""Hinton et al. 2015, section 2, in numpy."""

from __future__ import annotations

import numpy as np
from scipy.special import rel_entr, softmax


def kl_divergence(student_logits: np.ndarray, teacher_logits: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    """T^2 sum_c p_t (log p_t - log p_s)."""
    p_s, p_t = softmax(student_logits / temperature, axis=1), softmax(teacher_logits / temperature, axis=1)
    return temperature**2 * rel_entr(p_t, p_s).sum(axis=1)
