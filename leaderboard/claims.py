"""Claims are executable: what a card says its paper achieves, against what was measured on a board."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distillbench.cards.card import Beats, Claim, Gains, Metric, Reported
from distillbench.leaderboard.measured import compare
from distillbench.leaderboard.table import Board, Row
from distillbench.stats import Interval

Outcome = Literal["reproduced", "not reproduced", "undecided", "not measured here"]


@dataclass(frozen=True)
class Verdict:
    """A claim beside its measurement.

    Attributes:
        claim: in words.  source: where the paper says it.  metric: its name; values are in its unit.
        reported: the paper's number, or None for a comparison.
        measured: the score's interval, or for a comparison that of the paired difference, positive where the claim holds.
        note: why it is undecided or not measured.  elsewhere: whether it is about another track than the board's.
    """

    claim: str
    source: str
    metric: str
    reported: float | None
    measured: Interval | None
    outcome: Outcome
    note: str = ""
    elsewhere: bool = False


def verdicts(board: Board, row: Row) -> tuple[Verdict, ...]:
    """The verdict on each claim of a row's card, in the card's order."""
    return tuple(_verdict(board, row, claim) for claim in row.card.claims)


def _verdict(board: Board, row: Row, claim: Claim) -> Verdict:
    name = claim.metric or board.suite.primary
    metric = next((m for m in board.suite.metrics if m.name == name), None)
    if isinstance(claim, Beats):
        text, reported = f"beats {claim.method} in {name}", None
        measured, outcome, note = _ahead(board, row, board.reference(claim.method), claim.method, metric)
    elif isinstance(claim, Gains):
        text, reported = f"beats itself with {claim.hyperparameter}={claim.over} in {name}", None
        measured, outcome, note = _gains(board, row, claim, metric)
    else:
        text, reported = f"{name} on {_place(claim)}{f' ({claim.note})' if claim.note else ''}", float(claim.value)
        measured, outcome, note = _reported(board, row, claim, metric)
    elsewhere = isinstance(claim, Reported) and not _here(board, claim)
    if not elsewhere and any(m.name == name for m in board.suite.shown):
        measured = None if reported is None else row.intervals.get(name)
        outcome, note = "undecided", f"neither more nor less {name} is better"
    return Verdict(text, claim.source, name, reported, measured, outcome, note, elsewhere)


def _here(board: Board, claim: Reported) -> bool:
    return claim.suite == board.suite.slug and claim.setting in (None, board.setting_name)


def _place(claim: Reported) -> str:
    return f"{claim.suite}/{claim.setting}" if claim.setting else claim.suite


Judgement = tuple[Interval | None, Outcome, str]


def _gains(board: Board, row: Row, claim: Gains, metric: Metric | None) -> Judgement:
    name = f"{row.card.slug} with {claim.hyperparameter}={claim.over}"
    wanted = {**row.hyperparameters, claim.hyperparameter: claim.over}
    if wanted == row.hyperparameters:
        return None, "not measured here", "this is the row that others are compared with"
    same = [r for r in board.rows if r.entry == {**row.entry, "hyperparameters": wanted} and not r.older]
    return _ahead(board, row, same[0] if same else None, name, metric)


def _ahead(board: Board, row: Row, other: Row | None, name: str, metric: Metric | None) -> Judgement:
    """Whether ``row`` is ahead of ``other``, which the claim calls ``name``."""
    if metric is None:
        return None, "not measured here", f"{board.suite.slug} does not judge by this metric here"
    if other is None or metric.name not in other.scores:
        return None, "not measured here", f"no scored {name} on this board"
    if metric.name not in row.scores:
        return None, "not measured here", "no score"
    ahead, outcome, why = compare(row, other, metric)
    if outcome in ("not separated", "undecided"):
        return ahead, "undecided", why
    return ahead, "reproduced" if outcome == "better" else "not reproduced", f"against {other.name}" if other.name != name else ""


def _reported(board: Board, row: Row, claim: Reported, metric: Metric | None) -> Judgement:
    if not _here(board, claim):
        return None, "not measured here", _place(claim)
    if metric is None:
        return None, "not measured here", f"{board.suite.slug} has no metric {claim.metric}"
    score = row.intervals.get(metric.name)
    if score is None:
        return None, "not measured here", "no score"
    if len(row.scores[metric.name]) < 3:
        return score, "undecided", "fewer than 3 seeds"
    if row.status == "over_budget":
        return score, "undecided", "over budget"
    reached = score.high >= claim.value if metric.better == "higher" else score.low <= claim.value
    return score, "reproduced" if reached else "not reproduced", ""
