"""Token divergences in numpy, dense and one token at a time, from the definitions in the papers that token_losses names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax

Array = NDArray[np.float64]


def kl(p: Array, q: Array) -> float:
    return float(rel_entr(p, q).sum())


def js(p: Array, q: Array, beta: float) -> float:
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


# teacher p, student q, beta, alpha
DIVERGENCES: dict[str, Callable[[Array, Array, float, float], float]] = {
    "forward_kl": lambda p, q, beta, alpha: kl(p, q),
    "reverse_kl": lambda p, q, beta, alpha: kl(q, p),
    "js": lambda p, q, beta, alpha: js(p, q, beta),
    "skew_kl": lambda p, q, beta, alpha: kl(p, alpha * p + (1 - alpha) * q),
    "skew_reverse_kl": lambda p, q, beta, alpha: kl(q, alpha * q + (1 - alpha) * p),
    "tv": lambda p, q, beta, alpha: float(np.maximum(p - q, 0).sum()),
}


def token_losses(
    student_logits: Array, teacher_distributions: Array, mix: Mapping[str, float], *, temperature: float, beta: float, alpha: float
) -> Array:
    """T^2 sum_i w_i D_i(p, softmax(student / T)), with the teacher's distributions p given at T.   (N, V) each; returns (N,)."""
    losses = []
    for z, p in zip(student_logits, teacher_distributions, strict=True):
        q = softmax(z / temperature)
        losses.append(temperature**2 * sum(w * DIVERGENCES[name](p, q, beta, alpha) for name, w in mix.items()))
    return np.array(losses)


def lumped(distributions: Array, ids: NDArray[np.int64]) -> Array:
    """The distributions of the outcomes ``ids`` (N, k), and of "any other" as the last column."""
    kept = np.take_along_axis(distributions, ids, axis=1)
    return np.concatenate([kept, [[1 - row.sum()] for row in kept]], axis=1)


def top_k_losses(
    student_logits: Array,
    teacher_distributions: Array,
    ids: NDArray[np.int64],
    mix: Mapping[str, float],
    *,
    temperature: float,
    beta: float,
    alpha: float,
) -> Array:
    """The same between the lumped distributions: a student whose logits are the logarithms of its own lumped distribution."""
    q = lumped(softmax(student_logits / temperature, axis=1), ids)
    p = lumped(teacher_distributions, ids)
    return token_losses(temperature * np.log(q), p, mix, temperature=temperature, beta=beta, alpha=alpha)


def next_token_pairs(ids: list[list[int]], mask: list[list[bool]]) -> list[tuple[int, int, int]]:
    """(sequence, position of the state, token it predicts), by a plain loop over the text."""
    return [(b, t - 1, ids[b][t]) for b in range(len(ids)) for t in range(1, len(ids[b])) if mask[b][t]]
