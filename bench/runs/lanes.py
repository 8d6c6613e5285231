"""The processes that runs are made in. None of them is the caller's.

A lane does one run after the other. It has a *judge*, which lives as long as the lane and never imports a method, and for each run a
*worker*, which imports the method, trains, and is gone afterwards with all that it started. What they say comes to the parent, which
alone writes the store.

On Linux a worker is a fork of a process that has imported what runs need, so it is there at once; elsewhere it is a fresh interpreter.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import recv_handle, send_handle
from types import ModuleType
from typing import Any

from distillbench.errors import WorkerDied
from distillbench.runs.messages import Case, Message, Task, receive, send

FORKS = sys.platform == "linux"  # elsewhere libraries that are loaded do not survive it
START = "spawn"  # how a lane begins: a fresh interpreter, which has nothing of the caller's
INTERRUPTED = "interrupted; the same command goes on where it stopped"
Told = Callable[[str, int, int], None]  # (phase, steps done, steps in all)


@dataclass(frozen=True)
class Ended:
    """A worker went away without having said what came of its run.

    Attributes:
        why: how, for people.  killed: by a signal, which may be no fault of the method's.
    """

    why: str
    killed: bool = False


class Lane:
    """Processes for one run at a time. Use it as a context: they end with it."""

    def __init__(self) -> None:
        self._processes: list[BaseProcess] = []
        self._judge: Connection | None = None
        self._control: Connection | None = None
        self._worker: Worker | None = None
        self.stopped = False

    def __enter__(self) -> Lane:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all processes now, for good; their own state is on disk. Any thread may call this."""
        self.stopped = True
        with _starting:  # a process that is coming up reads what we have for it, or says how that ended
            if (worker := self._worker) is not None:
                worker.kill()
            self._end()

    def _end(self) -> None:
        """End all processes; the next run or student starts new ones."""
        processes, self._processes = self._processes, []
        for process in processes:
            _kill(process.pid)
            process.join()

    # --- training ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def worker(self, task: Task) -> Iterator[Worker]:
        """A process that trains; it is gone when the context is left.

        Raises:
            WorkerDied: it cannot be started.
        """
        self._begin()
        with _starting:
            ours, theirs = get_context("spawn").Pipe()
            with contextlib.closing(theirs):
                if FORKS:
                    pid, wait = self._fork(task, theirs)
                else:
                    process = _started(get_context(START), _train_once, theirs, task)

                    def wait(seconds: float | None) -> int | None:
                        process.join(seconds)
                        return process.exitcode

                    pid = process.pid or 0
        self._worker = made = Worker(self, ours, pid, wait)
        try:
            yield made
        finally:
            self._worker = None
            made.end()
            ours.close()

    def _fork(self, task: Task, theirs: Connection) -> tuple[int, Callable[[float | None], int | None]]:
        control = self._control
        assert control is not None

        def wait(seconds: float | None) -> int | None:
            try:
                return int(receive(control).said["exit"]) if control.poll(seconds) else None
            except (EOFError, OSError):
                return None

        try:
            control.send(task)  # pickled: from us to a process that has met no method
            send_handle(control, theirs.fileno(), 0)
            return int(receive(control).said["pid"]), wait
        except (EOFError, OSError) as error:
            self._end()
            raise WorkerDied("the process that starts the workers is gone; the same command goes on where it was") from error

    # --- judging ----------------------------------------------------------------------------------------------------

    def judge(self, case: Case, student: bytes, told: Told | None) -> Message:
        """What the judge says of the bytes of a student: a message ``judged``, ``failed`` or ``full``.

        Raises:
            WorkerDied: it went away; the next call starts another one.
        """
        self._begin()
        connection = self._judge
        assert connection is not None
        try:
            connection.send(case)
            connection.send_bytes(student)
            while (message := receive(connection)).kind == "progress":
                if told is not None:
                    told(*message.said["at"])
        except (EOFError, OSError) as error:
            self._end()
            raise WorkerDied(
                "the process that judges died (killed, or out of memory); the same command goes on, and --workers 1 needs the least memory"
            ) from error
        return message

    def _begin(self) -> None:
        """Start the processes that live as long as the lane, where they are not there."""
        if self._processes and not self.stopped:
            return
        context = get_context(START)
        with _starting:  # no other lane inherits the children's ends, or nobody would notice that one is gone
            if self.stopped:
                raise WorkerDied(INTERRUPTED)
            self._judge, judges = context.Pipe()
            if FORKS:
                self._control, controls = context.Pipe()
                self._processes = [_started(context, _serve, controls, judges)]
                controls.close()
            else:
                self._processes = [_started(context, _judge_all, judges)]
            judges.close()


