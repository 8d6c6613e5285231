"""NKD (Yang et al. 2023, section 3.1) in numpy, one example at a time."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax, softmax


def nkd_loss(student_logits: np.ndarray, teacher_logits: np.ndarray, labels: np.ndarray, *, gamma: float, temperature: float) -> np.ndarray:
    """-T_y log S_y - gamma lam^2 sum_{i != y} q_i(z_t) log q_i(z_s)."""
    losses = []
    for s, t, y in zip(student_logits, teacher_logits, labels, strict=True):
        target = -softmax(t)[y] * log_softmax(s)[y]
        q_t, log_q_s = softmax(np.delete(t, y) / temperature), log_softmax(np.delete(s, y) / temperature)
        losses.append(target - gamma * temperature**2 * (q_t * log_q_s).sum())
    return np.array(losses)
