"""TAID in numpy, from the paper's definitions: a geometric mixture as the target, a schedule with momentum."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, rel_entr, softmax

Array = NDArray[np.float64]


def interpolated(student: Array, teacher: Array, t: float) -> Array:
    """p_t (N, V): the normalised product p^t q^(1 - t); at t = 0 the student's distribution whatever the teacher excludes."""
    p, q = softmax(teacher, axis=1), softmax(student, axis=1)
    product = q ** (1 - t) * (p**t if t > 0 else np.ones_like(p))
    return np.asarray(product / product.sum(1, keepdims=True))


def kl(student: Array, of: Array) -> Array:
    """KL(p_t || softmax(student)) of each row, the target held still."""
    return np.asarray(rel_entr(of, softmax(student, axis=1)).sum(1))


def cross_entropy(student: Array, of: Array) -> Array:
    """What the authors' code computes: the KL and the entropy of the target."""
    return np.asarray(kl(student, of) + entr(of).sum(1))


def schedule(losses: list[float], start: float, end: float, alpha: float, beta: float) -> list[float]:
    """t behind each loss. The first loss moves nothing."""
    t, m, path = start, 0.0, [start]
    for n in range(1, len(losses)):
        change = (losses[n - 1] - losses[n]) / losses[n - 1]
        m = beta * m + (1 - beta) * change
        t = min(end, max(start + (end - start) * n / len(losses), t + alpha / (1 + np.exp(-m)) * (1 - t)))
        path.append(t)
    return path


def logits(model: Array, states: Array, vocab: int) -> Array:
    """What a projection (V, D + 1), its bias the last column, makes of states (N, D): (N, vocab)."""
    return np.asarray(states @ model[:vocab, :-1].T + model[:vocab, -1])


def taid_loss(model: Array, target: Array, states: Array, theirs: Array, t: float, vocab: int, *, held: Mapping[str, Array]) -> Array:
    """KL(p_t || q) with p_t of the ``held`` values."""
    own = logits(held["model"], held["states"], vocab)
    return kl(logits(model, states, vocab), interpolated(own, logits(target, theirs, vocab), t))
