"""The contract checks behind ``distillbench check``: what every method is held to without its author writing a test.

A check passes, fails, is skipped (with the reason why it cannot apply), is unproven (it applies, and what it needs of the author is
missing: an oracle, inputs of its objective) or is exempt (the card says why it cannot hold). An exemption that has become stale fails,
and so does a method for which nothing could be checked.
"""

from __future__ import annotations

from distillbench.checks import calls, objective, rows, students, teacher, training, watched, yardstick  # noqa: F401  (they fill CHECKS)
from distillbench.checks.core import CHECKS, Result, Subject, check_method, results

__all__ = ["CHECKS", "Result", "Subject", "check_method", "results"]
