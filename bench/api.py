"""What scripts and notebooks call; ``distillbench`` itself shows these names. Torch is imported where something is run or judged.

A mistake is a :class:`~distillbench.errors.UserError` of one line. What went wrong without stopping the rest (a failed run, a file that is
no record) is a warning: it is neither lost nor in the way.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distillbench.cards import registry
from distillbench.errors import UserError
from distillbench.runs import plan as planning
from distillbench.runs import record as records
from distillbench.runs.grid import complete
from distillbench.runs.identities import seeds_by_role
from distillbench.runs.plan import RunSpec
from distillbench.runs.record import Record
from distillbench.runs.store import Store
from distillbench.runs.suite import JudgeContext, suite_of

Name = str | os.PathLike[str]


def plan(
    track: str,
    methods: Name | Sequence[Name] = "all",
    *,
    seeds: int | Sequence[int] = 3,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    controls: bool = True,
    split: str = "test",
    data: Name | None = None,
    budget: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[RunSpec]:
    """The runs that methods on a track need, controls first, seed by seed: what :func:`run_plan` does. Nothing is run.

    Args:
        track: ``suite/setting``.
        methods: slugs, files, or ``all``; one or several.
        seeds: how many, counted from 0, or which.
        overrides: method -> hyper-parameter -> value.
        controls: add scratch, teacher and the suite's other yardsticks.
        split: ``test`` is reported; ``tune`` is for choosing hyper-parameters and is never ranked.
        data: folder of data sets and teachers; the environment's DISTILLBENCH_DATA by default.
        budget, training, options: fields of the setting to replace, for example ``budget={"student_examples": 640}``; makes another board.

    Raises:
        UserError: something asked for does not exist, does not fit the track, or is out of range; or a code file changed since this
            process imported it.
    """
    _refresh()
    wanted = [methods] if isinstance(methods, str | os.PathLike) else methods
    chosen = range(seeds) if isinstance(seeds, int) else seeds
    if not chosen:
        raise UserError(f"seeds={seeds!r}: at least one seed, counted from 0")
    return planning.plan(
        track,
        [os.fspath(m) for m in wanted],
        chosen,
        overrides=overrides,
        controls=controls,
        split=split,
        data=None if data is None else os.fspath(data),
        budget=budget,
        training=training,
        options=options,
    )


def run(
    track: str,
    methods: Name | Sequence[Name] = "all",
    *,
    seeds: int | Sequence[int] = 3,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    controls: bool = True,
    split: str = "test",
    data: Name | None = None,
    budget: Mapping[str, Any] | None = None,
    out: Name = "runs",
    workers: int = 1,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
) -> list[Record]:
    """Distil and judge: one record for every method and seed, controls first, as ``distillbench run`` does.

    Runs that the store has are not done again, and interrupted ones go on where they stopped. What is not named here is as in :func:`plan`.

    Args:
        out: the store, a folder.
        workers: runs at once, each in processes of its own.
        checkpoint_seconds: the most work that a kill can lose.
        progress: say on stderr what is running and how long is left.

    Raises:
        UserError: as :func:`plan`, or a run cannot be done on this machine; the records of the others are in the store.
        SaveError: the store cannot be written.

    Warns:
        UserWarning: a run failed or went over its budget; its record is among the others and says so too.
    """
    specs = plan(track, methods, seeds=seeds, overrides=overrides, controls=controls, split=split, data=data, budget=budget)
    return _records(specs, out, workers, checkpoint_seconds, progress)


def run_plan(
    specs: Sequence[RunSpec],
    *,
    out: Name = "runs",
    workers: int = 1,
    checkpoint_seconds: float = 30.0,
    progress: bool = True,
) -> list[Record]:
    """Do what :func:`plan` gave, or any choice from it: the record of each spec, in their order.

    Arguments, errors and warnings are those of :func:`run`.
    """
    _refresh()
    return _records(specs, out, workers, checkpoint_seconds, progress)


def read_records(*folders: Name) -> list[Record]:
    """Every record in ``folders`` (stores, or folders of records; ``runs`` where none is named), by track, method and seed.

    Raises:
        UserError: a folder is missing.

    Warns:
        UserWarning: a file is no record or a damaged one; one warning a file.
    """
    found, bad = records.read_records(*map(Path, folders or ("runs",)))
    for line in bad:
        warnings.warn(line, stacklevel=2)
    return found


def weights(record: Record, out: Name = "runs") -> Path:
    """The file of a record's exported student in the store ``out``.

    Raises:
        UserError: the run exported none, or the store does not have it.
    """
    if record.student is None:
        raise UserError(f"{record.slug} seed {record.seed} exported no student: its status is {record.status}")
    path = Path(out) / "students" / f"{record.student['sha256']}.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: the student of {record.slug} seed {record.seed} is not in this store; name its own one: out=...")
    return path


def judge(student: Name, track: str, *, seed: int = 0, split: str = "test", data: Name | None = None) -> dict[str, float]:
    """Score exported weights as the track's suite scores every student: metric -> value, in the unit on the suite's card.

    Args:
        student: a safetensors file that a run exported (:func:`weights`).
        seed: of the run, for suites that draw something to judge with: its record then says the same numbers.
        data: folder of data sets and teachers; the environment's DISTILLBENCH_DATA by default.

    Raises:
        UserError: the track is unknown or cannot be judged here, the file is no student, or it does not fit the track.
    """
    folder = data or os.environ.get("DISTILLBENCH_DATA")
    plan(track, [], seeds=[seed], controls=False, split=split, data=folder)  # refuses what is not there
    entry, _, setting, name = planning.track(track)
    seeds, place = seeds_by_role(seed), None if folder is None else Path(folder)
    with _nothing_left_behind() as device:
        from distillbench.runs.worker import require
        from distillbench.training.student import Student

        require(track, setting, device)
        suite, judged = suite_of(entry), Student.read(Path(student))
        try:
            measured = suite.evaluate(judged, JudgeContext(name, setting, seeds, data=place, split=split, device=device)).measurements
        except UserError:
            raise
        except Exception as error:  # of torch or of a metric, for weights that were made for something else
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{student}: cannot be judged on {track}; is it a student of another track? ({why})") from error
    return {m.metric: m.value for m in measured}


def vouch(spec: RunSpec) -> str | None:
    """None where today's code gives the committed fingerprints of a run's method and setting, else what moved; imports torch."""
    from distillbench.checks.fingerprints import vouch

    return vouch(spec)


def _records(specs: Sequence[RunSpec], out: Name, workers: int, checkpoint_seconds: float, progress: bool) -> list[Record]:
    """The public functions' common part; called by them directly, so that a warning points at the line of their caller."""
    store = Store(os.fspath(out))
    title = ", ".join(dict.fromkeys(f"{s.suite}/{s.setting}" for s in specs))
    results = complete(specs, store, title, workers=workers, checkpoint_seconds=checkpoint_seconds, progress=progress, vouch=vouch)
    outcomes = [results[s.id] for s in specs]
    errors = {str(o): o for o in outcomes if isinstance(o, UserError)}
    if errors:
        missing = sum(isinstance(o, UserError) for o in outcomes)
        worst = max(errors.values(), key=lambda e: e.exit_code)
        raise type(worst)(f"{'; '.join(sorted(errors))} ({missing} of {len(outcomes)} runs not done; the others are in {store.root})")
    done = [o for o in outcomes if isinstance(o, Record)]
    for spec, record in zip(specs, done, strict=True):
        if record.status != "ok":
            warnings.warn(f"{spec.name} {record.status}: {record.reason}", stacklevel=3)
    return done


