"""Logistic discriminators from the equations, in numpy float64; logits are lists of rows, a value per head."""

import math

import numpy as np


def softplus(x):
    """ln(1 + e^x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def generator(fake):
    """The mean over heads of softplus(-D(x)), row by row."""
    return np.array([sum(softplus(-d) for d in row) / len(row) for row in fake])


def critic(real, fake):
    """The mean over heads of softplus(-D(y)) + softplus(D(x)), row by row."""
    return np.array([sum(softplus(-r) + softplus(f) for r, f in zip(a, b, strict=True)) / len(a) for a, b in zip(real, fake, strict=True)])


def log_ratio(x, real, fake):
    """log N(x; m, v) - log N(x; n, w) for real = (m, v) and fake = (n, w)."""
    (m, v), (n, w) = real, fake
    return -((x - m) ** 2) / (2 * v) - math.log(v) / 2 + (x - n) ** 2 / (2 * w) + math.log(w) / 2
