"""Zhao et al. 2022, section 3, in numpy: one example at a time, the target deleted from the list of classes."""

from __future__ import annotations

import numpy as np
from scipy.special import rel_entr, softmax


def dkd_loss(
    student_logits: np.ndarray, teacher_logits: np.ndarray, labels: np.ndarray, *, alpha: float, beta: float, temperature: float
) -> np.ndarray:
    """T^2 [alpha KL(b_t || b_s) + beta KL(q_t || q_s)]."""
    losses = []
    for s, t, y in zip(student_logits, teacher_logits, labels, strict=True):
        p_s, p_t = softmax(s / temperature), softmax(t / temperature)
        off_s, off_t = np.delete(p_s, y), np.delete(p_t, y)
        tckd = rel_entr(p_t[y], p_s[y]) + rel_entr(off_t.sum(), off_s.sum())
        nckd = rel_entr(off_t / off_t.sum(), off_s / off_s.sum()).sum()
        losses.append(temperature**2 * (alpha * tckd + beta * nckd))
    return np.array(losses)
