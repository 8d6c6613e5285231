"""Approximate likelihood matching (Minixhofer et al. 2025) in numpy: one chunk at a time, from its definition."""

from __future__ import annotations

import numpy as np
from scipy.special import rel_entr

EPSILON = 1e-6


def chunk_divergence(teacher_likelihood: np.ndarray, student_likelihood: np.ndarray, *, divergence: str, tau: float) -> np.ndarray:
    """tau KL (or cross-entropy) of Bernoulli(e^(a/tau)) and Bernoulli(e^(b/tau)), or the limit of the former."""
    found = []
    for a, b in zip(teacher_likelihood, student_likelihood, strict=True):
        if divergence == "limit":
            a, b = a - EPSILON, b - EPSILON
            found.append((a - b) + a * np.log(b / a))
            continue
        p, q = (np.array([np.exp(v / tau - EPSILON), -np.expm1(v / tau - EPSILON)]) for v in (a, b))
        found.append(tau * (rel_entr(p, q).sum() if divergence == "binary_kl" else -(p * np.log(q)).sum()))
    return np.array(found)


def loss(
    student_logits: np.ndarray,
    student_ids: np.ndarray,
    student_chunks: list[list[int]],
    teacher_logits: np.ndarray,
    teacher_ids: np.ndarray,
    teacher_chunks: list[list[int]],
    *,
    divergence: str,
    tau: float,
    weight: str,
) -> float:
    """The mean over all chunks of a batch; chunks name the chunk of every token but the first of a row, -1 for one that does not count."""
    terms = []
    for row in range(len(student_ids)):
        for chunk in range(max(student_chunks[row]) + 1):
            sums, tokens = [], 0
            for logits, ids, chunks in ((teacher_logits, teacher_ids, teacher_chunks), (student_logits, student_ids, student_chunks)):
                positions = [t for t in range(1, len(chunks[row])) if chunks[row][t] == chunk]
                tokens = tokens or len(positions)  # the teacher's, which come first
                distributions = [np.log(np.exp(logits[row][t - 1]) / np.exp(logits[row][t - 1]).sum()) for t in positions]
                sums.append(sum(log_p[ids[row][t]] for log_p, t in zip(distributions, positions, strict=True)))
            scale = {"chunk": 1.0, "token": tokens, "log1p_token": np.log1p(tokens)}[weight]
            terms.append(scale * chunk_divergence(np.array(sums[:1]), np.array(sums[1:]), divergence=divergence, tau=tau)[0])
    return float(np.mean(terms))
