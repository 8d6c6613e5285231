"""Distribution matching, from the equations, in numpy float64."""

import numpy as np


def matching_gradient(generated, real_denoised, fake_denoised):
    out = np.zeros_like(generated)
    for row in range(len(generated)):
        size = np.abs(generated[row] - real_denoised[row]).mean()
        if size > 0:
            out[row] = (fake_denoised[row] - real_denoised[row]) / size
    return out


def surrogate_loss(generated, gradient, *, held=None):
    """1/2 mean (x - a)^2 with the anchor a = x - g held."""
    at = held or {"generated": generated, "gradient": gradient}
    anchor = at["generated"] - at["gradient"]
    return np.array([((x - a) ** 2).sum() / (2 * x.size) for x, a in zip(generated, anchor, strict=True)])
