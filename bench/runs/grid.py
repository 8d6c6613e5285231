"""A grid of runs: those done before are found in the store, the others are run and shown while they go."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence

from distillbench.errors import UserError
from distillbench.runs import executors
from distillbench.runs.executors import Outcome
from distillbench.runs.plan import RunSpec
from distillbench.runs.progress import Display
from distillbench.runs.record import Record
from distillbench.runs.store import Store


def complete(
    specs: Sequence[RunSpec],
    store: Store,
    title: str,
    *,
    workers: int | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
) -> dict[str, Outcome]:
    """The outcome of every spec by its id: a record, or the error that kept the run from having one.

    Args:
        workers: runs at once; the cores by default, 1 on a GPU.
        checkpoint_seconds: the most work that a kill can lose.
        progress: say on stderr what is running and how long is left.

    Raises:
        UserError: runs are to be done and torch is not installed.  SaveError: the store cannot be written.
    """
    results: dict[str, Outcome] = {}
    # One of several processes of 'accelerate launch' leaves this question to the runner, where all agree on the answer.
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    for spec in specs:
        done = None if distributed else store.find(spec)
        if done is not None:
            results[spec.id] = done
    left = [s for s in specs if s.id not in results]
    if not left:
        return results
    if importlib.util.find_spec("torch") is None:
        raise UserError("runs need torch, which is not installed: pip install 'distillbench[train]'")
    at_once = 1 if distributed else workers or _cores()

    def do(watch: Callable[[str, str, int, int], None], tell: Callable[[str, str], None]) -> None:
        for spec, outcome in executors.run_all(left, store, workers=at_once, watch=watch, checkpoint_seconds=checkpoint_seconds):
            results[spec.id] = outcome
            tell(spec.name, _line(outcome))

    if progress:
        print(f"{title}: {len(specs)} runs, {len(results)} done before, {len(left)} to do, {at_once} at once", file=sys.stderr)
        with Display(len(left), title) as display:
            do(display.watch, display.done)
    else:
        do(lambda name, phase, done, total: None, lambda name, line: None)
    return results


def _cores() -> int:
    """Runs at once: one on a GPU, else the cores this process may use."""
    if os.path.exists("/dev/nvidia0"):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _line(outcome: Outcome) -> str:
    """How a run ended: its status unless that is ok, its score, and why."""
    if not isinstance(outcome, Record):
        return f"not run: {outcome}"
    value = outcome.value(outcome.suite.primary)
    score = f"{outcome.suite.primary} {value:.4f}" if value is not None else ""
    return " ".join(x for x in (outcome.status if outcome.status != "ok" else "", score, outcome.reason or "") if x)
