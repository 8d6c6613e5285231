"""Quality against cost as geometry; the template turns it into SVG, so every label is escaped in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distillbench.leaderboard.table import Board, Row

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 68.0, 742.0, 16.0, 346.0
LETTER, LINE = 6.6, 15  # a 12 px letter's mean width and a line's height, to keep labels apart
CROWD = 60  # rows that may have a label besides the controls
METERS = {"training_flops": "training FLOPs", "wall_seconds": "wall seconds", "student_examples": "student examples"}

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Tick:
    """A position on an axis (px) and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A row in the picture: a point with its error bar, or a line across where the row has no cost of its own.

    Attributes:
        kind: ``method``, ``control`` or ``over``.  x: None for a line.  y, low, high: px; low and high None without interval.
        text: where the label fits, its words, position and anchor; otherwise empty, and ``title`` says it on hovering.
    """

    kind: str
    title: str
    x: float | None
    y: float
    low: float | None
    high: float | None
    text: str = ""
    text_x: float = 0.0
    text_y: float = 0.0
    anchor: str = "start"


@dataclass(frozen=True)
class Picture:
    """Everything the template draws, in px of a WIDTH x HEIGHT box."""

    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]


def picture(board: Board) -> Picture | None:
    """Score against cost of every scored row, or None where no row has both. Over a range of 10x either axis is logarithmic.

    The cost is training FLOPs where all methods were metered in them, else wall seconds, else student examples.
    """
    name = board.metric.name
    rows = [r for r in board.rows if name in r.intervals]
    methods = [r for r in rows if not r.control] or rows
    meter = next((m for m in METERS if all((r.cost[m] or 0) > 0 for r in methods)), None)
    if not rows or meter is None:
        return None
    costs = {r.key: cost for r in rows if (cost := r.cost[meter] or 0) > 0}
    if not costs:
        return None
    scale, wide = scaled([r.intervals[name].estimate for r in rows])
    ends = [scale(v) for r in rows for i in [r.intervals[name]] for v in (i.estimate, i.low, i.high) if math.isfinite(v)]
    y_low, y_high = padded(min(ends), max(ends), 0.06)
    log = max(costs.values()) > 10 * min(costs.values())
    values = [math.log10(c) if log else c for c in costs.values()]
    x_low, x_high = padded(min(values), max(values), 0.08)

    def x(value: float) -> float:
        return round(LEFT + (value - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (scale(value) - y_low) / (y_high - y_low) * (BOTTOM - TOP), 1)

    marks = []
    for row in rows:
        score = row.intervals[name]
        across = x(math.log10(costs[row.key]) if log else costs[row.key]) if row.key in costs else None
        bar = (y(score.low), y(score.high)) if math.isfinite(score.low) else (None, None)
        kind = "control" if row.control else "method" if row.status == "ok" else "over"
        marks.append(Mark(kind, _title(board, row), across, y(score.estimate), *bar))
    x_ticks = [Tick(x(at), si(10**at if log else at)) for at in (log_ticks if log else ticks)(x_low, x_high)]
    return Picture(
        x_label=f"{METERS[meter]} (mean over seeds{', log' if log else ''})",
        y_label=f"{name} ({board.metric.unit}, {board.metric.better} is better{', log' if wide else ''})",
        x_ticks=tuple(x_ticks),
        y_ticks=tuple(Tick(y(at), f"{at:.6g}") for at in ([10**t for t in log_ticks(y_low, y_high)] if wide else ticks(y_low, y_high))),
        marks=tuple(_labelled(marks, [r.name for r in rows])),
    )


def scaled(scores: Sequence[float]) -> tuple[Callable[[float], float], bool]:
    """How scores are placed on an axis, and whether that is by their logarithm: where all are positive and span more than 10x.

    On a logarithmic axis what lies far below the smallest score (the end of an interval) is drawn at a third of it.
    """
    if not scores or not 0 < 10 * min(scores) < max(scores):
        return lambda value: value, False
    floor = min(scores) / 3
    return lambda value: math.log10(max(value, floor)), True


def si(value: float) -> str:
    """A count with three digits and an SI prefix: 62500 -> ``62.5k``, 1.2e11 -> ``120G``."""
    for limit, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{float(f'{value / limit:.3g}'):g}{prefix}"
    return f"{value:.3g}"


def _title(board: Board, row: Row) -> str:
    score = row.intervals[board.metric.name]
    interval = f" [{score.low:.4g}, {score.high:.4g}]" if math.isfinite(score.low) else ""
    over = "" if row.status == "ok" else ", over budget"
    return f"{row.name}: {score.estimate:.4g}{interval} {board.metric.unit}, {len(row.seeds)} seeds{over}"


def padded(low: float, high: float, margin: float) -> tuple[float, float]:
    """The range with room at both ends; a range of one point gets a width."""
    room = (high - low) * margin or abs(high) * 0.1 or 1.0
    return low - room, high + room


def ticks(low: float, high: float) -> list[float]:
    """Four to ten round positions: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """As :func:`ticks`, for an axis of logarithms to base 10: powers of ten, and 2 and 5 times them where there is room."""
    factors = (1, 2, 5) if high - low < 3 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1, max(1, int(high - low) // 8))
    return [at for p in powers for f in factors if low <= (at := p + math.log10(f)) <= high]


def _labelled(marks: list[Mark], names: list[str]) -> list[Mark]:
    """The marks with labels where they cover nothing, best rows first; a crowd stays readable because the rest go without."""
    taken: list[Box] = []
    for m in marks:
        if m.x is not None:
            taken.append((m.x - 6, m.y - 6, m.x + 6, m.y + 6))
            if m.low is not None and m.high is not None:
                taken.append((m.x - 4, min(m.low, m.high), m.x + 4, max(m.low, m.high)))
        else:
            taken.append((LEFT, m.y - 1, RIGHT, m.y + 1))
    out = []
    for place, (m, name) in enumerate(zip(marks, names, strict=True)):
        if place >= CROWD and m.kind != "control":
            out.append(m)
            continue
        text = name if len(name) <= 36 else f"{name[:34]}…"
        width = len(text) * LETTER
        if m.x is None:
            places = [(x, m.y + dy, anchor) for x, anchor in ((RIGHT - 4, "end"), (LEFT + 6, "start")) for dy in (-5.0, 14.0)]
        else:
            top, bottom = (min(m.low, m.high), max(m.low, m.high)) if m.low is not None and m.high is not None else (m.y, m.y)
            sides = [(m.x + dx, m.y + dy, anchor) for dy in (4.0, -8.0, 16.0) for dx, anchor in ((10, "start"), (-10, "end"))]
            places = [*sides, (m.x, min(top, m.y - 6) - 5, "middle"), (m.x, max(bottom, m.y + 6) + 14, "middle")]
        for at, base, anchor in places:
            left = at - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = (left, base - LINE + 4, left + width, base + 3)
            inside = box[0] >= LEFT and box[2] <= RIGHT and box[1] >= TOP - 12 and box[3] <= BOTTOM
            if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                taken.append(box)
                m = Mark(m.kind, m.title, m.x, m.y, m.low, m.high, text, round(at, 1), round(base, 1), anchor)
                break
        out.append(m)
    return out
