"""FitNets from its equations: numpy, float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def hint_loss(student_feature: Array, teacher_feature: Array) -> Array:
    """Mean squared difference over everything but the batch."""
    return np.array([np.sum((s - t) ** 2) / s.size for s, t in zip(student_feature, teacher_feature, strict=True)])
