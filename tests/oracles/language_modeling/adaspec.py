"""AdaSPEC in numpy: forward KL of draft and reference, the quantile of their difference, two denominators."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax

Array = NDArray[np.float64]


def kl(student: Array, teacher: Array) -> Array:
    """KL(softmax(teacher) || softmax(student)) of each row (N, V), (N,)."""
    return np.asarray(rel_entr(softmax(teacher, axis=1), softmax(student, axis=1)).sum(1))


def selection(draft: Array, reference: Array, keep: float) -> NDArray[np.bool_]:
    """By sorting: the bound lies (1 - keep)(N - 1) ranks up, between two of the excesses."""
    excess = draft - reference
    ranked = np.sort(excess)
    rank = (1 - keep) * (len(ranked) - 1)
    low = int(np.floor(rank))
    high = min(low + 1, len(ranked) - 1)
    return np.asarray(excess >= ranked[low] + (rank - low) * (ranked[high] - ranked[low]))


def loss(draft: Array, teacher: Array, kept: NDArray[np.bool_], denominator: str) -> float:
    """The loss with the selection held still."""
    values = kl(draft, teacher)[kept].sum()
    return float(values / (kept.sum() if denominator == "kept" else len(kept)))


def logits(model: Array, states: Array, vocab: int) -> Array:
    """What a projection (V, D + 1), its bias the last column, makes of states (N, D): (N, vocab)."""
    return np.asarray(states @ model[:vocab, :-1].T + model[:vocab, -1])


def token_divergence(model: Array, states: Array, teacher: Array, *, vocab: int) -> Array:
    """Forward KL of each token."""
    return kl(logits(model, states, vocab), teacher[:, :vocab])
