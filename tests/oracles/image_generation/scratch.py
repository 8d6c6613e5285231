"""EDM's own loss, from table 1 of arXiv 2206.00364, in numpy float64."""

import numpy as np


def denoising_loss(denoised, clean, sigma, *, sigma_data):
    """(s^2 + d^2) / (s d)^2 times the mean squared error of each row."""
    rows = zip(denoised, clean, sigma, strict=True)
    return np.array([(s**2 + sigma_data**2) / (s * sigma_data) ** 2 * np.mean((x - y) ** 2) for x, y, s in rows])
