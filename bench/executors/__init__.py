"""How many runs become done: in this process, or in a pool of processes on this machine. Both give the same records."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from bench.errors import SaveError, UserError
from bench.plan import RunSpec
from bench.record import Record
from bench.store import Store

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
        from bench.runner import execute

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
    manager.start(_ignore_interrupt)
    messages = manager.Queue()
    stop = threading.Event()

    def listen() -> None:
        while not stop.is_set():
            try:
                watch(*messages.get(timeout=0.2))
            except Exception:  # an empty queue, or a manager that is gone at the end
                continue

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(min(workers, len(specs)), mp_context=context, initializer=_prepare, initargs=(messages,))
    try:
        pending: dict[Future[Any], RunSpec] = {pool.submit(_work, s, str(store.root), checkpoint_seconds): s for s in specs}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                spec = pending.pop(future)
                kind, payload = future.result()
                if kind == "full":
                    raise SaveError(payload)
                yield spec, Record.from_json(payload) if kind == "record" else UserError(payload)
    finally:
        # The workers' own state is on disk: whether we are done or interrupted, they can be stopped at once.
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        stop.set()
        listener.join(1)
        manager.shutdown()


_messages: Any = None


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _prepare(messages: Any) -> None:
    global _messages
    _ignore_interrupt()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _messages = messages


def _work(spec: RunSpec, root: str, checkpoint_seconds: float) -> tuple[str, str]:
    """In a worker: the record's text, or what kept it from being made."""
    from bench.runner import execute

    def tell(phase: str, done: int, total: int) -> None:
        _messages.put((spec.name, phase, done, total))

    try:
        record = execute(spec, Store(Path(root)), progress=tell, checkpoint_seconds=checkpoint_seconds)
    except SaveError as error:
        return "full", str(error)
    except UserError as error:
        return "error", str(error)
    return "record", record.to_json()
