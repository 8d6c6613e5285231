"""RunSpec -> Record. Failures are records too; what a user can mend is one line."""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import importlib.util
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn

from distillbench import code
from distillbench.cards import registry
from distillbench.cards.card import Setting
from distillbench.cards.reading import to_data
from distillbench.errors import Diverged, NotApplicable, OverBudget, SaveError, UserError
from distillbench.identity import canonical, sha256
from distillbench.runs.caps import Own
from distillbench.runs.code_of import code_of
from distillbench.runs.identities import arena_of
from distillbench.runs.plan import RunSpec
from distillbench.runs.record import Measurement, Record, Status
from distillbench.runs.store import Store
from distillbench.runs.suite import Artifact, JudgeContext, Suite, TrainContext, suite_of
from distillbench.training.nets import parameters
from distillbench.training.observer import Observer
from distillbench.training.run import Run, has_bfloat16
from distillbench.training.student import Part, Student

PACKAGES = (
    "distillbench",
    "torch",
    "torchvision",
    "torchmetrics",
    "transformers",
    "accelerate",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
)

Progress = Callable[[str, int, int], None]


class _Shown(Observer):
    """Passes on how far a run is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def progress(self, phase: str, step: int, steps: int | None) -> None:
        self._progress(phase, step, steps or step)


def execute(
    spec: RunSpec,
    store: Store,
    *,
    progress: Progress | None = None,
    checkpoint_seconds: float = 30.0,
    accelerator: Accelerator | None = None,
) -> Record:
    """Do one run and save its record; return the one that is there where it was done before.

    A killed run continues from its checkpoint. Another process that does the same run is waited for.

    Raises:
        UserError: the setting cannot be loaded here (missing data, weights, packages).
        SaveError: something could not be written; checkpoints before it are kept.
    """
    accelerator = accelerator or Accelerator(cpu=not torch.cuda.is_available())
    # One run may be spread over several processes: the main one locks and writes, and all of them hear what it found.
    with store.lock(spec) if accelerator.is_main_process else contextlib.nullcontext():
        done = store.find(spec) if accelerator.is_main_process else None
        if broadcast(torch.tensor(int(done is not None), device=accelerator.device)):
            return done or _found(spec, store)
        if accelerator.device.type == "cpu":
            # For the whole process: small networks are fastest so, and results do not depend on the number of cores. Who calls from
            # a notebook gets the number back from :mod:`api`.
            torch.set_num_threads(1)
        loose = spec.code.method_loose is not None or spec.code.suite_loose is not None
        with code.hidden(spec.code.planned) if loose else contextlib.nullcontext():
            record = _run(spec, store, progress, checkpoint_seconds, accelerator)
        if accelerator.is_main_process:
            store.save(record)
            store.clear(spec)
        accelerator.wait_for_everyone()
        return record


def _found(spec: RunSpec, store: Store) -> Record:
    record = store.find(spec)
    if record is None:
        raise UserError(f"{store.root}: the processes of this run do not see the same store; name a shared folder with --out")
    return record


def _run(spec: RunSpec, store: Store, progress: Progress | None, checkpoint_seconds: float, accelerator: Accelerator) -> Record:
    judge = registry.find("suite", spec.suite)
    found = registry.find("method", spec.method, *registry.suite_card(judge).kinds)
    now = code_of(found, judge, spec.setting)
    if (now.digest, now.loose) != (spec.code.digest, spec.code.loose):
        raise UserError(f"{found.path}: it, or what it imports, changed since its runs were planned; run the same command again")
    imported = frozenset(sys.modules)
    suite, distill = suite_of(judge), _distill(found)
    setting = spec.setting_card
    data, cache = Path(spec.data) if spec.data else None, store.root / "cache"
    require(f"{spec.suite}/{spec.setting}", setting, accelerator.device.type)
    training = TrainContext(spec.setting, setting, spec.seeds, data=data, cache=cache, tuning=spec.split == "tune")
    shown = None if progress is None else _Shown(progress)
    judging = JudgeContext(
        spec.setting,
        setting,
        spec.seeds,
        data=data,
        cache=cache,
        split=spec.split,
        device=str(accelerator.device),
        key=sha256(canonical([arena_of(spec.identity), spec.code.digest])),
        checkpoint_seconds=checkpoint_seconds,
        observer=shown,
    )
    problem, card = suite.problem(training), registry.method_card(found)
    own = None if card.control else Own.of(problem, setting.caps)
    for network in problem.students.values():
        network.to(accelerator.device)
    for teacher in problem.teachers.values():
        teacher.to(accelerator.device)
    memory = _PeakMemory()
    run = Run(
        seeds=training.seeds,
        budget=setting.budget,
        training=setting.training,
        oracles=problem.teachers.values(),
        folder=store.folder(spec),
        checkpoint_seconds=checkpoint_seconds,
        accelerator=accelerator,
        observer=shown,
        code=spec.code.digest,
    )
    status: Status = "ok"
    reason: str | None = None
    measurements: list[Measurement] = []
    about: dict[str, Any] | None = None
    artifacts: Mapping[str, Artifact] = {}
    size: int | None = None
    try:
        student = distill(run.watching(problem, card), run, **spec.hyperparameters)
        if not isinstance(student, Student):
            raise UserError(
                f"{spec.method}: distill returned {type(student).__name__}, not a Student; return run.fit(...) or run.export(...)"
            )
        if own is not None:
            own.refuse(student)
        run.returned(student)
        cost = run.cost()
        about, size = _about(student, suite, judging, store, accelerator), student.size
        judged = suite.evaluate(student, judging)
        measurements, artifacts = list(judged.measurements), judged.artifacts
        _complete(measurements, spec)
        _nothing_else(imported, spec)
        over = run.over_budget()
        if over is None and own is not None:  # a yardstick may cost more than a student
            over = own.over(student, suite.rebuild(student, judging)) or suite.exceeds(student, judging)
        if over is not None:
            status, reason = "over_budget", over
    except Diverged as error:
        status, reason, cost = "failed", str(error), run.cost()
    except NotApplicable as error:
        status, reason, cost = "skipped", str(error), run.cost()
    except OverBudget as error:
        status, reason, cost = "over_budget", str(error), run.cost()
    except (SaveError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:
        # A method's failure is a result; the traceback's last own line says where, without a wall of text.
        where, said = _where(error, found.path), " ".join(str(error).split())
        status, reason, cost, measurements, artifacts = "failed", f"{type(error).__name__}: {said}{where}", run.cost(), [], {}
    if judging.bill:
        cost["phases"]["judge"] = dict(judging.bill)  # of its own networks: no part of the total, which is the method's
    cost["total"]["peak_memory_bytes"] = memory.peak()
    cost["total"]["student_bytes"] = size
    cost["total"]["parameters"] = about["parameters"] if about else sum(map(parameters, problem.students.values()))
    return Record(
        identity=spec.identity,
        setting_name=spec.setting,
        cards=spec.cards,
        code=spec.code.kept(),
        sources=spec.code.sources(),
        status=status,
        reason=reason,
        measurements=tuple(measurements),
        cost=cost,
        student=about,
        environment=environment(accelerator, setting),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        trace=run.trace,
        picture=_picture(artifacts),
        artifacts={name: _kept(a, store, accelerator) for name, a in artifacts.items()},
    )


def _distill(method: registry.Entry) -> Callable[..., object]:
    found: Callable[..., object] | None = vars(method.load()).get("distill")
    if found is None:
        raise UserError(f"{method.path}: has no function distill(problem, run, ...); 'distillbench new method' writes a skeleton")
    return found


def require(track: str, setting: Setting, device: str) -> None:
    """Raises UserError where this machine lacks what a setting needs: installed packages, or a GPU (``device`` is torch's type)."""
    missing = [name for name in setting.requires if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{track} needs {', '.join(missing)}, which is not installed here: pip install 'distillbench[lm,images]'")
    if setting.device == "cuda" and device != "cuda":
        raise UserError(f"{track} needs a GPU and there is none here; 'distillbench doctor' says what runs on this machine")


def _picture(artifacts: Mapping[str, Artifact]) -> str | None:
    """The PNG called ``picture`` in base64, as boards show it."""
    found = artifacts.get("picture")
    return base64.b64encode(found.content).decode() if found is not None and found.kind == "png" else None


def _kept(artifact: Artifact, store: Store, accelerator: Accelerator) -> dict[str, str]:
    """Save an artifact; what the record says of it."""
    if accelerator.is_main_process:
        store.save_artifact(artifact.content)
    return {"sha256": sha256(artifact.content), "kind": artifact.kind}


def _nothing_else(imported: frozenset[str], spec: RunSpec) -> None:
    """Raise UserError where a module was imported that the identity does not cover; the next run will import it, and see it, again."""
    strangers = code.unplanned(imported, spec.code.planned)
    for name in strangers:
        del sys.modules[name]
    if strangers:
        named = ", ".join(f"{name} ({path})" for name, path in sorted(strangers.items()))
        raise UserError(
            f"{spec.slug} imported {named}, which no import statement of it or of what it imports names, so its identity does not cover "
            "that code; write the import as a statement"
        )


def _about(student: Student, suite: Suite, judging: JudgeContext, store: Store, accelerator: Accelerator) -> dict[str, Any]:
    """Save the weights; what the record says of them."""
    blob = student.to_bytes()
    digest = store.save_student(blob) if accelerator.is_main_process else ""
    rebuilt = suite.rebuild(student, judging)
    if not isinstance(rebuilt, nn.Module):
        parts = {name: _part(part) for name, part in student.parts.items()}
        numbers = sum(part.numbers for part in student.parts.values())
        return {"sha256": digest, "parts": parts, "recipe": to_data(student.recipe), "parameters": numbers}
    return {
        "sha256": digest,
        "architecture": student.architecture.name,
        "arguments": to_data(student.architecture.arguments),  # as JSON has them: a record read is the record made
        "recipe": to_data(student.recipe),
        "averaged": bool(student.averaged),
        **({"average": student.averaged} if student.averaged else {}),  # which one
        "parameters": parameters(rebuilt),
    }


def _part(part: Part) -> dict[str, Any]:
    built = part.architecture
    return {
        "kind": part.kind,
        **({"how": part.how} if part.how else {}),
        **({"architecture": built.name, "arguments": to_data(built.arguments)} if built is not None else {}),
        **({"base": part.base} if part.base is not None else {}),
        **({"text_bytes": len(part.text.encode())} if part.text is not None else {"numbers": part.numbers}),
    }


def _complete(measurements: list[Measurement], spec: RunSpec) -> None:
    """Every metric on the card was scored, is finite and in its range: anything else is a defect of the suite, not a score.

    A metric that is only shown may be missing, and has its range where it is there.
    On the split for tuning the primary metric is enough: what is held out of training need not resemble every test set.
    """
    card = spec.suite_card
    scored = {m.metric: m for m in measurements}
    for name, m in scored.items():
        if not all(map(math.isfinite, (m.value, *(m.per_example or ())))):
            raise ValueError(f"{name} = {m.value} is not finite, or one of its examples is not")
    for metric in (*card.metrics, *card.shown):
        if metric.name not in scored:
            if metric.better is None or (spec.split == "tune" and metric.name != card.primary):
                continue
            raise ValueError(f"the suite did not score {metric.name}")
        value = scored[metric.name].value
        low, high = metric.range or (None, None)
        if (low is not None and value < low) or (high is not None and value > high):
            raise ValueError(f"{metric.name} = {value} is outside {metric.range}")


def _where(error: BaseException, path: Path) -> str:
    line = None
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == str(path):
            line = frame.tb_lineno
        frame = frame.tb_next
    return f" ({path.name}:{line})" if line else ""


class _PeakMemory:
    """Peak memory of one run: of the device on a GPU, of the process on Linux, where the peak can be reset."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass

    def peak(self) -> int | None:
        """Bytes, or None where the platform does not say."""
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


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


@functools.cache
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment(accelerator: Accelerator, setting: Setting) -> dict[str, Any]:
    """Where a run was made: commit, versions, hardware and the precision that was really used."""
    commit, dirty = _commit()
    device = accelerator.device
    mixed = setting.training.precision == "bfloat16" and has_bfloat16(device)
    return {
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "packages": _versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "precision": "bfloat16" if mixed else "float32",
    }
