"""GKD in numpy: the divergence of Agarwal et al. 2023, eq. 1, one token at a time, and its two reductions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax

Array = NDArray[np.float64]


def between(student_logits: Array, teacher_logits: Array, beta: float) -> Array:
    """beta KL(p || m) + (1 - beta) KL(q || m) of each row; by definition KL(p || q) at beta 0 and KL(q || p) at beta 1."""
    values = []
    for z, w in zip(student_logits, teacher_logits, strict=True):
        q, p = softmax(z), softmax(w)
        if beta in (0, 1):
            values.append(rel_entr(q, p).sum() if beta else rel_entr(p, q).sum())
        else:
            m = beta * p + (1 - beta) * q
            values.append(beta * rel_entr(p, m).sum() + (1 - beta) * rel_entr(q, m).sum())
    return np.array(values)


def reduced(values: Array, rows: NDArray[np.int64], reduction: str) -> float:
    """The mean over tokens, or the mean over rows of each row's mean."""
    if reduction == "token":
        return float(values.mean())
    return float(np.mean([values[rows == r].mean() for r in np.unique(rows)]))


def logits(model: Array, states: Array, vocab: int) -> Array:
    """What a projection (V, D + 1), its bias the last column, makes of states (N, D): (N, vocab)."""
    return np.asarray(states @ model[:vocab, :-1].T + model[:vocab, -1])


def token_divergence(model: Array, states: Array, teacher: Array, *, divergence: str, beta: float, vocab: int) -> Array:
    return between(logits(model, states, vocab), teacher[:, :vocab], {"js": beta, "forward_kl": 0, "reverse_kl": 1}[divergence])
