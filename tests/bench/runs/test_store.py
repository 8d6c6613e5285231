import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distillbench.errors import SaveError, UserError
from distillbench.files import write_atomic
from distillbench.runs.plan import plan
from distillbench.runs.record import Measurement, Record, read_records
from distillbench.runs.store import Store

TRACK = "image-classification/blobs"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def spec():
    [spec] = plan(TRACK, ["kd"], [0], controls=False)
    return spec


def record(spec, created="2026-01-01T00:00:00+00:00", status="ok"):
    return Record(
        identity=spec.identity,
        setting_name=spec.setting,
        cards=spec.cards,
        code=spec.code.kept(),
        status=status,
        reason=None,
        measurements=tuple(Measurement.mean(m.name, [1.0]) for m in spec.suite_card.metrics) if status == "ok" else (),
        cost={"total": {}, "phases": {}},
        student=None,
        environment={},
        created=created,
    )


def test_a_write_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file"
    texts = [bytes([65 + i]) * (200_000 + i) for i in range(8)]
    write_atomic(path, texts[0])
    stop = threading.Event()
    seen = []

    def read():
        while not stop.is_set():
            seen.append(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda t: write_atomic(path, t), texts))
    stop.set()
    reader.join()
    assert len(seen) > 10 and set(seen) <= set(texts)


@pytest.mark.parametrize(
    ("call", "code", "says"),
    [
        ("fsync", errno.ENOSPC, "the disk is full"),
        ("fsync", errno.EDQUOT, "the disk is full"),
        ("replace", errno.EACCES, "Permission denied"),
        ("fsync", errno.EIO, "Input/output error"),
    ],
)
def test_a_failed_write_is_loud_and_leaves_the_old_file(tmp_path, monkeypatch, call, code, says):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(SaveError, match=says) as caught:
        write_atomic(path, b"new")
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_loses_no_record(tmp_path, monkeypatch, spec):
    store = Store(tmp_path)
    store.save(record(spec))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for save in (lambda: store.save(record(spec, created="2026-02-02T00:00:00+00:00")), lambda: store.save_student(b"weights")):
        with pytest.raises(SaveError, match="disk is full"):
            save()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert store.find(spec) == record(spec)


def test_saving_never_replaces_a_record(tmp_path, spec):
    store = Store(tmp_path)
    first, second = store.save(record(spec)), store.save(record(spec, created="2026-02-02T00:00:00+00:00"))
    assert first != second and first.exists() and second.exists()
    assert store.find(spec).created.startswith("2026-02-02")
    assert store.save(record(spec)) == first
    assert len(read_records(tmp_path / "records")[0]) == 2


def test_a_failed_run_is_kept_but_not_counted_as_done(tmp_path, spec):
    store = Store(tmp_path)
    store.save(record(spec, status="failed"))
    assert store.find(spec) is None
    assert len(read_records(tmp_path / "records")[0]) == 1


def test_a_damaged_record_is_moved_aside(tmp_path, spec):
    store = Store(tmp_path)
    path = store.save(record(spec))
    path.write_bytes(path.read_bytes()[:-40])
    assert store.find(spec) is None
    assert not path.exists() and path.with_suffix(".damaged").exists()
    store.save(record(spec))
    assert store.find(spec) == record(spec)
    assert read_records(tmp_path / "records") == ([record(spec)], [])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"schema": 3}', "a store of schema 3, this version knows 2; upgrade"),
        ("{", "corrupt"),
        ("[]", "corrupt"),
        ("3", "corrupt"),
        ('{"schema": "new"}', "corrupt"),
        ('{"schema": null}', "corrupt"),
        ("[" * 100_000, "corrupt"),
    ],
)
def test_a_store_that_is_newer_or_odd_is_one_line(tmp_path, text, says):
    (tmp_path / "store.json").write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        Store(tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "store.json").read_text() == text


def test_a_store_is_marked_once_and_opened_again(tmp_path, spec):
    Store(tmp_path / "new").save(record(spec))
    assert json.loads((tmp_path / "new" / "store.json").read_text()) == {"schema": 2}
    assert Store(tmp_path / "new").find(spec) == record(spec)
    Store(tmp_path / "looked_at")
    assert not (tmp_path / "looked_at").exists()  # to look is not to make


def test_a_file_is_no_store_and_nothing_can_be_written_below_one(tmp_path, spec):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(UserError, match="is a file, not a store"):
        Store(path)
    with pytest.raises(SaveError, match="cannot be written"), Store(path / "below").lock(spec):
        pass
    assert path.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, spec):
    tmp_path.chmod(0o500)
    with pytest.raises(SaveError, match=r"cannot be written .* --out"), Store(tmp_path / "store").lock(spec):
        pass


def test_students_are_kept_under_their_own_digest(tmp_path):
    store = Store(tmp_path)
    digest = store.save_student(b"weights")
    assert digest == subprocess.run(["sha256sum"], input=b"weights", capture_output=True, check=True).stdout.decode()[:64]
    assert store.save_student(b"weights") == digest
    assert (tmp_path / "students" / f"{digest}.safetensors").read_bytes() == b"weights"


def hold(root, ready, release):
    [spec] = plan(TRACK, ["kd"], [0], controls=False)
    with Store(root).lock(spec) as got:
        assert got
        ready.set()
        release.wait(30)


def test_a_lock_is_held_between_processes_and_ends_with_its_process(tmp_path, spec):
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, release))
    process.start()
    try:
        assert ready.wait(60)
        with Store(tmp_path).lock(spec, timeout=0.1) as got:
            assert got is False
        other = plan(TRACK, ["kd"], [1], controls=False)[0]
        with Store(tmp_path).lock(other, timeout=0.1) as got:
            assert got is True
        process.kill()  # no chance to clean up
        process.join(10)
        with Store(tmp_path).lock(spec, timeout=10) as got:
            assert got is True
    finally:
        process.kill()


@pytest.mark.slow
def test_two_processes_that_do_the_same_run_end_with_one_record(tmp_path):
    code = (
        "import json, sys; from distillbench.runs.plan import plan; from distillbench.runs.store import Store\n"
        "from distillbench.runs.runner import execute\n"
        "[spec] = plan(sys.argv[1], ['kd'], [0], controls=False, budget={'student_examples': 6400})\n"
        "print(execute(spec, Store(sys.argv[2]), checkpoint_seconds=0.1).to_json())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, TRACK, str(tmp_path)]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    texts = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    first, second = (Record.from_bytes(t) for t in texts)
    assert first == second and first.finished
    assert read_records(tmp_path / "records") == ([first], [])
    assert len(list((tmp_path / "students").iterdir())) == 1
    assert not list((tmp_path / "runs").rglob("*.checkpoint"))
