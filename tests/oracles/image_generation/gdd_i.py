"""GDD's losses from the equations, in numpy float64: sums over discriminators."""

import numpy as np


def generator_loss(fake):
    out = np.zeros(len(fake))
    for head in range(fake.shape[1]):
        out += np.logaddexp(0, -fake[:, head])
    return out


def critic_loss(real, fake):
    out = np.zeros(len(real))
    for head in range(real.shape[1]):
        out += np.logaddexp(0, -real[:, head]) + np.logaddexp(0, fake[:, head])
    return out


def r1_penalty(slopes, gamma):
    """``slopes`` (B, H, N): each head's gradient in a row's N components."""
    total = slopes.sum(axis=1)
    return gamma / 2 * np.array([row @ row for row in total])
