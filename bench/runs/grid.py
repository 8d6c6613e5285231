"""A grid of runs: those done before are found in the store, the others are run and shown while they go."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence

from distillbench.errors import UserError
from distillbench.runs import executors
from distillbench.runs.executors import Outcome
from distillbench.runs.launcher import place
from distillbench.runs.plan import RunSpec
from distillbench.runs.progress import Display
from distillbench.runs.record import Record
from distillbench.runs.store import Store

Vouch = Callable[[RunSpec], str | None]


def complete(
    specs: Sequence[RunSpec],
    store: Store,
    title: str,
    *,
    workers: int | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
    vouch: Vouch | None = None,
) -> dict[str, Outcome]:
    """The outcome of every spec by its id: a record, or the error that kept the run from having one.

    Args:
        workers: runs at once; the cores by default, 1 on a GPU.
        checkpoint_seconds: the most work that a kill can lose.
        progress: say on stderr what is running and how long is left.
        vouch: asked where a record was made by other code under the fingerprints that are committed today: None where today's code
            holds to them, else what moved. Without it such a run is done again.

    Raises:
        UserError: runs are to be done and torch is not installed.  SaveError: the store cannot be written.
    """
    results: dict[str, Outcome] = {}
    # One of several processes of 'accelerate launch' leaves this question to the runner, where all agree on the answer.
    distributed = place()[1] > 1
    for spec in specs:
        done = None if distributed else store.find(spec) or _vouched(spec, store, vouch)
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


def _vouched(spec: RunSpec, store: Store, vouch: Vouch | None) -> Record | None:
    """The record of other code that stands for today's, since both pass the same fingerprints."""
    held = spec.code.fingerprint
    if vouch is None or held is None or not any(r.code.get("fingerprint") == held for r in store.made(spec)):
        return None
    moved = vouch(spec)
    if moved is None:
        store.passed(spec)
        return store.find(spec)
    print(f"{spec.name} is run again: its code has changed, and {moved}", file=sys.stderr)
    return None


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
