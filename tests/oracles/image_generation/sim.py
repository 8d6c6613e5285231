"""Score implicit matching from its equations, in numpy float64."""

import numpy as np


def implicit_loss(generated, real_answer, fake_answer, *, c):
    """- d'(y)^T (f_psi - x) with y = f_psi - f_phi, as the theorem has it for scores."""
    out = []
    for x, real, fake in zip(generated, real_answer, fake_answer, strict=True):
        y = (fake - real).ravel()
        out.append(-(y / np.hypot(np.linalg.norm(y), c)) @ (fake - x).ravel())
    return np.array(out)
