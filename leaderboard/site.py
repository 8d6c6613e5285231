"""Boards as a static site: an index, a page per track, method and suite, and each table as CSV, JSON and Markdown.

The same records give the same bytes, whatever their order: nothing here reads a clock. Every link is relative, nothing
is fetched, and everything from a record passes jinja2's escaping.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

import distillbench.leaderboard.export as export
import distillbench.leaderboard.picture as picture
from distillbench.cards.card import SuiteCard
from distillbench.errors import SaveError, UserError
from distillbench.leaderboard.claims import Verdict, verdicts
from distillbench.leaderboard.measured import measured
from distillbench.leaderboard.table import Board, Row, method_page, segment
from distillbench.leaderboard.trust import LEVELS
from distillbench.stats import Interval

TEMPLATES = Path(__file__).parent / "templates"
COPIED = {"style.css": ("style.css", "picture.css"), "sort.js": ("sort.js",)}  # a file of the site -> the templates it is made of
EXPORTS = {"csv": export.to_csv, "json": export.to_json, "md": export.to_markdown}


@dataclass(frozen=True)
class Shown:
    """A board as its pages need it.

    Attributes:
        page: path of its track's page; ``stem`` that of its exports without suffix, both relative to the site.
        digits: metric -> decimals that its values are printed with.
        strips: row key -> where low, score and high lie in 0..100 of the board's range; low and high may be None.
        verdicts: row key -> (row, verdict) for each claim of its card about this board; rows without one are left out.
    """

    board: Board
    page: str
    stem: str
    digits: dict[str, int]
    strips: dict[str, tuple[float | None, float, float | None]]
    ends: tuple[float, ...]
    verdicts: dict[str, list[tuple[Row, Verdict]]]
    picture: picture.Picture | None


def build(boards: Sequence[Board], out: Path) -> Path:
    """Write the site of ``boards`` (as :func:`table.boards` gives them) into ``out``; the path of its index.

    Files of an earlier build are replaced; nothing is deleted.

    Raises:
        UserError: no boards, or ``out`` is a file.  SaveError: something cannot be written.
    """
    if not boards:
        raise UserError("no boards to show: 'distillbench run <suite>/<setting>' makes records")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the site with --out")
    try:
        for path, text in sorted(pages(boards).items()):
            target = out / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text.encode())
    except OSError as error:
        raise SaveError(f"{error.filename or out}: could not be written ({error.strerror}); run the same command again") from error
    return out / "index.html"


def pages(boards: Sequence[Board]) -> dict[str, str]:
    """Every file of the site: path relative to its root -> text."""
    env = environment()
    tracks: dict[str, list[Shown]] = defaultdict(list)
    for board in boards:
        same = tracks[board.track]
        same.append(_shown(board, older=bool(same)))
    newest = [shown[0] for shown in tracks.values()]
    suites: dict[str, list[Shown]] = defaultdict(list)
    methods: dict[str, list[tuple[Shown, Row]]] = defaultdict(list)
    for shown in newest:
        suites[shown.board.suite.slug].append(shown)
    for board_shown in (s for same in tracks.values() for s in same):
        for row in board_shown.board.rows:
            methods[row.page].append((board_shown, row))

    def page(template: str, depth: int, **values: Any) -> str:
        return env.get_template(template).render(root="../" * depth, **values)

    files = {name: "".join((TEMPLATES / part).read_text(encoding="utf-8") for part in parts) for name, parts in COPIED.items()}
    cards = {page: max(rows, key=lambda sr: (sr[1].created, sr[1].key))[1] for page, rows in methods.items()}
    files["index.html"] = page("index.html.j2", 0, suites=dict(sorted(suites.items())), methods=methods, cards=dict(sorted(cards.items())))
    for same in tracks.values():
        files[same[0].page] = page("track.html.j2", 2, shown=same)
        for shown in same:
            files |= {f"{shown.stem}.{kind}": text(shown.board) for kind, text in EXPORTS.items()}
    for path, rows in methods.items():
        row = cards[path]
        run = {s.board.track for s, _ in rows}
        elsewhere = [(row, v) for v in verdicts(rows[0][0].board, row) if v.elsewhere and v.note not in run]
        seen = measured(boards, row.card.problem, row.card.slug)
        values = {"row": row, "card": row.card, "rows": rows, "code": code_path(row), "elsewhere": elsewhere, "seen": seen}
        files[path] = page("method.html.j2", 2, **values)
    for slug, shown_tracks in suites.items():
        files[f"suites/{slug}.html"] = page("suite.html.j2", 1, suite=_newest_suite(shown_tracks), tracks=shown_tracks, methods=methods)
    return files


def code_path(row: Row) -> str:
    """Where a method's file lies in the repository."""
    return f"methods/{row.card.problem.replace('-', '_')}/{row.card.slug}.py"


