"""LELP from its equations: numpy, float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax

Array = NDArray[np.float64]


def lelp_loss(student_logits: Array, target: Array) -> Array:
    """Relative entropy of the target against the student's softmax."""
    return np.asarray(rel_entr(target, softmax(student_logits, axis=1)).sum(axis=1))


def subclass_target(teacher_logits: Array, subclass_logits: Array, *, temperature: float, beta: float) -> Array:
    """The joint distribution of class and subclass, built one entry at a time."""
    batch, classes, groups = subclass_logits.shape
    joint = np.zeros((batch, classes * groups))
    for b in range(batch):
        p = softmax(teacher_logits[b] / temperature)
        for c in range(classes):
            joint[b, c * groups : (c + 1) * groups] = p[c] * softmax(subclass_logits[b, c] / beta)
    return joint


def hidden_part(embedding: Array, weight: Array) -> Array:
    """The part of each embedding orthogonal to the rows of the weight, by an orthonormal basis of those rows."""
    _, values, rows = np.linalg.svd(weight, full_matrices=False)
    basis = rows[values > 1e-10 * values.max()]
    return np.asarray(embedding - (embedding @ basis.T) @ basis)
