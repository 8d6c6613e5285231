"""MiniPLM in numpy: the difference of mean token losses, and the best texts by counting those above."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

Array = NDArray[np.float64]


def differences(reference: list[list[float]], teacher: list[list[float]]) -> Array:
    """log-probabilities of every token of every text -> r of each text."""
    return np.array([np.mean(t) - np.mean(r) for r, t in zip(reference, teacher, strict=True)])


def best(scores: Array, alpha: float) -> list[int]:
    """Rows with fewer than floor(alpha M) better ones; of equal ones the earlier is the better."""
    m = int(alpha * len(scores))
    return [i for i, s in enumerate(scores) if (scores > s).sum() + (scores[:i] == s).sum() < m]


def token_nll(model: Array, states: Array, labels: NDArray[np.int64], *, vocab: int) -> Array:
    """-log q of each token; ``model`` is a projection (V, D + 1) whose last column is the bias."""
    return np.array([-log_softmax(model[:vocab, :-1] @ s + model[:vocab, -1])[y] for s, y in zip(states, labels, strict=True)])
