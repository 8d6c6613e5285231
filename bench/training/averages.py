"""Moving averages of weights: how much of the old average each update keeps, as a number or as a function of the update.

A schedule is a function from the number of updates made before (0, 1, ...) to a decay in [0, 1], so a resumed run needs nothing saved.
Any function will do; those below are the usual ones, and say what they are called in an export.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from distillbench.errors import UserError

Decay = float | Callable[[int], float]


@dataclass(frozen=True)
class Warm:
    """min(decay, (1 + k) / (10 + k)) at update k: an average that forgets its first steps."""

    decay: float

    def __call__(self, update: int) -> float:
        """The decay at an update, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update))

    def __str__(self) -> str:
        return f"warm to {self.decay:g}"


@dataclass(frozen=True)
class HalfLife:
    """EDM's average: what an update adds counts half after ``examples`` examples, at first after the share ``ramp`` of those seen so far.

    decay = 2^(-B / min(examples, ramp B k)) at update k, batches of B = ``batch_size`` examples; ``ramp`` None is no ramp. Nothing of
    the initial weights is kept at update 0 of a ramp.
    """

    examples: float
    batch_size: int
    ramp: float | None = 0.05

    def __call__(self, update: int) -> float:
        """The decay at an update, counted from 0."""
        half = self.examples if self.ramp is None else min(self.examples, self.ramp * self.batch_size * update)
        return 0.5 ** (self.batch_size / half) if half > 0 else 0.0

    def __str__(self) -> str:
        return f"half-life {self.examples:g} examples" + ("" if self.ramp is None else f", ramp {self.ramp:g}")


@dataclass(frozen=True)
class ConsistencyTarget:
    """The target network of consistency training (Song et al. 2023, appendix C): mu(k) = exp(s0 ln mu0 / N(k)), update k of K = ``steps``.

    N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 are the noise levels in use, from s0 to s1 + 1: see :meth:`levels`.
    """

    s0: int
    s1: int
    mu0: float
    steps: int

    def levels(self, update: int) -> int:
        """N(k)."""
        place = min(update, self.steps) / max(self.steps, 1)
        return math.ceil(math.sqrt(place * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2) - 1) + 1

    def __call__(self, update: int) -> float:
        """The decay at an update, counted from 0."""
        return math.exp(self.s0 * math.log(self.mu0) / self.levels(update))

    def __str__(self) -> str:
        return f"of consistency training (s0 {self.s0}, s1 {self.s1}, mu0 {self.mu0:g})"


def at(decay: Decay, update: int) -> float:
    """The decay at an update, counted from 0. Raises UserError where it is no number in [0, 1]."""
    value = decay(update) if callable(decay) else decay
    if not 0 <= value <= 1:  # NaN included
        where = f" at update {update}" if callable(decay) else ""
        raise UserError(f"the decay of an average is {value}{where}: a number from 0 (the weights themselves) to 1 (never moves) is needed")
    return value


def name(role: str, decay: Decay) -> str:
    """What an average is called where it is exported: ``ema 0.999``, ``ema warm to 0.999``, or a function's own name."""
    if not callable(decay):
        return f"{role} {decay:g}"
    if isinstance(decay, Warm | HalfLife | ConsistencyTarget):
        return f"{role} {decay}"
    own = str(getattr(decay, "__name__", type(decay).__name__))
    return f"{role} {'by a schedule' if own == '<lambda>' else own}"
