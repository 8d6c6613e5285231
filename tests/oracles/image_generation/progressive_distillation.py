"""Progressive distillation as the paper writes it: z = alpha x + sigma eps with alpha^2 + sigma^2 = 1, in numpy float64.

Algorithm 2 of arXiv 2202.00512 and its losses of section 4, for a noise level s = sigma / alpha.
"""

import numpy as np


def cosine_and_sine(s):
    """alpha, sigma of noise level s = sigma / alpha."""
    angle = np.arctan(s)
    return np.cos(angle), np.sin(angle)


def ddim(predict_x, z, s, after):
    """One DDIM step: z' = alpha' x + sigma' eps, with eps = (z - alpha x) / sigma."""
    alpha, sigma = cosine_and_sine(s)
    alpha_after, sigma_after = cosine_and_sine(after)
    x = predict_x(z, s)
    return alpha_after * x + sigma_after * (z - alpha * x) / sigma


def target(predict_x, z, s, middle, after):
    """x~ = (z'' - (sigma''/sigma) z) / (alpha'' - (sigma''/sigma) alpha), for one row; ``predict_x(z, s)`` is the teacher's x."""
    alpha, sigma = cosine_and_sine(s)
    alpha_after, sigma_after = cosine_and_sine(after)
    end = ddim(predict_x, ddim(predict_x, z, s, middle), middle, after)
    ratio = sigma_after / sigma
    return (end - ratio * z) / (alpha_after - ratio * alpha)


def loss(x, x_target, z, s, *, weight):
    """The mean squared errors of x, of eps, the larger of the two, or that of v = alpha eps - sigma x, for one row."""
    alpha, sigma = cosine_and_sine(s)
    eps, eps_target = (z - alpha * x) / sigma, (z - alpha * x_target) / sigma
    x_error, eps_error = np.mean((x - x_target) ** 2), np.mean((eps - eps_target) ** 2)
    v_error = np.mean((alpha * eps - sigma * x - alpha * eps_target + sigma * x_target) ** 2)
    return {"constant": x_error, "snr": eps_error, "truncated": max(x_error, eps_error), "snr+1": v_error}[weight]


def progressive_loss(denoised, target, sigma, *, weight):
    """Row by row; the errors do not depend on z, so it may be 0."""
    return np.array([loss(x, y, 0.0, s, weight=weight) for x, y, s in zip(denoised, target, sigma, strict=True)])
