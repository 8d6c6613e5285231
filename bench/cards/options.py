"""A setting's options as a world reads them: a frozen dataclass with a field for each option, in place of names in strings.

The card keeps options as literals, since identities are computed from them; what is wrong with one is said before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from distillbench.assets import PLACES
from distillbench.cards.card import Setting
from distillbench.errors import UserError, brief, unknown

Options = TypeVar("Options")


def options_of(setting: Setting, kind: type[Options], name: str = "the setting") -> Options:
    """The options of ``setting`` as a ``kind``, whose fields are the options that its world knows, each with its type and its default.

    Types are int, float, bool, str, ``Literal``, ``tuple[T, ...]`` (written as a list), ``dict`` and dataclasses of these (written as a
    dict). ``world``, which chose the world, and where assets lie (:func:`assets.locate`) are no fields.

    Args:
        name: of the setting, for messages.

    Raises:
        UserError: an option that ``kind`` does not have (with the nearest), one that is missing, or one of another type.
    """
    elsewhere = {"world", *(f"{role}_{place}" for role in setting.assets for place in PLACES)}
    return _made(kind, {k: v for k, v in setting.options.items() if k not in elsewhere}, "option", name)


def _made(kind: type[Options], given: Mapping[str, Any], what: str, of: str) -> Options:
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in given:
        if key not in fields:
            raise unknown(f"{what} of {of}", key, fields)
    values = {}
    for key, field in fields.items():
        if key in given:
            try:
                values[key] = _read(hints[key], given[key], f"{what} {key!r} of {of}")
            except TypeError:
                wanted = hints[key].__name__ if isinstance(hints[key], type) else str(hints[key]).removeprefix("typing.")
                raise UserError(f"{what} {key!r} of {of}: must be {wanted}, not {brief(repr(given[key]), 60)}") from None
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"{what} {key!r} of {of} is missing; it has {', '.join(sorted(given)) or 'none'}")
    return kind(**values)


def _read(hint: Any, value: Any, where: str) -> Any:
    """``value`` as a ``hint``. Raises TypeError where it is none."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal and value in parts:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_read(parts[0], v, where) for v in value)
    if (origin or hint) is dict and isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return _made(hint, value, "part", where)  # type: ignore[arg-type]
    if hint is int and _number(value) and float(value).is_integer():
        return int(value)
    if hint is float and _number(value):
        return float(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise TypeError


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
