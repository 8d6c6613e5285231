"""Records that installed packages carry, found through the entry-point group ``distillbench.records``.

An entry point names a package whose folder ``records`` holds them, ``<suite>/<setting>/<method>/`` as in a store; nothing is imported
but the package's parents.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import entry_points
from pathlib import Path


def folders() -> list[Path]:
    """The folders of published records that are there, in the order of their entry points' names."""
    found = []
    for point in sorted(entry_points(group="distillbench.records"), key=lambda p: p.name):
        try:
            spec = importlib.util.find_spec(point.value)
        except Exception:  # a dotted name imports its parents, which may fail in any way; another package takes nothing down
            continue
        found += [Path(place) / "records" for place in (spec.submodule_search_locations or () if spec else ())]
    return [f for f in dict.fromkeys(found) if f.is_dir()]
