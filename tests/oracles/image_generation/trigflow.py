"""TrigFlow and continuous-time consistency, from the papers' own formulas in their own variables, in numpy float64."""

import numpy as np


def consistency_function(x, t, network, *, sigma_data):
    """f(x_t, t) = cos(t) x_t - sin(t) d F(x_t / d, t)."""
    return np.cos(t) * x - np.sin(t) * sigma_data * network(x / sigma_data, t)


def tangent(x, t, network, teacher, *, sigma_data, r=1.0, step=1e-5):
    """sCM's rearranged tangent in TrigFlow variables; dF is a central difference along cos(t) sin(t) (dx_t/dt / d, 1).

    x: (B, N), t: (B, 1); network and teacher: F(x / d, t) -> (B, N).
    """
    d, u = sigma_data, x / sigma_data
    flow = d * teacher(u, t)
    du, dt = np.cos(t) * np.sin(t) * flow / d, np.cos(t) * np.sin(t)
    change = (network(u + step * du, t + step * dt) - network(u - step * du, t - step * dt)) / (2 * step)
    return -(np.cos(t) ** 2) * (d * network(u, t) - flow) - r * (np.cos(t) * np.sin(t) * x + d * change)


def normalised(g, *, c):
    return np.stack([row / (np.sqrt((row**2).sum()) + c) for row in g])


def scm_loss(velocity, anchor, g):
    """mean (F - F^- - g)^2 with the anchor F^- held."""
    return np.array([((f - a - h) ** 2).sum() / f.size for f, a, h in zip(velocity, anchor, g, strict=True)])


def gaussian_teacher(x, t, *, std, sigma_data):
    """dx_t/dt of N(0, std^2) in TrigFlow."""
    variance = (np.cos(t) * std) ** 2 + (np.sin(t) * sigma_data) ** 2
    return x * np.sin(t) * np.cos(t) * (sigma_data**2 - std**2) / variance


def gaussian_solution(x, t, *, std, sigma_data):
    """f*(x_t, t): where that flow ends at t = 0."""
    return x * std / np.sqrt((np.cos(t) * std) ** 2 + (np.sin(t) * sigma_data) ** 2)
