"""What a kind of problem says of the arguments of its objectives: small inputs, and what each of them is.

A kind lists them by name (``Problem.examples()``), its methods choose their arguments' names from that list, and the contract
checks make every objective check from it. An argument that means something else has another name: a denoiser's answer that the
gradient passes through is not the one that is held, so the two are two entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ROWS, CLASSES, PADDING = 6, 5, 3

Values = Mapping[str, Tensor]
Role = Literal["trained", "frozen", "given"]


class Draw:
    """Random numbers of one set of inputs: ``rows`` examples (tokens, chunks) and ``classes`` classes (entries of a vocabulary)."""

    def __init__(self, seed: int) -> None:
        self.rows, self.classes = ROWS, CLASSES
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal, float64."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform between the two, float64."""
        return low + (high - low) * torch.rand(*shape, generator=self._generator, dtype=torch.float64)

    def integers(self, *shape: int, high: int) -> Tensor:
        """Uniform in [0, high), int64."""
        return torch.randint(high, shape, generator=self._generator)


@dataclass(frozen=True)
class Input:
    """One argument of objectives.

    Attributes:
        draw: makes a value: float64, whole numbers or booleans, within its range.
        role: ``trained``: gradients flow through it.  ``frozen``: what a teacher answers, a target, a weight: whatever graph it
            arrives with, the objective's gradient in it is exactly 0.  ``given``: numbers that no network makes (labels, noise
            levels), of whose gradient nothing is asked.
        rows: whether its first dimension is the examples; False for what all of them share.
        match: of a frozen one: its value where student and teacher agree, from the other values; None where these do not hold what
            it is compared with. An objective with such arguments is a divergence: 0 with gradient 0 there, negative nowhere.
        draws: whether an objective that takes it is an estimate from one draw, whose value is no divergence whatever else it takes.
        pads: where classes are a dimension of it, the same value with ``PADDING`` more that change nothing; in one way, or in as many
            as a kind's other inputs.
        renamed: where classes are a dimension of it, or what it says: the same value when class ``order[i]`` is called i.
        extremes: two values far out, for value and gradient in float32; the two are tried in turn.
        given_as: what the objective is handed for the tensor, where that is not the tensor itself.
        of: who says it, where its name tells: the ``teacher``, or the ``student`` or what learns with it (a fake score). What a method
            hands over under this name must be from there.
    """

    draw: Callable[[Draw], Tensor]
    role: Role = "trained"
    rows: bool = True
    match: Callable[[Values], Tensor | None] | None = None
    draws: bool = False
    pads: tuple[Callable[[Tensor], Tensor], ...] = ()
    renamed: Callable[[Tensor, Tensor], Tensor] | None = None
    extremes: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None
    given_as: Callable[[Tensor], object] | None = None
    of: Literal["teacher", "student", ""] = ""


def like(*names: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[[Values], Tensor | None]:
    """``match``: equal to the first of ``names`` that is there, after ``change``."""

    def match(values: Values) -> Tensor | None:
        return next((change(values[n]) for n in names if n in values), None)

    return match


def widened(value: float) -> Callable[[Tensor], Tensor]:
    """Of ``pads``: ``value`` in the columns of the new classes.   (n, C) -> (n, C + PADDING)."""
    return lambda x: torch.cat([x, x.new_full((len(x), PADDING), value)], 1)


def columns(x: Tensor, order: Tensor) -> Tensor:
    """``renamed``: classes are the second dimension."""
    return x[:, order]


def labels(x: Tensor, order: Tensor) -> Tensor:
    """``renamed``: classes by number."""
    return order.argsort()[x]


def far(size: float, sign: int = 1) -> Callable[[Tensor], Tensor]:
    """``extremes``: every number at plus or minus ``size``, on its own side for ``sign`` 1, on the other for -1."""
    return lambda x: x.sign() * sign * size
