"""Reading cards from source, and cards as plain data."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any

from distillbench.assets import Asset
from distillbench.cards.card import (
    SLUG,
    Beats,
    Budget,
    Card,
    Choice,
    Flag,
    Gains,
    Integer,
    Metric,
    Paper,
    Real,
    Reported,
    Setting,
    SuiteCard,
    Training,
    Variant,
)
from distillbench.errors import UserError, brief, unknown

CONSTRUCTORS = {
    c.__name__: c
    for c in (
        Card,
        SuiteCard,
        Paper,
        Reported,
        Beats,
        Gains,
        Real,
        Integer,
        Choice,
        Flag,
        Metric,
        Budget,
        Training,
        Asset,
        Setting,
        Variant,
    )
}


def read_card(path: Path) -> Card | SuiteCard:
    """The card in the module at ``path``, read from its source; nothing of the module runs.

    Raises:
        UserError: no ``CARD``, a card that is not a literal, an unknown field, a slug of the wrong form, or a version that
            is no whole number.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except (OSError, ValueError, SyntaxError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as Python ({error})") from error
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "CARD" for t in node.targets):
            card = _literal(node.value, path)
            if not isinstance(card, Card | SuiteCard):
                raise UserError(f"{path}:{node.lineno}: CARD must be a Card or a SuiteCard")
            if not SLUG.fullmatch(str(card.slug)):
                raise UserError(f"{path}:{node.lineno}: the slug {card.slug!r} must be lower-case letters, digits, '-' or '_'")
            if type(card.version) is not int or not 1 <= card.version < 2**31:
                raise UserError(f"{path}:{node.lineno}: the version {brief(str(card.version))!r} must be a whole number from 1 on")
            return card
    raise UserError(f"{path}: has no CARD = Card(...); 'distillbench new method' writes a skeleton")


def _literal(node: ast.expr, path: Path) -> Any:
    if isinstance(node, ast.Call):
        if not (isinstance(node.func, ast.Name) and node.func.id in CONSTRUCTORS):
            raise UserError(f"{path}:{node.lineno}: a card may only call {', '.join(sorted(CONSTRUCTORS))}")
        if any(k.arg is None for k in node.keywords):
            raise UserError(f"{path}:{node.lineno}: a card is a literal: no ** in it")
        positional = [_literal(a, path) for a in node.args]
        named = {str(k.arg): _literal(k.value, path) for k in node.keywords}
        try:
            return CONSTRUCTORS[node.func.id](*positional, **named)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"{path}:{node.lineno}: {error}") from error
    if isinstance(node, ast.List | ast.Tuple):
        items = [_literal(e, path) for e in node.elts]
        return tuple(items)
    if isinstance(node, ast.Dict):
        if any(k is None for k in node.keys):
            raise UserError(f"{path}:{node.lineno}: a card is a literal: no ** in it")
        pairs = [(_literal(k, path), _literal(v, path)) for k, v in zip(node.keys, node.values, strict=True) if k is not None]
        if not all(isinstance(k, str) for k, _ in pairs):
            raise UserError(f"{path}:{node.lineno}: the keys of a dict on a card are strings, as in the record's JSON")
        return dict(pairs)
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        raise UserError(f"{path}:{node.lineno}: a card is a literal: nothing may be computed in it") from None
    if not (value is None or isinstance(value, str | int | float)) or value in (math.inf, -math.inf):
        raise UserError(f"{path}:{node.lineno}: {ast.unparse(node)} has no place in JSON, and a card becomes part of the record")
    return value


def to_data(value: Any) -> Any:
    """``value`` as plain JSON data; a dataclass becomes a dict with its class name under ``_``.

    A field that a later version added is left out at its default, so that what does not use it keeps its identity.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = (f for f in dataclasses.fields(value) if getattr(value, f.name) or not f.metadata.get("later"))
        shown = (f for f in shown if not f.metadata.get("later") or getattr(value, f.name) != f.default)
        fields = {f.name: to_data(getattr(value, f.name)) for f in shown}
        return {"_": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {str(k): to_data(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_data(v) for v in value]
    return value


def from_data(value: Any) -> Any:
    """The inverse of :func:`to_data`. Raises UserError for a class or a field this version does not know."""
    if isinstance(value, dict):
        if "_" in value:
            name = value["_"]
            if str(name) not in CONSTRUCTORS:
                raise unknown("card class", str(name), CONSTRUCTORS)
            try:
                return CONSTRUCTORS[name](**{k: from_data(v) for k, v in value.items() if k != "_"})
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                raise UserError(f"a card in the record does not fit this version: {error}") from error
        return {k: from_data(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(from_data(v) for v in value)
    return value


def resolve(card: Card, given: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters of a run: the card's defaults with ``given`` (strings or values) over them.

    Raises:
        UserError: a name the card does not have (with the nearest one) or a value out of its range.
    """
    # Defaults are parsed like values given: Real(4) and --set x=4 are one run, not 4 and 4.0 with two identities.
    values: dict[str, Any] = {name: hp.parse(hp.default) for name, hp in card.hyperparameters.items()}
    for name, text in given.items():
        if name not in values:
            raise unknown(f"hyper-parameter of {card.slug}", name, values)
        try:
            values[name] = card.hyperparameters[name].parse(text)
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{card.slug}.{name}={brief(str(text))}: {brief(str(error), 200)}; default {values[name]}") from error
    return values
