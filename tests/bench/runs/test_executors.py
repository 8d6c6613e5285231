"""One run after the other or several at once: the same records, and errors and deaths that are one line."""

import os
import signal
import threading
import time

import psutil
import pytest

from distillbench.errors import SaveError, UserError, WorkerDied
from distillbench.runs import lanes
from distillbench.runs.executors import run_all
from distillbench.runs.plan import plan
from distillbench.runs.record import Record, read_records
from distillbench.runs.store import Store

TRACK = "image-classification/blobs"
FIT = "return run.fit(problem.student, loss, problem.batches)"


def specs_of(*methods, seeds=(0,)):
    return plan(TRACK, [str(m) for m in methods], seeds, controls=False, budget={"student_examples": 1280})


def do(specs, root, workers, watch=lambda *a: None):
    return list(run_all(specs, Store(root), workers=workers, watch=watch, checkpoint_seconds=30.0))


@pytest.mark.slow
def test_a_pool_gives_the_same_records_and_passes_errors_through(tmp_path, write_method):
    fails = write_method("fails", "raise RuntimeError('on purpose')")
    no_import = write_method("no-import")
    no_import.write_text(no_import.read_text() + "import no_such_package\n")
    noisy = write_method("noisy", "extra = torch.nn.Linear(5, 5)\ntorch.rand(3)\n" + FIT)  # uses the global generator
    specs = specs_of("kd", noisy, fails, no_import)
    told = []
    pool = {s.id: o for s, o in do(specs, tmp_path / "pool", 2, lambda *a: told.append(a))}
    here = {s.id: o for s, o in do(specs, tmp_path / "here", 1)}
    assert pool.keys() == here.keys() == {s.id for s in specs}
    for spec in specs:
        a, b = pool[spec.id], here[spec.id]
        assert type(a) is type(b)
        if isinstance(a, Record):
            assert (a.status, a.reason, a.measurements, a.student, a.trace) == (b.status, b.reason, b.measurements, b.student, b.trace)
            assert {k: v for k, v in a.cost["total"].items() if k not in ("wall_seconds", "peak_memory_bytes", "teacher_forwards")} == {
                k: v for k, v in b.cost["total"].items() if k not in ("wall_seconds", "peak_memory_bytes", "teacher_forwards")
            }
            assert a.environment == b.environment
        else:
            assert isinstance(a, UserError) and str(a) == str(b) and "no_such_package" in str(a)
    statuses = {s.name.split()[0]: getattr(pool[s.id], "status", "error") for s in specs}
    assert statuses == {"kd": "ok", "noisy": "ok", "fails": "failed", "no-import": "error"}
    assert {name for name, *_ in told} >= {"kd seed 0", "noisy seed 0"}  # progress comes back
    assert len(read_records(tmp_path / "pool" / "records")[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_method_that_ends_its_process_is_a_failed_record_and_the_others_are_done(tmp_path, write_method, workers):
    leaves = write_method("leaves", "os._exit(0)")
    killed = write_method("killed", "os.kill(os.getpid(), 9)")
    outcomes = {s.slug: o for s, o in do(specs_of(leaves, killed, "kd"), tmp_path, workers)}
    assert outcomes["leaves"].status == outcomes["killed"].status == "failed" and outcomes["kd"].status == "ok"
    assert outcomes["leaves"].reason == "its process ended itself with exit code 0"
    assert outcomes["killed"].reason == "its process was ended by SIGKILL (out of memory?)"
    records, bad = read_records(tmp_path / "records")
    assert bad == [] and sorted(r.slug for r in records) == ["kd", "killed", "leaves"]


def test_errors_are_yielded_and_the_rest_goes_on(tmp_path, write_method):
    broken = write_method("broken")
    broken.write_text(broken.read_text() + "raise SystemExit(3)\n")
    outcomes = [o for _, o in do(specs_of(broken, "kd"), tmp_path, 1)]
    assert isinstance(outcomes[0], UserError) and "SystemExit" in str(outcomes[0])
    assert isinstance(outcomes[1], Record) and outcomes[1].status == "ok"


def test_a_store_that_cannot_be_written_stops_everything(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be written"):
        do(specs_of("kd", "scratch"), tmp_path / "file" / "below", 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_the_workers_and_leaves_no_record(tmp_path, write_method, workers):
    """As in a notebook, whose process goes on: nothing trains in secret."""
    pids = tmp_path / "pids"
    pids.mkdir()
    waits = write_method("waits", f"open({str(pids)!r} + f'/{{os.getpid()}}', 'w').close()\nwhile True:\n    time.sleep(0.1)")

    def interrupt():
        while len(list(pids.iterdir())) < workers:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores Ctrl-C for what it runs in the background
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        do(specs_of(waits, seeds=range(3)), tmp_path / "store", workers)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(psutil.pid_exists(int(p.name)) for p in pids.iterdir()):
        time.sleep(0.05)
    assert not [p.name for p in pids.iterdir() if psutil.pid_exists(int(p.name))]
    assert not list((tmp_path / "store").rglob("*.record"))


def test_without_forks_every_run_has_a_fresh_interpreter_and_the_same_record(tmp_path, write_method, monkeypatch):
    """As on systems where a process with torch in it cannot be forked."""
    kd, leaves = specs_of("kd", write_method("leaves", "os._exit(3)"))
    [(_, forked)] = do([kd], tmp_path / "forked", 1)
    monkeypatch.setattr(lanes, "FORKS", False)
    monkeypatch.setattr(lanes, "START", "spawn")
    fresh, left = (o for _, o in do([kd, leaves], tmp_path / "fresh", 1))
    assert (fresh.status, fresh.student, fresh.measurements) == ("ok", forked.student, forked.measurements)
    assert (left.status, left.reason) == ("failed", "its process ended itself with exit code 3")


def test_a_system_without_room_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.popen_fork.os.fork", full)
        [(_, outcome)] = do(specs_of("kd"), tmp_path, 1)
    assert isinstance(outcome, WorkerDied) and "no process can be started (Cannot allocate memory)" in str(outcome)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(SaveError, match=r"no temporary folder can be made .* TMPDIR"):
        do(specs_of("kd"), tmp_path, 1)
