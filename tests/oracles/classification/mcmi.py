"""MCMI from its equations: numpy and scipy, float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax, rel_entr, softmax

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def conditional_information(logits: Array, labels: Labels, centroids: Array) -> Array:
    """Relative entropy of each output against its class's centroid."""
    return np.asarray(rel_entr(softmax(logits, axis=1), centroids[labels]).sum(axis=1))


def mcmi_loss(logits: Array, labels: Labels, centroids: Array, *, information_weight: float) -> Array:
    """Negative log-likelihood minus the weighted relative entropy."""
    likelihood = log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    return np.asarray(-likelihood - information_weight * conditional_information(logits, labels, centroids))


def class_centroids(teacher_logits: Array, labels: Labels) -> Array:
    """Class means of the outputs, class after class."""
    outputs = softmax(teacher_logits, axis=1)
    classes = outputs.shape[1]
    return np.stack([outputs[labels == c].mean(axis=0) if (labels == c).any() else np.full(classes, 1 / classes) for c in range(classes)])
