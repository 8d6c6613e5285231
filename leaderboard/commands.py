"""``distillbench board``: build the site, show one table or one method. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillbench.leaderboard.measured import Measured
    from distillbench.leaderboard.table import Board


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``board build``, ``board show`` and ``board method``; each sets ``call``, a function from the arguments to the exit code."""
    board = subparsers.add_parser("board", help="leaderboards from records", description="Leaderboards, computed from records alone.")
    commands = board.add_subparsers(dest="board_command", required=True, metavar="command")

    build = commands.add_parser("build", help="write the static site", description="Write the site of all boards; open its index.html.")
    build.add_argument("--out", type=Path, default=Path("site"), metavar="DIR", help="folder of the site (default: site)")
    build.add_argument("--json", action="store_true", help="print what was built as JSON")
    build.set_defaults(call=_build)

    show = commands.add_parser("show", help="print the board of a track", description="Print the newest board of a track.")
    show.add_argument("track", metavar="SUITE/SETTING")
    show.add_argument("--metric", metavar="M", help="judge in this metric of the suite instead of its primary one")
    show.add_argument("--json", action="store_true", help="print the rows as JSON")
    show.set_defaults(call=_show)

    method = commands.add_parser("method", help="print what was measured of a method", description="Print a method's card, measured here.")
    method.add_argument("method", metavar="METHOD", help="a slug, or problem/slug where several problems have it")
    method.add_argument("--json", action="store_true", help="print the comparisons as JSON")
    method.set_defaults(call=_method)

    for parser in (build, show, method):
        parser.add_argument(
            "--records",
            type=Path,
            nargs="+",
            action="extend",
            metavar="DIR",
            help="folders of records, or stores that 'distillbench run' made (default: the published records)",
        )


def _boards(folders: list[Path] | None) -> tuple[list[Board], list[str]]:
    """The boards of the records below ``folders``, and the lines about unusable and repeated ones that went to stderr.

    Raises:
        UserError: a folder is missing, or there is not one record to show.
    """
    from distillbench.leaderboard.api import load

    bad: list[str] = []

    def say(line: str) -> None:
        bad.append(line)
        print(line, file=sys.stderr)

    return load(folders or [], say), bad


def _build(args: argparse.Namespace) -> int:
    found, bad = _boards(args.records)
    from distillbench.leaderboard.site import build

    index = build(found, args.out)
    if args.json:
        tracks = sorted({b.track for b in found})
        print(json.dumps({"index": str(index), "tracks": tracks, "boards": len(found), "problems": bad}))
    else:
        print(index)
    return 0


def _show(args: argparse.Namespace) -> int:
    found, _ = _boards(args.records)
    from distillbench.leaderboard.api import newest

    board = newest(found, args.track, args.metric)
    if args.json:
        print(json.dumps(_rows(board), indent=1, allow_nan=False))
        return 0
    if board.metric.better is None:
        order = board.suite.primary
        print(f"{board.metric.name}: neither more nor less is better, so nothing is ranked; rows in the order of {order}", file=sys.stderr)
    if sys.stdout.isatty():
        _print_rich(board, older=sum(b.track == args.track for b in found) - 1)
    else:
        for line in _lines(board):
            print("\t".join(" ".join(cell.split()) for cell in line))
    return 0


def _method(args: argparse.Namespace) -> int:
    found, _ = _boards(args.records)
    from distillbench.errors import UserError, unknown
    from distillbench.leaderboard.measured import measured

    cards = {f"{r.card.problem}/{r.card.slug}": r.card for b in reversed(found) for r in b.rows}
    fitting = {key: card for key, card in cards.items() if args.method in (key, card.slug)}
    if not fitting:
        raise unknown("method with a record", args.method, {c.slug for c in cards.values()})
    if len(fitting) > 1:
        raise UserError(f"several problems have a method called {args.method!r}: say {' or '.join(sorted(fitting))}")
    [(key, card)] = fitting.items()
    seen = measured(found, card.problem, card.slug)
    if args.json:
        about = {"method": key, "version": card.version, "title": card.title, "notes": card.notes}
        print(json.dumps({**about, "tracks": [_measured(m) for m in seen]}, indent=1, allow_nan=False))
        return 0
    paper = f": {card.paper.title} ({card.paper.year})" if card.paper else ""
    for line in (f"{key} version {card.version}, {card.title}{paper}", *(f"{m.track}\t{m.text}" for m in seen), card.notes):
        if line:
            print("\t".join(" ".join(cell.split()) for cell in line.split("\t")))
    return 0


