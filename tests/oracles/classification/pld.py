"""The Plackett-Luce loss of arXiv 2506.12542 in numpy: one choice after the other, each from what is left."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp, softmax


def pld_loss(student_logits: np.ndarray, teacher_logits: np.ndarray, labels: np.ndarray, *, temperature: float) -> np.ndarray:
    """sum_k a_k [log sum_{l>=k} exp s_{pi_l} - s_{pi_k}]."""
    losses = []
    for s, t, y in zip(student_logits, teacher_logits, labels, strict=True):
        weight = softmax(t / temperature)
        left = [int(y), *sorted((c for c in range(len(t)) if c != y), key=lambda c: -t[c])]
        total = 0.0
        while left:
            total += weight[left[0]] * (logsumexp(s[left]) - s[left[0]])
            left = left[1:]
        losses.append(total)
    return np.array(losses)
