"""Rectified flow as the paper writes it: noise at time 0, data at time 1, a velocity network; in numpy float64."""

import numpy as np


def velocity_loss(velocity, noise, data, time):
    """|v(X_t, t) - (X_1 - X_0)|^2 of every row, a mean over components; X_t = t X_1 + (1 - t) X_0."""
    rows = []
    for z, x, t in zip(noise, data, time, strict=True):
        rows.append(np.mean((velocity(t * x + (1 - t) * z, t) - (x - z)) ** 2))
    return np.array(rows)


def gaussian_velocity(x, t, *, mean, std):
    """E[X_1 - X_0 | X_t = x] for independent X_0 ~ N(0, 1), X_1 ~ N(mean, std^2)."""
    variance = t**2 * std**2 + (1 - t) ** 2
    return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)


def flow_loss(denoised, clean, time):
    """|v - (z - x_0)|^2 with t = 1 at the noise, on x_t = (1 - t) x_0 + t z of a noise that does not matter; v = (x_t - D) / t."""
    rows = []
    for d, x, t in zip(denoised, clean, time, strict=True):
        z = np.cos(np.arange(x.size)).reshape(x.shape)
        rows.append(np.mean(((1 - t) * x + t * z - d - t * (z - x)) ** 2) / t**2)
    return np.array(rows)
