"""How many runs become done: one after the other, or several at once on this machine. Both give the same records."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence

from distillbench.errors import SaveError, UserError
from distillbench.runs.lanes import Lane
from distillbench.runs.plan import RunSpec
from distillbench.runs.record import Record
from distillbench.runs.runner import execute
from distillbench.runs.store import Store

Watch = Callable[[str, str, int, int], None]  # (run's name, phase, steps done, steps in all)
Outcome = Record | UserError


def run_all(
    specs: Sequence[RunSpec], store: Store, *, workers: int, watch: Watch, checkpoint_seconds: float
) -> Iterator[tuple[RunSpec, Outcome]]:
    """Do ``specs`` and yield each with its record, or with the error that kept it from having one, as they finish.

    Args:
        workers: runs at once, each in a lane of its own; progress of all is told one after the other.

    Raises:
        SaveError: the store cannot be written; nothing more is tried.
        KeyboardInterrupt: passed on after all processes are stopped; checkpoints stay.
    """
    waiting: queue.SimpleQueue[RunSpec] = queue.SimpleQueue()
    for spec in specs:
        waiting.put(spec)
    finished: queue.SimpleQueue[tuple[RunSpec, Outcome | BaseException]] = queue.SimpleQueue()
    telling = threading.Lock()

    def work(lane: Lane) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                spec = waiting.get_nowait()

                def tell(phase: str, done: int, total: int, name: str = spec.name) -> None:
                    with telling:
                        watch(name, phase, done, total)

                try:
                    finished.put((spec, execute(spec, store, progress=tell, checkpoint_seconds=checkpoint_seconds, lane=lane)))
                except BaseException as error:  # raised again where they are waited for
                    finished.put((spec, error))

    lanes = [Lane() for _ in range(max(1, min(workers, len(specs))))]
    threads = [threading.Thread(target=work, args=(lane,), daemon=True) for lane in lanes]
    try:
        for thread in threads:
            thread.start()
        for _ in specs:
            spec, outcome = finished.get()
            if isinstance(outcome, SaveError) or not isinstance(outcome, Record | UserError):
                raise outcome
            yield spec, outcome
    finally:
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        for lane in lanes:
            lane.stop()
