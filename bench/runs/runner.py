"""RunSpec -> Record. Failures are records too; what a user can mend is one line.

This process plans, waits and writes; the method and the judge have processes of their own (:mod:`.lanes`). Torch is not imported here.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import functools
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from distillbench.cards.card import Card
from distillbench.cards.reading import from_data
from distillbench.errors import SaveError, UserError, WorkerDied
from distillbench.identity import canonical, sha256
from distillbench.runs.identities import arena_of
from distillbench.runs.lanes import Ended, Lane, Told
from distillbench.runs.launcher import place
from distillbench.runs.messages import Case, Message, Task
from distillbench.runs.plan import RunSpec
from distillbench.runs.record import Measurement, Record, Status
from distillbench.runs.store import Store
from distillbench.runs.suite import JudgeContext, TrainContext
from distillbench.training.meter import METERS

WRITABLE = "DISTILLBENCH_WRITABLE"  # folders that methods may write to besides their own, separated as in PATH


def execute(
    spec: RunSpec, store: Store, *, progress: Told | None = None, checkpoint_seconds: float = 30.0, lane: Lane | None = None
) -> Record:
    """Do one run and save its record; return the one that is there where it was done before.

    A killed run continues from its checkpoint. Another process that does the same run is waited for.

    Args:
        lane: the processes to do it in; by default new ones, which end with the run.

    Raises:
        UserError: the setting cannot be loaded here (missing data, weights, packages).
        SaveError: something could not be written; checkpoints before it are kept.
        WorkerDied: a process of ours went away, which is no fault of the method's.
    """
    # One run may be spread over several processes, each with a parent: the main one locks and writes.
    rank, processes = place()
    main = rank == 0
    with store.lock(spec) if main else contextlib.nullcontext():
        done = store.find(spec) if main else None
        if done is not None and processes == 1:
            return done
        try:
            temporary = tempfile.TemporaryDirectory(prefix="db-", ignore_cleanup_errors=True)
        except OSError as error:
            raise SaveError(f"no temporary folder can be made ({error.strerror or error}); name another place with TMPDIR") from error
        with contextlib.nullcontext(lane) if lane is not None else Lane() as at_work, temporary as name:
            return _run(spec, store, progress, checkpoint_seconds, at_work, Path(name), done=done, main=main, shared=processes > 1)


def _run(
    spec: RunSpec,
    store: Store,
    progress: Told | None,
    checkpoint_seconds: float,
    lane: Lane,
    temporary: Path,
    *,
    done: Record | None,
    main: bool,
    shared: bool,
) -> Record:
    data, cache = Path(spec.data) if spec.data else None, store.root / "cache"
    training = TrainContext(spec.setting, spec.setting_card, spec.seeds, data=data, cache=cache, tuning=spec.split == "tune")
    folder = store.folder(spec)
    task = Task(
        suite=spec.suite,
        method=spec.method,
        context=training,
        hyperparameters=spec.hyperparameters,
        code=spec.code,
        folder=folder,
        scratch=store.scratch(spec),
        temporary=temporary,
        checkpoint_seconds=checkpoint_seconds,
        writable=tuple(Path(p) for p in os.environ.get(WRITABLE, "").split(os.pathsep) if p),
        done=done is not None,
    )
    started = time.perf_counter()
    with lane.worker(task) as worker:
        ready, end = worker.follow(progress)
        if isinstance(end, Message) and end.kind in ("full", "error"):
            raise (SaveError if end.kind == "full" else UserError)(str(end.said.get("text")))
        if isinstance(end, Ended) and (ready is None or not main):
            raise WorkerDied(f"{end.why}, before the method was met" if ready is None else end.why)
        if main and done is None:
            kept = _record(spec, store, lane, progress, checkpoint_seconds, ready, end, time.perf_counter() - started)
            store.save(kept)
            if not (isinstance(end, Ended) and end.killed):  # that may be nobody's fault: the next run goes on from the checkpoint
                store.clear(spec)
            if shared:
                worker.tell("saved")
        if shared:
            worker.hear()  # all of them are over
    found = kept if main and done is None else done or store.newest(spec)
    if found is None:
        raise UserError(f"{store.root}: the processes of this run do not see the same store; name a shared folder with --out")
    return found


@dataclass
class _Outcome:
    """What came of a training, as the worker says it: untrusted, until the record has been read as any other."""

    status: Status
    reason: str | None
    cost: dict[str, Any]
    trace: dict[str, Any] = field(default_factory=dict)
    over: str | None = None


def _outcome(ready: Message | None, end: Message | Ended, seconds: float) -> _Outcome:
    unknown = {"total": dict.fromkeys(METERS) | {"wall_seconds": seconds, "peak_memory_bytes": None}, "phases": {}}
    if isinstance(end, Ended):
        return _Outcome("failed", end.why, unknown)
    said = end.said
    try:
        if ready is None or end.kind != "done" or said["status"] not in get_args(Status):
            raise ValueError(end.kind)
        cost = {"total": dict(said["cost"]["total"]), "phases": {str(k): dict(v) for k, v in said["cost"]["phases"].items()}}
        return _Outcome(said["status"], said["reason"], cost, dict(said["trace"]), said["over"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return _Outcome("failed", "its process sent no result that can be read", unknown)


def _record(
    spec: RunSpec,
    store: Store,
    lane: Lane,
    progress: Told | None,
    checkpoint_seconds: float,
    ready: Message | None,
    end: Message | Ended,
    seconds: float,
) -> Record:
    """Judge what a worker sent, and say it in a record."""
    outcome = _outcome(ready, end, seconds)
    about: dict[str, Any] | None = None
    judged: Mapping[str, Any] = {}
    content = end.blob if isinstance(end, Message) and outcome.status == "ok" else b""
    if outcome.status == "ok":
        message = lane.judge(_case(spec, store, checkpoint_seconds), content, progress)
        if message.kind == "full":
            raise SaveError(message.said["text"])
        judged = message.said
        if "student" in judged:
            about = {"sha256": store.save_student(content), **judged["student"]}
        over = outcome.over or judged.get("over")
        if message.kind == "failed":
            outcome.status, outcome.reason = "failed", judged["reason"]
        elif over is not None:
            outcome.status, outcome.reason = "over_budget", over
    cost = outcome.cost
    if judged.get("bill"):
        cost["phases"]["judge"] = dict(judged["bill"])  # of its own networks: no part of the total, which is the method's
    cost["total"]["student_bytes"] = len(content) if about else None
    cost["total"]["parameters"] = about["parameters"] if about else ready and ready.said["parameters"]
    artifacts = {name: (kind, base64.b64decode(text)) for name, (kind, text) in judged.get("artifacts", {}).items()}
    commit, dirty = _commit()
    record = Record(
        identity=spec.identity,
        setting_name=spec.setting,
        cards=spec.cards,
        code=spec.code.kept(),
        sources=spec.code.sources(),
        status=outcome.status,
        reason=outcome.reason,
        measurements=tuple(Measurement(*m) for m in judged.get("measurements", ())),
        cost=cost,
        student=about,
        environment={"commit": commit, "dirty": dirty, **(ready.said["environment"] if ready else {})},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        trace=outcome.trace,
        picture=_picture(artifacts),
        artifacts={name: {"sha256": store.save_artifact(content), "kind": kind} for name, (kind, content) in artifacts.items()},
    )
    return _readable(record, seconds)


def _readable(record: Record, seconds: float) -> Record:
    """The record, or where what its worker said can be no run's, one that says so."""
    try:
        Record.from_bytes(record.to_bytes(), "what its process sent")
    except (UserError, ValueError, TypeError) as error:
        bare = _outcome(None, Ended(str(error).partition("; delete it")[0]), seconds)
        return dataclasses.replace(
            record, status="failed", reason=bare.reason, cost=bare.cost, trace={}, measurements=(), student=None, picture=None, artifacts={}
        )
    return record


def _case(spec: RunSpec, store: Store, checkpoint_seconds: float) -> Case:
    context = JudgeContext(
        spec.setting,
        spec.setting_card,
        spec.seeds,
        data=Path(spec.data) if spec.data else None,
        cache=store.root / "judging",  # not what workers write to
        split=spec.split,
        key=sha256(canonical([arena_of(spec.identity), spec.code.digest])),
        checkpoint_seconds=checkpoint_seconds,
    )
    card: Card = from_data(spec.cards["method"])
    return Case(spec.suite, spec.suite_card, context, yardstick=card.control, planned=spec.code.planned if spec.code.suite_loose else None)


def _picture(artifacts: Mapping[str, tuple[str, bytes]]) -> str | None:
    """The PNG called ``picture`` in base64, as boards show it."""
    kind, content = artifacts.get("picture", ("", b""))
    return base64.b64encode(content).decode() if kind == "png" else None


@functools.cache
def _commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout this package runs from and whether it has uncommitted changes; None outside one. As it was when the
    process first asked, which is when its code was read."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None
    try:
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run(["git", "-C", str(root), "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return head, bool(status.strip())
