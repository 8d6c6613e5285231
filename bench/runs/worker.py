"""The process that trains: the only one where a method's code runs. It ends with the run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from distillbench import code, imports
from distillbench.assets import cache_folder
from distillbench.cards import registry
from distillbench.cards.card import Setting
from distillbench.errors import Diverged, NotApplicable, OverBudget, SaveError, UserError
from distillbench.runs.code_of import code_of
from distillbench.runs.confine import confine
from distillbench.runs.messages import Message, Task, receive, send
from distillbench.runs.suite import suite_of
from distillbench.training.nets import parameters
from distillbench.training.observer import Observer
from distillbench.training.run import Run, has_bfloat16
from distillbench.training.student import Student

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


class _Told(Observer):
    """Passes on how far a run is."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def progress(self, phase: str, step: int, steps: int | None) -> None:
        send(self._connection, Message("progress", {"at": [phase, step, steps or step]}))


def warm() -> None:
    """Import what torch imports when it is first used, before workers are forked: an optimizer brings a third of it."""
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])


def prepare(task: Task) -> None:
    """Read what a task's code says, and import its suite where that is an installed one: forks then find it read. No method is imported."""
    with contextlib.suppress(UserError):  # said where the run is made
        suite = registry.find("suite", task.suite)
        code_of(registry.find("method", task.method, *registry.suite_card(suite).kinds), suite, task.context.name)
        if suite.module is not None and task.code.suite_loose is None:
            suite.load()


def train(connection: Connection, task: Task) -> None:
    """Do one run and say what came of it.

    ``ready`` comes before the method is imported, ``done`` (with the student's bytes) at the end; ``there`` where nothing is to be
    done, ``error`` or ``full`` for what keeps the run from having a record.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    if broadcast(torch.tensor(int(task.done), device=accelerator.device)):
        send(connection, Message("there"))
        return
    try:
        said, student = _train(connection, task, accelerator)
        send(connection, Message("done", said, student))
    except SaveError as error:
        send(connection, Message("full", {"text": str(error)}))
    except UserError as error:
        send(connection, Message("error", {"text": str(error)}))
    except OSError as error:  # not of the method, whose errors are results
        where = error.filename or task.folder
        send(
            connection,
            Message("full", {"text": f"{where}: cannot be read or written ({error.strerror or error}); name another folder with --out"}),
        )
    if accelerator.num_processes > 1:
        if accelerator.is_main_process:
            receive(connection)  # the record is saved
        accelerator.wait_for_everyone()
        send(connection, Message("over"))


def _train(connection: Connection, task: Task, accelerator: Accelerator) -> tuple[dict[str, Any], bytes]:
    _settle(task)
    judge = registry.find("suite", task.suite)
    found = registry.find("method", task.method, *registry.suite_card(judge).kinds)
    now = code_of(found, judge, task.context.name)
    if (now.digest, now.loose) != (task.code.digest, task.code.loose):
        raise UserError(f"{found.path}: it, or what it imports, changed since its runs were planned; run the same command again")
    if accelerator.device.type == "cpu":
        torch.set_num_threads(1)  # small networks are fastest so, and results do not depend on the number of cores
    with code.hidden(task.code.planned) if task.loose else contextlib.nullcontext():
        imported = frozenset(sys.modules)
        setting = task.context.setting
        require(f"{task.suite}/{task.context.name}", setting, accelerator.device.type)
        context = task.context
        if found.module is None:  # its own view of what is kept of the teacher: others must not read what it wrote
            os.environ["DISTILLBENCH_CACHE"] = str(_overlay(cache_folder(), task.scratch / "kept"))
            context = dataclasses.replace(context, cache=context.cache and _overlay(context.cache, task.scratch / "cache"))
        problem = suite_of(judge).problem(context)
        for network in problem.students.values():
            network.to(accelerator.device)
        for teacher in problem.teachers.values():
            teacher.to(accelerator.device)
        memory = _PeakMemory()
        run = Run(
            seeds=task.context.seeds,
            budget=setting.budget,
            training=setting.training,
            oracles=problem.teachers.values(),
            folder=task.folder,
            checkpoint_seconds=task.checkpoint_seconds,
            accelerator=accelerator,
            observer=_Told(connection),
            code=task.code.digest,
        )
        made = environment(accelerator, setting)
        made["confined"] = _confine(task, shares=found.module is not None)
        own = sum(map(parameters, problem.students.values()))
        send(connection, Message("ready", {"environment": made, "parameters": own}))
        ours = (found.module or "").startswith("distillbench.")  # held to it by its checks
        odd = [] if ours else imports.refused(found.path, found.module)
        imports.watch({str(found.path), *(str(path) for path in task.code.files.values())})
        distill = None if odd else _distill(found)
        said: dict[str, Any] = {"status": "ok", "reason": None, "over": None}
        content = b""
        try:
            if distill is None:
                raise UserError(f"{found.path.name} {odd[0]}")
            student = distill(run.watching(problem, registry.method_card(found)), run, **task.hyperparameters)
            if not isinstance(student, Student):
                raise UserError(
                    f"{task.method}: distill returned {type(student).__name__}, not a Student; return run.fit(...) or run.export(...)"
                )
            run.returned(student)
            said["cost"] = run.cost()
            content = student.to_bytes()
            _nothing_else(imported, found.slug, task.code.planned)
            said["over"] = run.over_budget()
        except Diverged as error:
            said |= {"status": "failed", "reason": str(error)}
        except NotApplicable as error:
            said |= {"status": "skipped", "reason": str(error)}
        except OverBudget as error:
            said |= {"status": "over_budget", "reason": str(error)}
        except SaveError:
            raise
        except BaseException as error:
            # A method's failure is a result; the traceback's last own line says where, without a wall of text.
            text = " ".join(str(error).split())
            said |= {"status": "failed", "reason": f"{type(error).__name__}: {text}{_where(error, found.path)}"}
        said.setdefault("cost", run.cost())
        said["cost"]["total"]["peak_memory_bytes"] = memory.peak()
        said["trace"] = run.trace
        return said, content if said["status"] == "ok" else b""


def _settle(task: Task) -> None:
    """Have what libraries write on their own accord written into the run's own folder, before any of them has looked where."""
    task.scratch.mkdir(parents=True, exist_ok=True)
    task.folder.mkdir(parents=True, exist_ok=True)
    for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "MPLCONFIGDIR"):
        os.environ[name] = str(task.temporary)
    tempfile.tempdir = None  # asked for anew


