"""SANA-Sprint's losses, from the equations, in numpy float64; the tangent is in trigflow.py."""

import numpy as np


def weighted_scm_loss(velocity, tangent, sigma, log_variance, *, held=None):
    """mean over a row of w / exp(v) (F - F^- - g)^2 + v, with w = 1 / (d tan t) = 1 / sigma, and F^- + g held."""
    at = held or {"velocity": velocity, "tangent": tangent}
    out = []
    for f, a, h, s, v in zip(velocity, at["velocity"], at["tangent"], sigma, log_variance, strict=True):
        out.append((((f - a - h) ** 2) / s / np.exp(v) + v).mean())
    return np.array(out)


def generator_loss(logits):
    """-D, mean over heads."""
    return np.array([-sum(row) / len(row) for row in logits])


def critic_loss(logits, is_real):
    """The hinge of each row, mean over heads."""
    return np.array([np.mean([max(0.0, 1 - d) if r else max(0.0, 1 + d) for d in row]) for row, r in zip(logits, is_real, strict=True)])
