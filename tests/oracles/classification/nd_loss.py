"""ND loss from its equations: numpy, float64, one example after the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def nd_loss(student_embedding: Array, teacher_embedding: Array, labels: NDArray[np.int64], class_means: Array) -> Array:
    """One minus the projection on the class mean's direction, in units of the longer embedding."""
    values = []
    for s, t, y in zip(student_embedding, teacher_embedding, labels, strict=True):
        mean = class_means[y]
        projection = float(np.dot(s, mean)) / float(np.sqrt(np.dot(mean, mean)))
        values.append(1 - projection / max(float(np.sqrt(np.dot(s, s))), float(np.sqrt(np.dot(t, t)))))
    return np.array(values)