def _confine(task: Task, *, shares: bool) -> bool:
    """From here on nothing is written but checkpoints, what the method has a folder for, and, where it ``shares`` it, what is kept of the
    teacher."""
    caches = [] if not shares else [folder for folder in (task.context.cache, cache_folder()) if folder is not None]
    for folder in caches:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
    return confine([task.folder, task.scratch, task.temporary, *caches, *task.writable])


def _overlay(shared: Path, own: Path) -> Path:
    """``own`` with links to all files of ``shared``: what is read is there, and what is written anew is nobody else's."""
    for place, _, names in os.walk(shared):
        folder = own / Path(place).relative_to(shared)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (n for n in names if not n.endswith(".lock")):  # who locks a file wants it to be none of another
            with contextlib.suppress(FileExistsError):  # of a run that was killed
                (folder / name).symlink_to(Path(place, name).absolute())
    return own


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


def _nothing_else(imported: frozenset[str], slug: str, planned: frozenset[Path]) -> None:
    """Raise UserError where a module was imported that the identity does not cover."""
    strangers = code.unplanned(imported, planned)
    if strangers:
        named = ", ".join(f"{name} ({path})" for name, path in sorted(strangers.items()))
        raise UserError(
            f"{slug} imported {named}, which no import statement of it or of what it imports names, so its identity does not cover "
            "that code; write the import as a statement"
        )


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
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

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
def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def environment(accelerator: Accelerator, setting: Setting) -> dict[str, Any]:
    """Where a run is made: versions, hardware and the precision that is really used."""
    device = accelerator.device
    mixed = setting.training.precision == "bfloat16" and has_bfloat16(device)
    return {
        "python": platform.python_version(),
        "packages": _versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "precision": "bfloat16" if mixed else "float32",
    }


_versions()  # looked up before any fork
