"""Central differences: gradients of an oracle that know nothing of automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def gradient(function: Callable[[Array], Array], at: Array, step: float = 1e-5) -> Array:
    """The gradient of ``function(at).sum()`` in ``at``, an array of any shape; error of order ``step``^2."""
    slope = np.zeros_like(at)
    for place in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[place] += step
        down[place] -= step
        slope[place] = (function(up).sum() - function(down).sum()) / (2 * step)
    return slope