def _page_of(suite: SuiteCard, slug: str, pages: Collection[str]) -> str | None:
    """Which of ``pages`` is that of the method that a suite calls ``slug``, or None."""
    return next((page for kind in suite.kinds if (page := method_page(kind, slug)) in pages), None)


def _newest_suite(shown: list[Shown]) -> SuiteCard:
    return max(shown, key=lambda s: (s.board.created, s.board.key)).board.suite


def _shown(board: Board, *, older: bool) -> Shown:
    place = f"tracks/{board.suite.slug}/{segment(board.setting_name)}"
    name = board.metric.name
    scored = {r.key: r.intervals[name] for r in board.rows if name in r.intervals}
    scale, _ = picture.scaled([i.estimate for i in scored.values()])
    ends = [scale(v) for i in scored.values() for v in (i.low, i.estimate, i.high) if math.isfinite(v)]
    low, width = (min(ends), (max(ends) - min(ends)) or 1.0) if ends else (0.0, 1.0)

    def at(value: float) -> float | None:
        return round(4 + 92 * (scale(value) - low) / width, 1) if math.isfinite(value) else None

    yardsticks = map(board.reference, (board.suite.floor, board.suite.ceiling))
    controls = [scored[r.key].estimate for r in yardsticks if r and r.key in scored]
    return Shown(
        board=board,
        page=f"{place}.html",
        stem=f"{place}.{board.key[:8]}" if older else place,
        digits={
            m.name: _digits([r.intervals[m.name].estimate for r in board.rows if m.name in r.intervals])
            for m in (board.metric, *board.others)
        },
        strips={key: (at(i.low), at(i.estimate) or 0.0, at(i.high)) for key, i in scored.items()},
        ends=tuple(at(v) or 0.0 for v in controls),
        verdicts={row.key: found for row in board.rows if (found := [(row, v) for v in verdicts(board, row) if not v.elsewhere])},
        picture=picture.picture(board),
    )


# --- how things are printed -----------------------------------------------------------------------------------------


def _digits(values: list[float]) -> int:
    """Decimals that give a typical one of ``values`` four significant digits, so that a column lines up."""
    typical = statistics.median(abs(v) for v in values) if values else 0.0
    return min(6, max(0, 3 - math.floor(math.log10(typical)))) if typical > 0 else 3


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}".replace("-", "−")


def _bounds(interval: Interval, digits: int) -> str:
    return f"[{_number(interval.low, digits)}, {_number(interval.high, digits)}]" if math.isfinite(interval.low) else "no interval"


def _bytes(value: float) -> str:
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}" if value / limit < 1000 else f"{value / limit:.0f} {unit}"
    return f"{value:.0f} B"


def _meter(value: float | None, meter: str) -> str:
    if value is None:
        return "–"
    if meter == "wall_seconds":
        return f"{value:,.1f} s" if value < 1000 else f"{value:,.0f} s"
    return _bytes(value) if meter.endswith("bytes") else picture.si(value)


def _link(url: str | None) -> str | None:
    """The address where it is one of the web; a record may not bring a script."""
    return url if isinstance(url, str) and re.match(r"https?://", url) else None


def environment() -> jinja2.Environment:
    """The templates, with the filters and names that they use."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"number": _number, "bounds": _bounds, "meter": _meter, "link": _link, "si": picture.si}
    env.globals |= {"WIDTH": picture.WIDTH, "HEIGHT": picture.HEIGHT, "LEFT": picture.LEFT, "RIGHT": picture.RIGHT, "TOP": picture.TOP}
    env.globals |= {"BOTTOM": picture.BOTTOM, "METERS": METER_TITLES, "TRUST": LEVELS, "finite": math.isfinite, "page_of": _page_of}
    return env


METER_TITLES = {
    "wall_seconds": "Wall time",
    "training_flops": "FLOPs",
    "student_examples": "Student examples",
    "teacher_examples": "Teacher examples",
    "parameters": "Parameters",
    "peak_memory_bytes": "Peak memory",
}
