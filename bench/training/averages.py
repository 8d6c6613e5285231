"""Moving averages of weights: how much of the old average each update keeps, as a number or as a function of the update.

A schedule is a function from the number of updates made before (0, 1, ...) to a decay in [0, 1], so a resumed run needs nothing saved.
"""

from __future__ import annotations

from collections.abc import Callable

from distillbench.errors import UserError

Decay = float | Callable[[int], float]


def at(decay: Decay, update: int) -> float:
    """The decay at an update, counted from 0. Raises UserError where it is no number in [0, 1]."""
    value = decay(update) if callable(decay) else decay
    if not 0 <= value <= 1:  # NaN included
        where = f" at update {update}" if callable(decay) else ""
        raise UserError(f"the decay of an average is {value}{where}: a number from 0 (the weights themselves) to 1 (never moves) is needed")
    return value


def name(role: str, decay: Decay) -> str:
    """What an average is called where it is exported: ``ema 0.999``, or ``ema`` and the name of its schedule's function."""
    if not callable(decay):
        return f"{role} {decay:g}"
    own = str(getattr(decay, "__name__", type(decay).__name__))
    return f"{role} {'by a schedule' if own == '<lambda>' else own}"
