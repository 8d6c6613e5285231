"""Reading cards from source, and cards as plain data."""

from __future__ import annotations

import ast
import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

from distillbench.assets import Asset
from distillbench.cards.card import (
    SLUG,
    Beats,
    Budget,
    Caps,
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
)
from distillbench.errors import UserError, brief, unknown
from distillbench.files import SETTINGS

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
        Caps,
        Asset,
        Setting,
    )
}


GONE = {"Card": ("results",), "SuiteCard": ("variants",)}  # fields that cards in older records carry: left out on reading


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


def read_settings(module: str) -> dict[str, Setting]:
    """The settings in ``settings.toml`` beside a suite's ``module`` (its ``__file__``): name -> setting, in the file's order.

    A table is a setting. Its fields are those of :class:`Setting`; the asset of a role R (data, teacher or another one) is the table
    ``assets.R``. A table with ``of`` is a setting that differs from an earlier one in its summary and in some ``options``, fields of
    ``training`` or further assets, or in ``metrics``.

    Raises:
        UserError: the file is missing or no TOML, or a setting is none; says which and why.
    """
    path = Path(module).with_name(SETTINGS)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error})") from error
    settings: dict[str, Setting] = {}
    for name, table in tables.items():
        try:
            if not isinstance(table, dict):
                raise ValueError("is no table")
            settings[name] = _setting(_plain(table), settings)
        except KeyError as error:
            raise UserError(f"{path}: setting {name}: the table has no {error.args[0]}") from error
        except (TypeError, ValueError, AttributeError, UserError) as error:
            raise UserError(f"{path}: setting {name}: {error}") from error
    return settings


def _setting(table: dict[str, Any], known: dict[str, Setting]) -> Setting:
    assets = {role: Asset(**about) for role, about in table.pop("assets", {}).items()}
    if "of" not in table:
        parts: dict[str, Any] = {"budget": Budget(**table.pop("budget")), "training": Training(**table.pop("training"))}
        parts["caps"] = Caps(**table.pop("caps", {}))
        return Setting(**table, **parts, assets=assets)
    of, summary, metrics = table.pop("of"), table.pop("summary", ""), table.pop("metrics", ())
    training, options = table.pop("training", {}), table.pop("options", {})
    if of not in known:
        raise unknown("setting above it", str(of), known)
    if table or not summary:
        raise ValueError("it has no summary of its own" if not summary else f"beside 'of' it cannot change {', '.join(sorted(table))}")
    base = known[of]
    return dataclasses.replace(
        base,
        summary=summary,
        metrics=metrics or base.metrics,
        training=dataclasses.replace(base.training, **training),
        options={**base.options, **options},
        assets={**base.assets, **assets},
    )


def _plain(value: Any) -> Any:
    """A value of TOML as a card's literal gives it: tuples for arrays, and nothing that has no place in JSON."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return tuple(_plain(v) for v in value)
    if not isinstance(value, str | int | float) or not math.isfinite(value if isinstance(value, float) else 0):
        raise ValueError(f"{value} has no place in JSON, and a card becomes part of the record")
    return value


def _literal(node: ast.expr, path: Path) -> Any:
    if isinstance(node, ast.Call):
        if ast.unparse(node) == "read_settings(__file__)":
            return read_settings(str(path))
        if not (isinstance(node.func, ast.Name) and node.func.id in CONSTRUCTORS):
            raise UserError(f"{path}:{node.lineno}: a card may only call {', '.join(sorted(CONSTRUCTORS))} and read_settings(__file__)")
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
        named = {f: getattr(value, f.name) for f in dataclasses.fields(value)}
        absent = {f for f, v in named.items() if f.metadata.get("later") and (v == f.default or not (v or f.default))}  # () is []
        fields = {f.name: to_data(v) for f, v in named.items() if f not in absent}
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
                gone = {"_", *GONE.get(name, ())}
                return CONSTRUCTORS[name](**_as_today(name, {k: from_data(v) for k, v in value.items() if k not in gone}))
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                raise UserError(f"a card in the record does not fit this version: {error}") from error
        return {k: from_data(v) for k, v in value.items()}
    if isinstance(value, list):
        return tuple(from_data(v) for v in value)
    return value


def _as_today(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a class as they are now: records, which never change, hold settings that had three for their assets."""
    if name == "Setting" and "assets" not in fields:
        before = {"data": fields.pop("data", None), "teacher": fields.pop("teacher", None), **fields.pop("others", {})}
        fields["assets"] = {role: asset for role, asset in before.items() if asset is not None}
    return fields


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
