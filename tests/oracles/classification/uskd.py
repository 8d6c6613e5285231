"""USKD (Yang et al. 2023, section 3.2) in numpy, one example at a time, with probabilities as the paper writes them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.special import log_softmax, softmax


def soft_target(student_logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """P_y = S_y^2 + 1 - mean_batch S_y^2."""
    squares = np.array([softmax(s)[y] ** 2 for s, y in zip(student_logits, labels, strict=True)])
    return squares + 1 - squares.mean()


def target_loss(student_logits: np.ndarray, labels: np.ndarray, *, held: Mapping[str, np.ndarray]) -> np.ndarray:
    """-P_y log S_y. P_y is taken from the ``held`` logits: its gradient is stopped."""
    weights = soft_target(held["student_logits"], labels)
    return np.array([-p * log_softmax(s)[y] for p, s, y in zip(weights, student_logits, labels, strict=True)])


def weak_loss(auxiliary_logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-sum_i [0.9 1(i = y) + 0.1/C] log W_i."""
    classes = auxiliary_logits.shape[1]
    return np.array(
        [-((0.9 * np.eye(classes)[y] + 0.1 / classes) * log_softmax(w)).sum() for w, y in zip(auxiliary_logits, labels, strict=True)]
    )


def rank_score(student_logits: np.ndarray, auxiliary_logits: np.ndarray, labels: np.ndarray, *, rank: str) -> np.ndarray:
    """The paper's sum of probabilities (not its logarithm), or the released code's."""
    scores = []
    for s, w, y in zip(student_logits, auxiliary_logits, labels, strict=True):
        weak, p, log_p = softmax(w), softmax(s), log_softmax(s)
        if rank == "paper":
            scores.append(weak / (1 - weak[y]) + p / (1 - p[y]))
        else:
            scores.append(weak / (1 - weak[y] + 1e-6) + log_p / (1 - log_p[y] + 1e-6))
    return np.array(scores)


def non_target_loss(student_logits: np.ndarray, auxiliary_logits: np.ndarray, labels: np.ndarray, *, rank: str) -> np.ndarray:
    """-sum_{i != y} Q_i log q_i with Q_i = (1/k_i) / sum_{j != y} (1/k_j)."""
    losses = []
    for score, s, y in zip(rank_score(student_logits, auxiliary_logits, labels, rank=rank), student_logits, labels, strict=True):
        rank = {c: k for k, c in enumerate(sorted(range(len(s)), key=lambda c: -score[c]), start=1)}
        weight = np.array([1 / rank[c] for c in range(len(s)) if c != y])
        losses.append(-(weight / weight.sum() * log_softmax(np.delete(s, y))).sum())
    return np.array(losses)
