"""Numbers on the command line: ASCII digits, and never more than a machine can mean. Each failure is one line that says the limit."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

from distillbench.errors import UserError, brief
from distillbench.identity import LAST_SEED, SEEDS

EXAMPLES = 10**15
WORKERS = 1024
SECONDS = 7 * 24 * 3600.0
MARGIN = 1e9

WHOLE = re.compile(r"[0-9]{1,19}")  # more digits pass every limit above, and int() need not read them
DIGITS = re.compile(r"[0-9]+")
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


def count(most: int) -> Callable[[str], int]:
    """A reader of whole numbers from 1 to ``most``, for argparse."""

    def read(text: str) -> int:
        if not DIGITS.fullmatch(text) or not text.strip("0"):
            raise argparse.ArgumentTypeError(f"{brief(text)!r} is not a positive whole number")
        value = _whole(text)
        if value is None or value > most:
            raise argparse.ArgumentTypeError(f"{brief(text)} is more than {most:,}, the most there can be")
        return value

    return read


def amount(most: float, what: str) -> Callable[[str], float]:
    """A reader of numbers from 0 to ``most``; ``what`` says of what (``a number of seconds``)."""

    def read(text: str) -> float:
        value = float(text) if DECIMAL.fullmatch(text) else math.nan
        if not value >= 0:
            raise argparse.ArgumentTypeError(f"{brief(text)!r} is not {what}: 0 or more")
        if value > most:
            raise argparse.ArgumentTypeError(f"{brief(text)} is more than {most:,.0f}, the most there can be")
        return value

    return read


def seeds(text: str) -> list[int]:
    """The seeds that ``5`` (0 to 4) or ``5-9`` stand for.

    Raises:
        UserError: neither, none at all, more than :data:`SEEDS` of them, or one past :data:`LAST_SEED`.
    """
    first, dash, last = text.partition("-")
    shown = brief(text)
    if not DIGITS.fullmatch(first) or (dash and not DIGITS.fullmatch(last)):
        raise UserError(f"--seeds {shown}: give a number of seeds (5) or a range (5-9)")
    low, high = (_whole(first), _whole(last)) if dash else (0, _whole(first))
    if low is None or high is None or (dash and high > LAST_SEED):
        limit = f"a seed is at most {LAST_SEED}" if dash else f"at most {SEEDS:,} seeds at once"
        raise UserError(f"--seeds {shown}: {limit}")
    chosen = range(low, high + 1) if dash else range(high)
    if not chosen:
        raise UserError(f"--seeds {shown}: at least one seed, counted from 0")
    if len(chosen) > SEEDS:
        raise UserError(f"--seeds {shown}: at most {SEEDS:,} seeds at once")
    return list(chosen)


def _whole(text: str) -> int | None:
    """The number of ASCII digits, or None where it is past every limit."""
    digits = text.lstrip("0") or "0"
    return int(digits) if WHOLE.fullmatch(digits) else None