_imported: dict[str, tuple[int, int]] = {}  # file of an imported module -> its time and size when that was noticed


def _refresh() -> None:
    """A notebook's process lives long. New methods and suites are found; code that was edited since it was imported is refused.

    Python goes on with what it once imported, while a record names the code of its run by what lies on the disk.
    """
    registry.refresh()
    if changed := _changed():
        raise UserError(f"{changed[0]}: changed since this process imported it; start Python (a notebook: its kernel) again")


def _changed() -> list[str]:
    """The files of imported modules that are not as they were when this function first met them."""
    brought = {e.module.partition(".")[0] for e in (*registry.methods().values(), *registry.suites().values()) if e.module}
    changed = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and name.partition(".")[0] in {"distillbench", *brought} and os.path.exists(file):
            about = os.stat(file)
            now = (about.st_mtime_ns, about.st_size)
            if _imported.setdefault(file, now) != now:
                changed.append(file)
    return changed


@contextlib.contextmanager
def _nothing_left_behind() -> Iterator[str]:
    """A caller's random stream and number of threads are as before; yields torch's type of device. Runs seed and set both."""
    try:
        import torch
    except ImportError as error:
        raise UserError("torch is needed and is not installed: pip install 'distillbench[train]'") from error
    from distillbench.training.checkpoint import rng_state, set_rng_state

    threads, state = torch.get_num_threads(), rng_state()
    try:
        yield "cuda" if torch.cuda.is_available() else "cpu"
    finally:
        torch.set_num_threads(threads)
        set_rng_state(state)
        _changed()  # notices what was imported meanwhile
