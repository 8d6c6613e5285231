"""Sequence-level distillation in numpy: the likelihood of one token at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

Array = NDArray[np.float64]


def token_nll(model: Array, states: Array, labels: NDArray[np.int64], *, vocab: int) -> Array:
    """-log q of each token; ``model`` is a projection (V, D + 1) whose last column is the bias."""
    return np.array([-log_softmax(model[:vocab, :-1] @ s + model[:vocab, -1])[y] for s, y in zip(states, labels, strict=True)])
