"""rCM's losses, from the equations, in numpy float64; the tangent is in trigflow.py."""

import numpy as np


def regulariser_gradient(generated, real_denoised, fake_denoised):
    return np.stack([(f - r) / max(np.abs(x - r).mean(), 1e-5) for x, r, f in zip(generated, real_denoised, fake_denoised, strict=True)])


def scm_loss(velocity, tangent, *, held):
    """mean (F - a)^2 with the anchor a = F + g held."""
    anchor = held["velocity"] + held["tangent"]
    return np.array([((f - a) ** 2).mean() for f, a in zip(velocity, anchor, strict=True)])


def regulariser(generated, gradient, *, held=None):
    """mean (x - a)^2 with the anchor a = x - h held."""
    at = held or {"generated": generated, "gradient": gradient}
    anchor = at["generated"] - at["gradient"]
    return np.array([((x - a) ** 2).sum() / x.size for x, a in zip(generated, anchor, strict=True)])
