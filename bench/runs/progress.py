"""What is running and how long is left: bars on a terminal, a line now and then elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any, Self


class Display:
    """Progress of many runs.   ``with Display(total, title) as display: display.watch(...); display.done(...)``."""

    def __init__(self, total: int, title: str) -> None:
        self._total = total
        self._title = title
        self._finished = 0
        self._first = 0.0
        self._said = 0.0
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                console=Console(stderr=True), transient=False,
            )  # fmt: skip
            self._bars.start()
            self._all = self._bars.add_task(self._title, total=self._total)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def watch(self, name: str, phase: str, done: int, total: int) -> None:
        """A run has made ``done`` of ``total`` steps of a phase."""
        if self._bars is None:
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(f"  {name}", total=total)
        self._bars.update(self._tasks[name], description=f"  {name} ({phase})", completed=done, total=total)

    def done(self, name: str, line: str) -> None:
        """A run is finished; ``line`` says how."""
        self._finished += 1
        now = time.monotonic()
        self._first = self._first or now  # starting workers up takes long and happens once: not what the rest will take
        since = self._finished - 1
        left = (
            f"about {(now - self._first) / since * (self._total - self._finished):.0f} s left" if since > 3 else "estimating the time left"
        )
        if self._bars is not None:
            if name in self._tasks:
                self._bars.remove_task(self._tasks.pop(name))
            self._bars.console.print(f"{name:<30} {line}", highlight=False, markup=False)
            self._bars.update(self._all, completed=self._finished)
        elif self._finished == self._total or time.monotonic() - self._said > 5:
            self._said = time.monotonic()
            print(f"[{self._finished}/{self._total}] {name}: {line}; {left}", file=sys.stderr, flush=True)
