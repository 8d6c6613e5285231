"""Line charts as SVG: panels beside each other that share a legend, with intervals as bars. Readable on light and on dark ground."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from distillbench.leaderboard.picture import log_ticks, padded, si, ticks
from distillbench.stats import Interval

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 330, 62.0, 446.0, 34.0, 282.0
ROW = 20  # height of a line of the legend

# Colours that differ for colour-blind eyes too (Okabe and Ito 2008), darker on light ground than on dark; dashes say it again.
STYLE = """
.chart { font: 12px system-ui, sans-serif; --ink: #1b1d22; --soft: #5d626d; --line: #e3e4e6;
  --c0: #0072b2; --c1: #c24e00; --c2: #00795a; --c3: #a8497f; --c4: #8a6100; --c5: #3d4149; }
@media (prefers-color-scheme: dark) { .chart { --ink: #e9eaec; --soft: #a2a8b3; --line: #2c3036;
  --c0: #56b4e9; --c1: #ff9350; --c2: #2fd3a4; --c3: #e69ac5; --c4: #f0c94b; --c5: #c6cad2; } }
.chart text { fill: var(--ink); } .chart .soft { fill: var(--soft); } .chart .head { font-weight: 600; }
.chart .grid { stroke: var(--line); } .chart .across { stroke: var(--soft); stroke-dasharray: 2 4; }
.chart polyline { fill: none; stroke-width: 2; } .chart .bar { stroke-width: 1.2; }
"""
DASHES = ("", "7 4", "2 3", "9 3 2 3", "12 4", "5 2")


@dataclass(frozen=True)
class Line:
    """A curve: positions on the axis, and an interval at each; without bounds (NaN) no bar is drawn."""

    name: str
    x: tuple[float, ...]
    y: tuple[Interval, ...]


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        across: horizontal lines, (height, what it says).  log_x, log_y: logarithmic axes, for positive values.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    across: tuple[tuple[float, str], ...] = ()
    log_x: bool = False
    log_y: bool = False


def draw(panels: Sequence[Panel], title: str) -> str:
    """The panels side by side, with one legend for the lines of all of them (a name has one colour); every text is escaped.

    Raises:
        ValueError: nothing to draw.
    """
    names = list(dict.fromkeys(line.name for p in panels for line in p.lines))
    if not names or any(not line.x for p in panels for line in p.lines):
        raise ValueError("a chart needs lines with points")
    rows = math.ceil(len(names) / len(panels))
    width, height = WIDTH * len(panels), HEIGHT + ROW * rows + 8
    out = [
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(title)}">',
        f"<style>{STYLE}</style>",
    ]
    for i, panel in enumerate(panels):
        out += [f'<g transform="translate({WIDTH * i} 0)">', *_panel(panel, names), "</g>"]
    for i, name in enumerate(names):
        x, y = LEFT + WIDTH * (i // rows), HEIGHT + ROW * (i % rows) + 8
        out.append(f'<polyline points="{x},{y} {x + 30},{y}" {_pen(i)}/><text x="{x + 38}" y="{y + 4}">{html.escape(name)}</text>')
    return "\n".join([*out, "</svg>\n"])


def _pen(place: int) -> str:
    return f'style="stroke:var(--c{place % 6})" stroke-dasharray="{DASHES[place % len(DASHES)]}"'


def _panel(panel: Panel, names: list[str]) -> list[str]:
    def scale(value: float, log: bool, floor: float) -> float:
        return math.log10(max(value, floor)) if log else value

    seen = [i for line in panel.lines for i in line.y]
    floor = min([i.estimate for i in seen if i.estimate > 0], default=1.0) / 3  # an interval's end below it is drawn there
    heights = [v for i in seen for v in (i.estimate, i.low, i.high) if math.isfinite(v)] + [v for v, _ in panel.across]
    places = [x for line in panel.lines for x in line.x]
    ends = [scale(v, panel.log_y, floor) for v in heights]
    y_low, y_high = padded(min(ends), max(ends), 0.06)
    across = [scale(v, panel.log_x, 1e-12) for v in places]
    x_low, x_high = padded(min(across), max(across), 0.04)

    def at(value: float) -> float:
        return round(LEFT + (scale(value, panel.log_x, 1e-12) - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1)

    def up(value: float) -> float:
        return round(BOTTOM - (scale(value, panel.log_y, floor) - y_low) / (y_high - y_low) * (BOTTOM - TOP), 1)

    out = [f'<text class="head" x="{LEFT}" y="20">{html.escape(panel.title)}</text>']
    for t in log_ticks(y_low, y_high) if panel.log_y else ticks(y_low, y_high):
        value = 10**t if panel.log_y else t
        y = up(value)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>')
        out.append(f'<text class="soft" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.4g}</text>')
    marks = sorted(set(places))
    out += [f'<text class="soft" x="{at(x)}" y="{BOTTOM + 18}" text-anchor="middle">{si(x)}</text>' for x in marks]
    out.append(f'<text class="soft" x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 38}" text-anchor="middle">{html.escape(panel.x_label)}</text>')
    middle = (TOP + BOTTOM) / 2
    out.append(
        f'<text class="soft" transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{html.escape(panel.y_label)}</text>'
    )
    for value, says in panel.across:
        y = up(value)
        out.append(f'<line class="across" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>')
        out.append(f'<text class="soft" x="{LEFT + 4}" y="{y - 4}">{html.escape(says)}</text>')
    for line in panel.lines:
        place = names.index(line.name)
        points = [(at(x), i) for x, i in zip(line.x, line.y, strict=True)]
        for x, i in points:
            if math.isfinite(i.low):
                out.append(f'<line class="bar" x1="{x}" x2="{x}" y1="{up(i.low)}" y2="{up(i.high)}" style="stroke:var(--c{place % 6})"/>')
            out.append(f'<circle cx="{x}" cy="{up(i.estimate)}" r="3" style="fill:var(--c{place % 6})"/>')
        out.append(f'<polyline points="{" ".join(f"{x},{up(i.estimate)}" for x, i in points)}" {_pen(place)}/>')
    return out
