"""DMD2, from the equations, in numpy float64: distribution matching, and a logistic discriminator."""

import numpy as np


def matching_gradient(generated, real_denoised, fake_denoised):
    return np.stack([(f - r) / np.mean(np.abs(x - r)) for x, r, f in zip(generated, real_denoised, fake_denoised, strict=True)])


def surrogate_loss(generated, gradient, *, held):
    """1/2 mean (x - a)^2 with the anchor a = x - g held."""
    anchor = held["generated"] - held["gradient"]
    return np.array([np.mean((x - a) ** 2) / 2 for x, a in zip(generated, anchor, strict=True)])


def logistic_generator_loss(fake):
    """-log of the probability that the discriminator gives to "real", a mean over heads."""
    return np.array([np.mean([-np.log(1 / (1 + np.exp(-d))) for d in row]) for row in fake])


def logistic_critic_loss(real, fake):
    """Binary cross-entropy of both kinds of sample, a mean over heads."""
    right = [[1 / (1 + np.exp(-r)) for r in row] for row in real], [[1 / (1 + np.exp(f)) for f in row] for row in fake]
    return -np.log(right[0]).mean(1) - np.log(right[1]).mean(1)
