"""The divergences of DistillSpec in numpy, from distributions of one token at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax

Array = NDArray[np.float64]


def between(student_logits: Array, teacher_logits: Array, name: str) -> Array:
    """D(p, q) of each row, p the target's distribution."""
    values = []
    for z, w in zip(student_logits, teacher_logits, strict=True):
        q, p = softmax(z), softmax(w)
        m = (p + q) / 2
        values.append(
            {
                "forward_kl": rel_entr(p, q).sum(),
                "reverse_kl": rel_entr(q, p).sum(),
                "js": (rel_entr(p, m).sum() + rel_entr(q, m).sum()) / 2,
                "tv": 1 - np.minimum(p, q).sum(),
            }[name]
        )
    return np.array(values)


def logits(model: Array, states: Array, vocab: int) -> Array:
    """What a projection (V, D + 1), its bias the last column, makes of states (N, D): (N, vocab)."""
    return np.asarray(states @ model[:vocab, :-1].T + model[:vocab, -1])


def token_divergence(model: Array, states: Array, teacher: Array, *, divergence: str, vocab: int) -> Array:
    return between(logits(model, states, vocab), teacher[:, :vocab], divergence)
