"""The worlds of a suite: its modules that know the data, the teacher and the metrics of some of its settings."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from distillbench.cards.card import Setting
from distillbench.errors import unknown


@dataclass(frozen=True)
class Worlds:
    """Modules of the package ``package`` among which the option ``world`` of a setting chooses; ``names`` are all there are."""

    package: str
    names: tuple[str, ...]

    def of(self, setting: Setting) -> Any:
        """The module of a setting.

        A setting may come from somebody's record, so nothing but a name on the list is ever imported.

        Raises:
            UserError: the setting names no world, or one that is not on the list (with the nearest).
        """
        name = str(setting.options.get("world"))
        if name not in self.names:
            raise unknown("world", name, self.names)
        return importlib.import_module(f"{self.package}.{name}")