class Worker:
    """The parent's end of a process that trains.

    Args:
        wait: waits so many seconds for its end (None: for ever) and gives its exit code, or None where it goes on.
    """

    def __init__(self, lane: Lane, connection: Connection, pid: int, wait: Callable[[float | None], int | None]) -> None:
        self._lane, self._connection, self._pid, self._wait = lane, connection, pid, wait
        self._over = False

    def follow(self, told: Told | None) -> tuple[Message | None, Message | Ended]:
        """What it said before it met the method, None where it did not, and what came of the run.

        Args:
            told: is passed how far it is.

        Raises:
            WorkerDied: the lane was stopped meanwhile.
        """
        ready: Message | None = None
        while True:
            try:
                message = receive(self._connection)
            except EOFError:
                return ready, self._ended()
            except (ValueError, TypeError, RecursionError):
                return ready, Ended("its process sent what is no message")
            if message.kind == "progress":
                if told is not None:
                    told(*_position(message))
            elif message.kind == "ready" and ready is None:
                ready = message
            else:
                return ready, message

    def tell(self, kind: str) -> None:
        """Say something to the worker."""
        with contextlib.suppress(OSError):  # it is gone, and has its reasons
            send(self._connection, Message(kind))

    def hear(self) -> None:
        """Wait for its next message, or its end."""
        with contextlib.suppress(EOFError, ValueError):
            receive(self._connection)

    def kill(self) -> None:
        """Kill the process; whoever follows it is told."""
        _kill(self._pid)

    def end(self) -> None:
        """End the process and all that it started, and wait for that."""
        if not self._over:
            self._over = True
            if self._wait(0) is None:  # its number may be another one's by now
                _kill(self._pid)
                self._wait(None)

    def _ended(self) -> Ended:
        if self._lane.stopped:
            raise WorkerDied(INTERRUPTED)
        code = self._wait(5)
        self._over = code is not None
        if code is None:
            return Ended("its process closed what it has to speak through")
        if code < 0:
            name = signal.Signals(-code).name
            return Ended(f"its process was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}", killed=True)
        return Ended(f"its process ended itself with exit code {code}")


def _position(message: Message) -> tuple[str, int, int]:
    try:
        phase, done, total = message.said["at"]
        return str(phase)[:80], int(done), int(total)
    except (KeyError, TypeError, ValueError):
        return "?", 0, 1


def _kill(pid: int | None) -> None:
    """Kill a process and its group; one that is gone is gone."""
    for kill in (os.killpg, os.kill) if hasattr(os, "killpg") else (os.kill,):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid:
                kill(pid, signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)


_starting = threading.RLock()  # starting a process changes this one for a moment


def _started(context: BaseContext, target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process of ours that never sees Ctrl-C, has one thread, and does not import the caller's script again.

    Raises:
        WorkerDied: the system has no room for one.
    """
    process: BaseProcess = context.Process(target=target, args=arguments)  # type: ignore[attr-defined]
    with _uninterrupted():
        script, threads = sys.modules["__main__"], os.environ.get("OMP_NUM_THREADS")
        sys.modules["__main__"] = ModuleType("__main__")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        try:
            process.start()
        except OSError as error:
            raise WorkerDied(f"no process can be started ({error.strerror or error}); fewer --workers need less") from error
        finally:
            sys.modules["__main__"] = script
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
    return process


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


# --- in the processes of a lane -----------------------------------------------------------------------------------------


def _serve(controls: Connection, judges: Connection) -> None:
    """Fork the judge, and then a worker for each task: what they begin with is always the same."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a GPU that is looked for in another way is of no use to forks
    from distillbench.runs import confine, judge, worker  # all that a run needs, once

    _lead()
    worker.warm()
    judging = os.fork()
    if not judging:
        controls.close()
        _run_fork(judge.serve, judges)
    judges.close()
    confine.adopt_orphans()
    with contextlib.suppress(EOFError, OSError):  # the parent is gone, or has closed the lane
        while True:
            task = controls.recv()
            worker.prepare(task)
            with Connection(recv_handle(controls)) as connection:
                pid = os.fork()
                if not pid:
                    controls.close()
                    _lead()
                    _run_fork(worker.train, connection, task)
            send(controls, Message("started", {"pid": pid}))
            _, status = os.waitpid(pid, 0)
            _end_all_but(judging)
            send(controls, Message("ended", {"exit": os.waitstatus_to_exitcode(status)}))
    _kill(judging)


def _run_fork(target: Callable[..., None], *arguments: Any) -> None:
    """Do ``target`` in a fork and exit, without what its parent has still to do."""
    _follow_parent()
    try:
        target(*arguments)
        os._exit(0)
    except BaseException:  # nobody above is to go on
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(1)


def _train_once(connection: Connection, task: Task) -> None:
    from distillbench.runs import worker

    _lead()
    _follow_parent()
    worker.train(connection, task)


def _judge_all(judges: Connection) -> None:
    from distillbench.runs import judge

    _lead()
    _follow_parent()
    judge.serve(judges)


def _lead() -> None:
    """Be the head of a group of processes, so that all of it is ended at once; Ctrl-C is the parent's."""
    if hasattr(os, "setsid"):
        with contextlib.suppress(PermissionError):  # it is one already
            os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _follow_parent() -> None:
    """End when the parent does, even where that is killed. What is printed goes to stderr: it is no result."""
    os.dup2(2, 1)
    parent = parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _end_all_but(judging: int) -> None:
    """End what a worker left running, in whatever group: it is our child now."""
    import psutil

    for child in psutil.Process().children():
        if child.pid != judging:
            for process in (*child.children(recursive=True), child):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child.pid, 0)
