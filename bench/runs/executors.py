"""How many runs become done: in this process, or in a pool of processes on this machine. Both give the same records."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from distillbench.errors import SaveError, UserError, WorkerDied
from distillbench.runs.plan import RunSpec
from distillbench.runs.record import Record
from distillbench.runs.store import Store

Watch = Callable[[str, str, int, int], None]  # (run's name, phase, steps done, steps in all)
Outcome = Record | UserError


def run_all(
    specs: Sequence[RunSpec], store: Store, *, workers: int, watch: Watch, checkpoint_seconds: float
) -> Iterator[tuple[RunSpec, Outcome]]:
    """Do ``specs`` and yield each with its record, or with the error that kept it from having one, as they finish.

    Raises:
        SaveError: the store cannot be written; nothing more is tried.
        KeyboardInterrupt: passed on after the workers are stopped; checkpoints stay.
    """
    if workers <= 1 or len(specs) <= 1:
        from distillbench.runs.runner import execute

        for spec in specs:

            def tell(phase: str, done: int, total: int, name: str = spec.name) -> None:
                watch(name, phase, done, total)

            try:
                yield spec, execute(spec, store, progress=tell, checkpoint_seconds=checkpoint_seconds)
            except SaveError:
                raise
            except UserError as error:
                yield spec, error
        return
    yield from _pool(specs, store, workers, watch, checkpoint_seconds)


def _pool(
    specs: Sequence[RunSpec], store: Store, workers: int, watch: Watch, checkpoint_seconds: float
) -> Iterator[tuple[RunSpec, Outcome]]:
    context = get_context("spawn")
    manager = SyncManager(ctx=context)
    with _uninterrupted():
        manager.start(_attend)
    messages = manager.Queue()
    stop = threading.Event()

    def listen() -> None:
        while not stop.is_set():
            try:
                watch(*messages.get(timeout=0.2))
            except Exception:  # an empty queue, or a manager that is gone at the end
                continue

    listener = threading.Thread(target=listen, daemon=True)
    with _uninterrupted():  # a thread keeps the mask it is born with: one that takes Ctrl-C would bring it to the main thread all the same
        listener.start()
    pool = ProcessPoolExecutor(min(workers, len(specs)), mp_context=context, initializer=_prepare, initargs=(messages,))
    try:
        with _uninterrupted():
            pending: dict[Future[Any], RunSpec] = {pool.submit(_work, s, str(store.root), checkpoint_seconds): s for s in specs}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                spec = pending.pop(future)
                try:
                    kind, payload = future.result()
                except BrokenProcessPool:
                    yield (
                        spec,
                        WorkerDied(
                            "a worker process died (killed, or out of memory) and the others were stopped; the same command goes on "
                            "where they were, and --workers 1 needs the least memory"
                        ),
                    )
                    continue
                if kind == "full":
                    raise SaveError(payload)
                yield spec, Record.from_bytes(payload) if kind == "record" else UserError(payload)
    finally:
        # The workers' own state is on disk: whether we are done or interrupted, they can be stopped at once.
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        stop.set()
        listener.join(1)
        manager.shutdown()


# In a worker, where it tells how far it is. A pool hands such a queue to the process that it starts, not to a task: the queue belongs to
# the process, and :func:`_prepare` sets it once.
_messages: Any = None


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, not even before they have come up; one that comes meanwhile is kept for us."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # by itself it would start below, and lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _attend() -> None:
    """In a process of ours: leave Ctrl-C to the main process, and end with it, even where that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _prepare(messages: Any) -> None:
    global _messages
    _attend()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _messages = messages


def _work(spec: RunSpec, root: str, checkpoint_seconds: float) -> tuple[str, str | bytes]:
    """In a worker: the record's bytes, or what kept it from being made."""
    from distillbench.runs.runner import execute

    def tell(phase: str, done: int, total: int) -> None:
        _messages.put((spec.name, phase, done, total))

    try:
        record = execute(spec, Store(Path(root)), progress=tell, checkpoint_seconds=checkpoint_seconds)
    except SaveError as error:
        return "full", str(error)
    except UserError as error:
        return "error", str(error)
    return "record", record.to_bytes()
