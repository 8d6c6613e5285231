"""rCM's regulariser, from the equations, in numpy float64; its consistency half is in trigflow.py."""

import numpy as np


def regulariser_gradient(generated, real_denoised, fake_denoised):
    return np.stack([(f - r) / max(np.abs(x - r).mean(), 1e-5) for x, r, f in zip(generated, real_denoised, fake_denoised, strict=True)])


def regulariser(generated, anchor):
    """mean (x - a)^2 with the anchor a = x - h held."""
    return np.array([((x - a) ** 2).sum() / x.size for x, a in zip(generated, anchor, strict=True)])
