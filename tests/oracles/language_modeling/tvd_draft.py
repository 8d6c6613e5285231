"""TVD++ in numpy: rewards, their moments under q, and the policy gradient written out entry by entry."""

from __future__ import annotations

from collections.abc import Mapping

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


def logits(model: Array, states: Array, vocab: int) -> Array:
    """What a projection (V, D + 1), its bias the last column, makes of states (N, D): (N, vocab)."""
    return np.asarray(states @ model[:vocab, :-1].T + model[:vocab, -1])


def exact_loss(
    draft: Array, target: Array, states: Array, theirs: Array, vocab: int, *, held: Mapping[str, Array]
) -> tuple[Array, NDArray[np.float32]]:
    """Total variation of each token, and its mean reward, which is kept in float32 and has no gradient."""
    p = logits(target, theirs, vocab)
    z = logits(held["draft"], held["states"], vocab)
    reward = (softmax(z, axis=1) * rewards(z, p)).sum(1)
    return tvd(logits(draft, states, vocab), p), reward.astype(np.float32)


def sampled_loss(
    draft: Array,
    target: Array,
    states: Array,
    theirs: Array,
    uniforms: Array,
    mean_reward: float,
    vocab: int,
    *,
    held: Mapping[str, Array],
) -> tuple[Array, Array]:
    """-(r(v) - mu) log q(v) of the v at which the sum of q, as it is held, first exceeds the uniform number; and r(v)."""
    q, z = logits(held["draft"], held["states"], vocab), logits(draft, states, vocab)
    r = rewards(q, logits(target, theirs, vocab))
    drawn = [int((np.cumsum(softmax(row)) <= u).sum()) for row, u in zip(q, uniforms, strict=True)]
    loss = np.array([-(r[n, v] - mean_reward) * np.log(softmax(z[n])[v]) for n, v in enumerate(drawn)])
    return loss, np.array([r[n, v] for n, v in enumerate(drawn)])
