"""The cards that records bring, looked at before a page relies on them: a record may come from anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distillbench.cards.card import SLUG, Beats, Card, Gains, Hyperparameter, Metric, Reported, Setting, SuiteCard
from distillbench.errors import UserError
from distillbench.runs.record import Record


def suite_of(record: Record) -> tuple[SuiteCard, str]:
    """The suite's card of a record and the name of its setting. Raises UserError where a page could not rely on it."""
    card, name = record.suite, record.setting_name
    whole = (
        isinstance(card, SuiteCard)
        and _typed(card, title=str, problem=str, metrics=tuple, controls=tuple, settings=dict, summary=str, floor=str, ceiling=str)
        and all(isinstance(m, Metric) and m.better in ("higher", "lower") for m in card.metrics)
        and all(isinstance(m, Metric) for m in card.shown)
        and isinstance(card.settings.get(name), Setting)
    )
    if not whole or not SLUG.fullmatch(card.slug):
        raise UserError("its suite card is not whole")
    return card, name


def method_of(record: Record) -> Card:
    """The method's card of a record. Raises UserError where a page could not rely on it."""
    card = record.method
    whole = (
        isinstance(card, Card)
        and _typed(
            card, title=str, problem=str, equations=dict, hyperparameters=dict, claims=tuple, deviations=tuple, exempt=dict, notes=str
        )
        and all(isinstance(h, Hyperparameter) for h in card.hyperparameters.values())
        and all(isinstance(c, Beats | Gains) or (isinstance(c, Reported) and isinstance(c.value, int | float)) for c in card.claims)
    )
    if not whole or not SLUG.fullmatch(card.slug) or not _typed(record.identity["method"], hyperparameters=dict):
        raise UserError("its method card is not whole")
    return card


def _typed(value: Any, **types: type) -> bool:
    """Whether the named fields have their types: a record from outside is checked before a page relies on it."""
    return all(isinstance(value.get(n) if isinstance(value, dict) else getattr(value, n), t) for n, t in types.items())


def remarks(card: Card, records: Iterable[Record]) -> tuple[str, ...]:
    """What the row of a method says of its card: that a loss sends examples through the network more than once, and that its objective
    is tested against nothing independent (nothing, where nobody knows)."""
    missing = card.objective is not None and any(r.code.get("oracle", "") is None for r in records)
    return (
        *([f"{card.passes} passes per example"] if card.passes > 1 else []),
        *(["unproven: its objective has no independent oracle"] if missing else []),
    )
