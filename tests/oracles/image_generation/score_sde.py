"""The three SDEs in numpy and scipy float64: drift and noise from the paper, moments by integrating their equations of motion."""

import numpy as np
from scipy.integrate import quad, solve_ivp

BETA, SIGMA = (0.1, 20.0), (0.01, 50.0)


def drift(kind, t):
    """f(x, t) / x."""
    return 0.0 if kind == "ve" else -(BETA[0] + t * (BETA[1] - BETA[0])) / 2


def noise(kind, t):
    """g(t)^2."""
    if kind == "ve":
        return (SIGMA[0] * (SIGMA[1] / SIGMA[0]) ** t) ** 2 * 2 * np.log(SIGMA[1] / SIGMA[0])
    beta = BETA[0] + t * (BETA[1] - BETA[0])
    integral = quad(lambda s: BETA[0] + s * (BETA[1] - BETA[0]), 0, t)[0]
    return beta if kind == "vp" else beta * (1 - np.exp(-2 * integral))


def moments(kind, t, mean, variance):
    """Mean and variance of x_t for x_0 with ``mean`` and ``variance``: dm/dt = f m, dV/dt = 2 f V + g^2.

    For VE the data stand at level sigma(0), not 0.
    """
    start = variance + (SIGMA[0] ** 2 if kind == "ve" else 0.0)

    def move(s, y):
        return [drift(kind, s) * y[0], 2 * drift(kind, s) * y[1] + noise(kind, s)]

    return solve_ivp(move, (0, t), [mean, start], method="DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