def _measured(m: Measured) -> dict[str, Any]:
    """A track of ``board method --json``: values in the metric's unit, differences positive where the method is better."""
    from distillbench.leaderboard.export import NOTHING, rounded

    against = []
    for a in m.against:
        d = a.difference or NOTHING
        bounds = {"difference": rounded(d.estimate), "low": rounded(d.low), "high": rounded(d.high)}
        against.append({"control": a.control, "strongest": a.strongest, **bounds, "outcome": a.outcome, "note": a.note})
    return {
        "track": m.track,
        "entry": m.row.name,
        "status": m.row.status,
        "metric": m.metric.name,
        "unit": m.metric.unit,
        "better": m.metric.better,
        "seeds": m.seeds,
        "mean": rounded(m.mean),
        "deviation": rounded(m.deviation),
        "against": against,
        "text": m.text,
    }


def _rows(board: Board) -> list[dict[str, Any]]:
    """The rows of ``board show --json``: scores in the metric's unit, gaps as ratios, ``cost`` meter -> mean over seeds."""
    from distillbench.leaderboard.export import NOTHING, rounded

    out = []
    for row in board.rows:
        score, gap = row.intervals.get(board.metric.name, NOTHING), row.gap or NOTHING
        cells = {
            "method": row.name,
            "control": row.control,
            "status": row.status,
            "seeds": len(row.scores.get(board.metric.name, {})),
            "score": score.estimate,
            "low": score.low,
            "high": score.high,
            "gap_closed": gap.estimate,
            "gap_low": gap.low,
            "gap_high": gap.high,
            "rank": row.rank,
        }
        out.append({k: rounded(v) for k, v in cells.items()} | {"cost": {m: rounded(v) for m, v in row.cost.items()}})
    return out


def _lines(board: Board) -> list[list[str]]:
    """For pipes: a heading and one line per row, every cell one word or sentence."""
    lines = [
        [
            "rank",
            "method",
            board.metric.name,
            "low",
            "high",
            "gap_closed",
            "gap_low",
            "gap_high",
            "seeds",
            "wall_seconds",
            "status",
            "reason",
        ]
    ]
    for row, data in zip(board.rows, _rows(board), strict=True):
        numbers = [data[k] for k in ("score", "low", "high", "gap_closed", "gap_low", "gap_high")]
        seeds, wall = f"{data['seeds']}/{len(board.seeds)}", data["cost"]["wall_seconds"]
        status = "control" if row.control and row.status == "ok" else row.status
        printed = ["" if v is None else f"{v:.6g}" for v in (row.rank, *numbers, wall)]
        lines.append([printed[0], row.name, *printed[1:7], seeds, printed[7], status, row.reason])
    return lines


def _print_rich(board: Board, older: int) -> None:
    """For people: fits 80 columns; reasons stand below the table instead of squeezing it."""
    import math

    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    metric = board.metric
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("rank", "method", metric.name, "gap closed", "seeds", "wall s", "status"):
        text = name in ("method", "status")
        table.add_column(Text(name), justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in board.rows:
        score, gap, wall = row.intervals.get(metric.name), row.gap, row.cost["wall_seconds"]
        half = f" ± {score.high - score.estimate:.2g}" if score and math.isfinite(score.high) else ""
        cells = (
            str(row.rank or "–"),
            row.name,
            f"{score.estimate:.4g}{half}" if score else "–",
            f"{gap.estimate:.0%} [{100 * gap.low:.0f}, {100 * gap.high:.0f}]" if gap else "–",
            f"{len(row.scores.get(metric.name, {}))}/{len(board.seeds)}",
            "–" if wall is None else f"{wall:.4g}",
            "control" if row.control and row.status == "ok" else row.status.replace("_", " "),
        )
        table.add_row(*map(Text, cells), style="dim" if row.rank is None else "bold" if row.rank == 1 else "")
    lines = [f"{row.name}: {row.reason}" for row in board.rows if row.reason]
    rule = f"{metric.better} is better; 95% intervals over seeds; ties share a rank" if metric.better else "95% intervals over seeds"
    lines.append(f"{metric.name} in {metric.unit}, {rule}")
    if older:
        lines.append(f"{older} earlier board{'s' * (older > 1)} of this track: 'distillbench board build' shows what differs")
    console = Console(highlight=False)
    console.print(Text(board.track, style="bold"))
    console.print(table)
    for line in lines:
        console.print(Text(line, style="dim"))
