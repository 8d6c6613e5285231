"""The worlds of a suite: its modules that know the data, the teacher and the metrics of some of its settings."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from distillbench.cards.card import Setting
from distillbench.errors import unknown

World = TypeVar("World")


@dataclass(frozen=True)
class Worlds(Generic[World]):
    """Modules of the package ``package`` among which the option ``world`` of a setting chooses; ``names`` are all there are.

    ``World`` is the protocol of the functions that each of them has.
    """

    package: str
    names: tuple[str, ...]

    def of(self, setting: Setting) -> World:
        """The module of a setting.

        A setting may come from somebody's record, so nothing but a name on the list is ever imported.

        Raises:
            UserError: the setting names no world, or one that is not on the list (with the nearest).
        """
        return self.named(str(setting.options.get("world")))

    def named(self, name: str) -> World:
        """The module called ``name``. Raises UserError as :meth:`of`."""
        if name not in self.names:
            raise unknown("world", name, self.names)
        return cast(World, importlib.import_module(f"{self.package}.{name}"))
