"""Records in, boards out: tables, ranks, a static site. Needs no torch. For notebooks: ``from distillbench import leaderboard``.

``leaderboard.board(track, *folders)`` is the board of a track, ``leaderboard.frame(board)`` its data frame, ``leaderboard.draw(board)`` its
picture. These names are looked up when they are first used: importing this module imports no pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillbench.leaderboard.api import Drawing, board, draw
    from distillbench.leaderboard.export import frame
    from distillbench.leaderboard.table import Board, Row

__all__ = ["Board", "Drawing", "Row", "board", "draw", "frame"]

_HOMES = {"api": ("Drawing", "board", "draw"), "export": ("frame",), "table": ("Board", "Row")}


def __getattr__(name: str) -> Any:
    """A public name, from the module it lives in; found there once."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
