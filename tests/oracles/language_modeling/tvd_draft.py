"""TVD++ in numpy: rewards, their moments under q, and the policy gradient written out entry by entry."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

Array = NDArray[np.float64]


def tvd(student_logits: Array, teacher_logits: Array) -> Array:
    """1 minus the chance that a token of q is accepted, of each row."""
    accepted: Array = np.minimum(softmax(student_logits, axis=1), softmax(teacher_logits, axis=1)).sum(1)
    return 1 - accepted


def rewards(student_logits: Array, teacher_logits: Array) -> Array:
    found: Array = (softmax(teacher_logits, axis=1) > softmax(student_logits, axis=1)).astype(float)
    return found


def moments(student_logits: Array, teacher_logits: Array) -> tuple[float, float]:
    """Mean and standard deviation of the rewards of all rows, drawn by q."""
    r, weight = rewards(student_logits, teacher_logits), softmax(student_logits, axis=1) / len(student_logits)
    mean = float((weight * r).sum())
    return mean, float(np.sqrt((weight * (r - mean) ** 2).sum()))


def score(logits: Array, entry: int) -> Array:
    """The gradient of log q(entry) in one row of logits."""
    found: Array = -softmax(logits)
    found[entry] += 1
    return found


def policy_gradient(student_logits: Array, teacher_logits: Array, mean: float, deviation: float) -> Array:
    """-E_{v ~ q} (r(v) - mean) / deviation grad log q(v) of each row, as a sum over v."""
    r, q = rewards(student_logits, teacher_logits), softmax(student_logits, axis=1)
    return np.array(
        [
            -sum(q[n, v] * (r[n, v] - mean) / deviation * score(student_logits[n], v) for v in range(q.shape[1]))
            for n in range(len(student_logits))
        ]
    )
