"""What a run uses, counted. Plain numbers, so that a checkpoint can carry them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from distillbench.cards.card import Budget

# How what the processes of one run count becomes the run's number: each counts its own (``sum``), all count the whole (``same``), or
# the slowest decides (``max``).
METERS: dict[str, Literal["sum", "same", "max"]] = {
    "student_examples": "same",  # that the student is updated on
    "student_steps": "same",
    "auxiliary_examples": "same",  # that other networks are updated on; those of networks that end up in the student are its own as well
    "teacher_examples": "sum",  # that the teacher is asked about
    "teacher_forwards": "sum",  # those of them that no cache held
    "teacher_flops": "sum",  # of its answers to them, whether or not a cache held them
    "student_tokens": "sum",  # that the student generates while it trains
    "teacher_tokens": "sum",  # that the teacher generates
    "pairs": "sum",  # that a judge or reward model compares
    "queries": "sum",  # to what answers from outside: a verifier, an endpoint
    "renders": "sum",
    "training_flops": "sum",
    "wall_seconds": "max",
}


class Meter:
    """Counts by name, those of :data:`METERS`."""

    FIELDS = tuple(METERS)

    def __init__(self) -> None:
        self.counts: dict[str, float] = dict.fromkeys(self.FIELDS, 0)
        self._agreed = dict(self.counts)  # what all processes have counted alike
        self._own: dict[str, float] = {}

    def add(self, name: str, amount: float) -> None:
        """Count ``amount`` more of ``name``."""
        self.counts[name] += amount

    def add_own(self, name: str, amount: float) -> None:
        """Count more of what all processes otherwise count alike, which this process has alone."""
        self._own[name] = self._own.get(name, 0) + amount

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is counted inside is the whole run's: every process does the same."""
        before = dict(self.counts)
        yield
        for name, was in before.items():
            self._agreed[name] += self.counts[name] - was

    def agree(self, total: Callable[[Sequence[float]], Sequence[float]] | None = None) -> None:
        """All processes count alike from here on.

        Args:
            total: sums a list over processes; None where there is one.
        """
        names = [name for name, how in METERS.items() if how == "sum"] if total is not None else []
        own = [self.counts[name] - self._agreed[name] for name in names]
        for name, more in zip(names, total(own) if total is not None else own, strict=True):
            self.counts[name] = self._agreed[name] + more
        alike = [name for name, how in METERS.items() if how == "same"] if total is not None else list(self._own)
        apart = [self._own.get(name, 0) for name in alike]
        for name, more in zip(alike, total(apart) if total is not None else apart, strict=True):
            self.counts[name] += more
        self._own = {}
        self._agreed = dict(self.counts)

    def restore(self, counts: dict[str, float]) -> None:
        """Go on from the counts of a checkpoint."""
        self.counts.update(counts)
        self._agreed = dict(self.counts)


class Bill:
    """What was spent, by phase, against a budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.meter = Meter()
        self.excess = 0.0  # how far the step that used up the pace went past its cap
        self.phase = "fit"
        self.phases: dict[str, dict[str, float]] = {}
        self.started: dict[str, float] = dict(self.meter.counts)
        self.ticked = time.perf_counter()

    def tick(self) -> None:
        """Add the wall-clock time since the last tick."""
        now = time.perf_counter()
        self.meter.add("wall_seconds", now - self.ticked)
        self.ticked = now

    def settle(self, name: str) -> None:
        """Bill what was spent since the last settling to phase ``name``."""
        self.tick()
        bill = self.phases.setdefault(name, dict.fromkeys(Meter.FIELDS, 0.0))
        for field, count in self.meter.counts.items():
            bill[field] += count - self.started[field]
        self.started = dict(self.meter.counts)

    def cost(self) -> dict[str, Any]:
        """What was used: ``total`` and ``phases``, with the meters' names."""
        self.settle(self.phase)
        return {"total": dict(self.meter.counts), "phases": {n: b for n, b in self.phases.items() if any(b.values())}}

    def over(self, *, hard: bool = False) -> str | None:
        """Which cap was passed, or None; ``hard``: of those that may not be passed by a step."""
        if hard and "wall_seconds" in self.budget.hard:
            self.tick()
        for name in self.budget.hard if hard else Meter.FIELDS:
            cap = getattr(self.budget, name, None)
            if cap is not None and self.meter.counts[name] > cap + (self.excess if name == self.budget.pace else 0):
                return f"{name} {self.meter.counts[name]:.6g} of {cap:.6g}"
        return None
