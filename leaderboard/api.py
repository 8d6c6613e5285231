"""What scripts and notebooks call; ``distillbench.leaderboard`` itself shows these names. Needs no torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distillbench.errors import UserError, unknown
from distillbench.files import write_atomic
from distillbench.leaderboard.picture import picture
from distillbench.leaderboard.table import Board, boards, by_metric
from distillbench.leaderboard.trust import marked, read
from distillbench.runs.record import read_records

PUBLISHED = Path(__file__).parent / "records"


def board(track: str, *folders: str | os.PathLike[str], metric: str | None = None) -> Board:
    """The newest board of a track, computed from the records in ``folders``.

    Args:
        track: ``suite/setting``.
        folders: stores that runs went to, or folders of records; the published records where none is named.
        metric: judge in this metric of the suite instead of its primary one.

    Raises:
        UserError: a folder is missing, or has no record of this track; the metric is unknown.

    Warns:
        UserWarning: a file is no record or a damaged one, or fits no board, or a student stands twice; one warning each.
    """
    found = load([Path(f) for f in folders], lambda line: warnings.warn(line, stacklevel=4))
    return newest(found, track, metric)


def load(folders: Sequence[Path], say: Callable[[str], None]) -> list[Board]:
    """The boards of the records below ``folders``, of the published ones where none is named; ``say`` hears of each unusable
    record and each student that stands twice.

    Raises:
        UserError: a folder is missing, or there is not one record to show.
    """
    given = list(folders) or ([PUBLISHED] if PUBLISHED.is_dir() else [])
    records, unreadable = read_records(*given)
    found, unfit = boards(records)
    found = marked(found, read(given))
    bad = unreadable + unfit
    for line in bad:
        say(line)
    if not found:
        where = ", ".join(map(str, folders)) if folders else "the published records"
        why = f"none of {len(bad)} could be used" if bad else "only tuning runs" if records else "no records"
        raise UserError(
            f"{where}: {why}; make some with 'distillbench run <suite>/<setting> --method <slug> --seeds 5 --out runs' "
            "and name their folder: --records runs"
        )
    return found


def newest(found: Sequence[Board], track: str, metric: str | None) -> Board:
    """The newest of a track's boards, judged in ``metric``. Raises UserError for an unknown track or metric, with the nearest name."""
    same = next((b for b in found if b.track == track), None)
    if same is None:
        raise unknown("track", track, {b.track for b in found})
    return by_metric(same, metric)


@dataclass(frozen=True)
class Drawing:
    """A picture as SVG text, whole in itself. A notebook shows it; :meth:`save` writes it."""

    svg: str = field(repr=False)

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture to a file and return its path. Raises SaveError where it cannot be written."""
        target = Path(path)
        write_atomic(target, self.svg.encode())
        return target


def draw(board: Board) -> Drawing:
    """Quality against cost of a board's scored rows, with 95% intervals: the picture of the board's page.

    Raises:
        UserError: no row has a score and a cost.
    """
    from distillbench.leaderboard.site import TEMPLATES, environment

    drawn = picture(board)
    if drawn is None:
        raise UserError(f"{board.track}: no row has both a score and a cost, so there is nothing to draw")
    style = (TEMPLATES / "picture.css").read_text(encoding="utf-8")
    return Drawing(environment().get_template("picture.svg.j2").render(p=drawn, board=board, style=style))
