"""A board as a data frame, CSV, JSON and Markdown: one table, one set of numbers (six significant digits)."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from distillbench.leaderboard.table import METERS, Board, Row
from distillbench.stats import Interval

NOTHING = Interval(math.nan, math.nan, math.nan)


def frame(board: Board) -> pd.DataFrame:
    """The board as a table, one line per row in the board's order, numbers at full precision and NaN where there is none.

    Columns: rank (Int64), method, control, status, trust, seeds (scored), seeds_of (run by any row), score, low, high (in the unit
    of the board's metric), gap_closed, gap_low, gap_high (ratios), gap_reason, ``cost.<meter>`` (means over seeds),
    ``metrics.<name>`` with ``.low`` and ``.high``, tune_trials, reason, version, distribution (empty for
    a loose file), hyperparameters (JSON).
    """
    table = pd.DataFrame([_cells(board, row) for row in board.rows])
    return table.astype({"rank": "Int64"})


def _cells(board: Board, row: Row) -> dict[str, Any]:
    score, gap = row.intervals.get(board.metric.name, NOTHING), row.gap or NOTHING
    cells: dict[str, Any] = {
        "rank": row.rank if row.rank is not None else pd.NA,
        "method": row.name,
        "control": row.control,
        "status": row.status,
        "trust": row.trust,
        "seeds": len(row.scores.get(board.metric.name, {})),
        "seeds_of": len(board.seeds),
        "score": score.estimate,
        "low": score.low,
        "high": score.high,
        "gap_closed": gap.estimate,
        "gap_low": gap.low,
        "gap_high": gap.high,
        "gap_reason": row.gap_reason,
    }
    for meter in METERS:
        value = row.cost[meter]
        cells[f"cost.{meter}"] = math.nan if value is None else value
    for metric in board.others:
        value_of = row.intervals.get(metric.name, NOTHING)
        cells |= {
            f"metrics.{metric.name}": value_of.estimate,
            f"metrics.{metric.name}.low": value_of.low,
            f"metrics.{metric.name}.high": value_of.high,
        }
    return cells | {
        "tune_trials": row.trials,
        "reason": row.reason,
        "version": row.card.version,
        "distribution": row.entry["distribution"] or "",
        "hyperparameters": json.dumps(row.hyperparameters, sort_keys=True),
    }


def rounded(value: Any) -> Any:
    """A cell as plain JSON data: floats at six significant digits, None for what is missing."""
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value.item() if hasattr(value, "item") else value


def to_csv(board: Board) -> str:
    """The table as CSV; an empty cell is a missing number."""
    return frame(board).to_csv(index=False, float_format="%.6g", lineterminator="\n")


def to_json(board: Board) -> str:
    """The table as JSON: the track, what is measured, and ``rows`` with the columns of :func:`frame`."""
    rows = [{str(k): rounded(v) for k, v in cells.items()} for cells in frame(board).to_dict(orient="records")]
    about = {
        "track": board.track,
        "board": board.key,
        "metric": board.metric.name,
        "unit": board.metric.unit,
        "better": board.metric.better,
        "newest_record": board.created,
        "differs": list(board.differs),
    }
    return json.dumps({**about, "rows": rows}, indent=1, allow_nan=False) + "\n"


def to_markdown(board: Board) -> str:
    """The table as a Markdown table; text is escaped, so a reason can neither break the table nor bring its own HTML."""
    table = frame(board)
    lines = [f"| {' | '.join(map(_cell, table.columns))} |", f"|{' --- |' * len(table.columns)}"]
    lines += [f"| {' | '.join(_cell(rounded(v)) for v in cells.values())} |" for cells in table.to_dict(orient="records")]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    for char, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\r", " "), ("\n", " ")):
        text = text.replace(char, safe)
    return text
