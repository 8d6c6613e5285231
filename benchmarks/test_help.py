"""``distillbench --help`` answers in under 0.3 s: it imports nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def test_help(benchmark: Any) -> None:
    command = [sys.executable, "-m", "distillbench", "--help"]
    benchmark.pedantic(lambda: subprocess.run(command, check=True, capture_output=True), rounds=10, warmup_rounds=1)
    assert benchmark.stats.stats.min < 0.3
