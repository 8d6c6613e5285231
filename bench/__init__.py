"""The engine of distillbench: problems, runs, records. For scripts and notebooks: ``import distillbench as db``.

``db.run(track, methods)`` does runs and gives their records; ``db.plan`` and ``db.run_plan`` are its two halves; ``db.read_records``
reads a store; ``db.weights`` is the file of a record's student and ``db.judge`` scores it. Mistakes are a ``db.UserError``. Boards, data
frames and pictures are in ``distillbench.leaderboard``. These names are looked up when they are first used: importing this module imports
neither torch nor pandas.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from distillbench.version import VERSION as __version__

if TYPE_CHECKING:
    from distillbench.errors import UserError
    from distillbench.runs.api import judge, plan, read_records, run, run_plan, weights
    from distillbench.runs.plan import RunSpec
    from distillbench.runs.record import Measurement, Record

__all__ = [
    "Measurement",
    "Record",
    "RunSpec",
    "UserError",
    "__version__",
    "judge",
    "plan",
    "read_records",
    "run",
    "run_plan",
    "weights",
]

_HOMES = {
    "errors": ("UserError",),
    "runs.api": ("judge", "plan", "read_records", "run", "run_plan", "weights"),
    "runs.plan": ("RunSpec",),
    "runs.record": ("Measurement", "Record"),
}


def __getattr__(name: str) -> Any:
    """A public name, from the module it lives in; found there once."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
