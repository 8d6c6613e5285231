"""``distillbench new``: skeletons that run, and pass every check but for what their author must fill in.

The text of a method's skeleton lies in the room of its kind of problem (``problems/<kind>/method.txt``); a kind that brings none
gets a general one.
"""

from __future__ import annotations

from pathlib import Path

from distillbench.cards import registry
from distillbench.cards.card import SLUG
from distillbench.errors import UserError, unknown
from distillbench.files import write_atomic

HERE = Path(__file__).parent


def write_method(slug: str, problem: str, folder: Path) -> Path:
    """Write ``<folder>/<slug>.py``. Raises UserError for a bad slug, an unknown problem, or a file that is there."""
    known = {e.card.problem for e in registry.suites().values() if e.card is not None}
    if problem not in known:
        raise unknown("kind of problem", problem, known)
    own = HERE.parent / "problems" / problem.replace("-", "_") / "method.txt"
    text = (own if own.is_file() else HERE / "method.txt").read_text(encoding="utf-8")
    return _write(folder / f"{slug}.py", slug, text.replace("{slug}", slug).replace("{problem}", problem))


def write_suite(slug: str, folder: Path) -> Path:
    """Write ``<folder>/<slug with underscores>/__init__.py``. Raises UserError for a bad slug or a file that is there."""
    return _write(
        folder / slug.replace("-", "_") / "__init__.py", slug, (HERE / "suite.txt").read_text(encoding="utf-8").replace("{slug}", slug)
    )


def _write(path: Path, slug: str, text: str) -> Path:
    if not SLUG.fullmatch(slug):
        raise UserError(f"the slug {slug!r} must be lower-case letters, digits, '-' or '_', beginning with a letter")
    if path.exists():
        raise UserError(f"{path}: is there already; choose another slug or folder")
    write_atomic(path, text.encode())
    return path
