"""SANA-Sprint's losses, from the equations, in numpy float64; the tangent is in trigflow.py."""

import numpy as np


def weighted_scm_loss(velocity, anchor, g, t, log_variance, *, sigma_data):
    """mean over a row of w / exp(v) (F - F^- - g)^2 + v, with w = 1 / (d tan t)."""
    out = []
    for f, a, h, time, v in zip(velocity, anchor, g, t, log_variance, strict=True):
        out.append((((f - a - h) ** 2) / (sigma_data * np.tan(time)) / np.exp(v) + v).mean())
    return np.array(out)


def critic_loss(logits, real):
    """The hinge of each row, mean over heads."""
    return np.array([np.mean([max(0.0, 1 - d) if r else max(0.0, 1 + d) for d in row]) for row, r in zip(logits, real, strict=True)])
