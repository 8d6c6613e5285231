"""What a method achieves here, in words and numbers: computed from records, never written on a card."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distillbench.cards.card import Metric
from distillbench.leaderboard.table import Board, Row, reference
from distillbench.stats import LEVEL, Interval, paired_difference, paired_p

Outcome = Literal["better", "worse", "not separated", "undecided"]


def compare(row: Row, other: Row, metric: Metric) -> tuple[Interval | None, Outcome, str]:
    """By how much ``row`` is better than ``other`` in ``metric`` (which both are scored in), what follows, and why nothing does.

    The difference is paired over shared seeds, in the metric's unit and positive where ``row`` is better, with its 95% interval; None
    where they share fewer than two.
    """
    mine, theirs = row.scores[metric.name], other.scores[metric.name]
    ahead = paired_difference(mine, theirs) if metric.better == "higher" else paired_difference(theirs, mine)
    if ahead is None:
        return None, "undecided", "fewer than two shared seeds"
    if over := [r.name for r in (row, other) if r.status == "over_budget"]:
        return ahead, "undecided", f"not at equal cost: {', '.join(over)} over budget"
    if not ahead.excludes(0):
        return ahead, "not separated", "the interval holds 0"
    if paired_p(mine, theirs, min(row.steps[metric.name], other.steps[metric.name])) >= 1 - LEVEL:
        # A few equal differences have no spread and so an interval of no width; the test knows the score's own steps.
        return ahead, "not separated", "within the rounding of the score"
    return ahead, "better" if ahead.low > 0 else "worse", ""


@dataclass(frozen=True)
class Against:
    """A method beside a control, as :func:`compare` has it. ``strongest`` where no control of those that the suite names scores better."""

    control: str
    strongest: bool
    difference: Interval | None
    outcome: Outcome
    note: str

    @property
    def text(self) -> str:
        """The comparison as a part of a sentence."""
        name, comma = (f"{self.control}, the strongest control", ",") if self.strongest else (self.control, "")
        if self.difference is None:
            return f"not compared with {name}: {self.note}"
        estimate, low, high = self.difference.estimate, self.difference.low, self.difference.high
        if self.outcome == "better":
            return f"better than {name}{comma} by {estimate:.3g} [{low:.3g}, {high:.3g}]"
        if self.outcome == "worse":
            return f"worse than {name}{comma} by {-estimate:.3g} [{-high:.3g}, {-low:.3g}]"
        if self.outcome == "not separated":
            return f"not separated from {name}: {estimate:+.3g} [{low:.3g}, {high:.3g}]"
        return f"{estimate:+.3g} [{low:.3g}, {high:.3g}] beside {name}, {self.note}"


@dataclass(frozen=True)
class Measured:
    """What one board says of a method.

    Attributes:
        row: the method's row that others are compared with: at the card's defaults where there is one.
        mean, deviation: of the primary metric over ``seeds`` scored seeds, in its unit; None where there are too few.
        against: the suite's floor, then the strongest of its controls on this board where that is another one; none for a control.
    """

    track: str
    metric: Metric
    row: Row
    seeds: int
    mean: float | None
    deviation: float | None
    against: tuple[Against, ...]

    @property
    def text(self) -> str:
        """The whole in a few words, for people."""
        if self.mean is None:
            return f"no score: {self.row.reason or self.row.status}"
        spread = "" if self.deviation is None else f" ± {self.deviation:.2g}"
        score = f"{self.metric.name} {self.mean:.3g}{spread} over {self.seeds} seed{'s' * (self.seeds != 1)}"
        said = [a.text for a in self.against]
        worse = [a.control for a in self.against if a.outcome == "worse"]
        noise = [a.control for a in self.against if a.outcome == "not separated"]
        gains = [f"It gains nothing over {' and '.join(worse)}."] if worse else []
        gains += [f"It gains nothing over {' and '.join(noise)} that its seeds can show."] if noise else []
        return " ".join(["; ".join([score, *said]) + ".", *gains])


def measured(boards: Sequence[Board], problem: str, slug: str) -> tuple[Measured, ...]:
    """What the newest board of every track says of the method ``slug`` that solves ``problem``; nothing for a track without it."""
    found = []
    for board in boards:
        own = [r for r in board.rows if (r.card.problem, r.card.slug) == (problem, slug) and not r.older]
        if own and not board.differs:
            found.append(_measured(board, reference(own, slug) or own[0]))
    return tuple(found)


def _measured(board: Board, row: Row) -> Measured:
    metric = board.metric
    values = list(row.scores.get(metric.name, {}).values())
    return Measured(
        track=board.track,
        metric=metric,
        row=row,
        seeds=len(values),
        mean=statistics.fmean(values) if values else None,
        deviation=statistics.stdev(values) if len(values) > 1 else None,
        against=tuple(_against(board, row)) if values and not row.control else (),
    )


def _against(board: Board, row: Row) -> list[Against]:
    metric = board.metric
    slugs = dict.fromkeys((board.suite.floor, *board.suite.strongest))
    scored = {slug: r for slug in slugs if (r := board.reference(slug)) is not None and metric.name in r.scores}
    able = {slug: r.intervals[metric.name].estimate for slug, r in scored.items() if slug in board.suite.strongest}
    best = None if not able else (max if metric.better == "higher" else min)(able, key=lambda slug: able[slug])
    return [Against(scored[s].name, s == best, *compare(row, scored[s], metric)) for s in scored if s in (board.suite.floor, best)]
