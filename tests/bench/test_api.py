"""The names a notebook calls: what they give is what the command line gives, and a mistake is one line."""

from __future__ import annotations

import os
import sys
import warnings

import pytest
import torch

import distillbench as db
from distillbench import api
from distillbench.runs import executors
from distillbench.runs.store import Store

TRACK = "image-classification/blobs"
QUICK = {"student_examples": 640}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(store, records) of kd with two seeds, scratch and teacher left out."""
    out = tmp_path_factory.mktemp("store")
    return out, db.run(TRACK, "kd", seeds=2, budget=QUICK, controls=False, out=out, progress=False)


def test_import_is_light_and_every_name_is_there(python):
    code = """
import sys
import distillbench as db
assert {m for m in sys.modules if m.startswith("distillbench")} == {"distillbench", "distillbench.version"}
assert set(db.__all__) <= set(dir(db))
for name in db.__all__: getattr(db, name)
assert db.run.__module__ == "distillbench.api" and "run" in vars(db)
from distillbench import *
assert not {"torch", "pandas", "scipy"} & set(sys.modules)
try: db.ran
except AttributeError as error: assert "'distillbench' has no attribute 'ran'" in str(error)
else: raise SystemExit("no error")
"""
    python(code)


def test_a_plan_is_that_of_the_command(tmp_path):
    from distillbench.runs.plan import plan

    told = db.plan(TRACK, "kd", seeds=range(5, 7), overrides={"kd": {"temperature": 2}}, budget=QUICK)
    same = plan(TRACK, ["kd"], [5, 6], overrides={"kd": {"temperature": "2"}}, budget=QUICK)
    assert [s.id for s in told] == [s.id for s in same]
    assert len(db.plan(TRACK, ["kd", "dkd"], seeds=2, controls=False)) == 4


def test_records_come_in_the_order_of_the_plan_and_are_done_once(done, monkeypatch):
    out, records = done
    assert [(r.track, r.slug, r.seed, r.status) for r in records] == [(TRACK, "kd", 0, "ok"), (TRACK, "kd", 1, "ok")]
    monkeypatch.setattr(executors, "run_all", lambda *a, **k: pytest.fail("done before"))
    specs = db.plan(TRACK, ["kd"], seeds=2, budget=QUICK, controls=False)
    assert [r.id for r in db.run_plan(specs[::-1], out=out)] == [r.id for r in records[::-1]]
    assert [r.id for r in db.read_records(out)] == [r.id for r in records]


def test_the_command_finds_what_a_notebook_did(done, cli):
    out, _ = done
    code, text, err = cli("run", TRACK, "-m", "kd", "--seeds", "2", "--budget", "640", "--no-controls", "--out", out)
    assert (code, "to do" in err) == (0, False)
    assert text.splitlines()[1].startswith("kd\t2\t")


def test_a_judged_student_scores_what_its_record_says(done):
    out, records = done
    for record in records:
        assert db.judge(db.weights(record, out), TRACK, seed=record.seed) == {m.metric: m.value for m in record.measurements}


def test_progress_is_told_on_stderr_or_not_at_all(tmp_path, capsys):
    db.run(TRACK, "scratch", seeds=1, budget=QUICK, controls=False, out=tmp_path, progress=False)
    assert capsys.readouterr() == ("", "")
    db.run(TRACK, "scratch", seeds=2, budget=QUICK, controls=False, out=tmp_path)
    out, err = capsys.readouterr()
    assert out == "" and f"{TRACK}: 2 runs, 1 done before, 1 to do, 1 at once" in err


def test_the_callers_random_stream_and_threads_are_as_before(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        record = db.run(TRACK, "scratch", seeds=1, budget=QUICK, controls=False, out=tmp_path, progress=False)[0]
        db.judge(db.weights(record, tmp_path), TRACK)
        assert torch.equal(torch.rand(3), expected) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_failed_run_is_a_record_and_a_warning_at_the_callers_line(tmp_path, write_method):
    broken = write_method("broken", "raise ValueError('no idea')")
    with pytest.warns(UserWarning, match="broken seed 0 failed: ValueError: no idea") as seen:
        records = db.run(TRACK, broken, seeds=1, controls=False, out=tmp_path / "o", progress=False)
    assert [r.status for r in records] == ["failed"]
    assert [w.filename for w in seen if "no idea" in str(w.message)] == [__file__]
    with pytest.raises(db.UserError, match="broken seed 0 exported no student: its status is failed"):
        db.weights(records[0], tmp_path / "o")


def test_what_cannot_be_run_is_one_error_after_the_rest(tmp_path, write_method, monkeypatch):
    real = executors.run_all

    def without_the_second(specs, store, **more):
        for spec, outcome in real(specs, store, **more):
            yield spec, db.UserError("no such data") if spec.seed == 1 else outcome

    monkeypatch.setattr(executors, "run_all", without_the_second)
    with pytest.raises(db.UserError, match=r"no such data \(1 of 3 runs not done; the others are in .*\)"):
        db.run(TRACK, "scratch", seeds=3, budget=QUICK, controls=False, out=tmp_path, progress=False)
    assert {r.seed for r in db.read_records(tmp_path)} >= {0, 2}


def test_a_bad_file_is_a_warning_and_costs_nothing_else(done, tmp_path):
    for r in done[1]:
        Store(tmp_path).save(r)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(db.read_records(tmp_path)) == 2
    (tmp_path / "records" / "cut.json").write_text('{"schema": 1,')
    with pytest.warns(UserWarning, match=r"cut\.json: corrupt") as seen:
        assert len(db.read_records(tmp_path)) == 2
    assert [w.filename for w in seen] == [__file__]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda out, r: db.run("image-classification/blob", "kd", out=out), "did you mean 'blobs'"),
        (lambda out, r: db.plan(TRACK, "dk"), "unknown method 'dk'"),
        (lambda out, r: db.plan(TRACK, seeds=0), "seeds=0: at least one seed, counted from 0"),
        *((lambda out, r, s=s: db.plan(TRACK, seeds=s), "seeds are whole numbers from 0") for s in ([-1], [1.5], [True], "x", 10**12)),
        (lambda out, r: db.read_records(out / "absent"), "no such folder of records"),
        (lambda out, r: db.weights(r, out / "absent"), "is not in this store; name its own one: out="),
        (lambda out, r: db.judge(out / "absent", TRACK), "absent: cannot be read"),
        (lambda out, r: db.judge(out / "store.json", TRACK), "not a distillbench student"),
        (lambda out, r: db.judge(db.weights(r, out), "image-classification/digits"), "cannot be judged on image-classification/digits"),
        (lambda out, r: db.judge(db.weights(r, out), "image-generation/digits"), "unknown architecture 'mlp'"),
        (lambda out, r: db.judge(db.weights(r, out), "image-classification/cifar100"), "this setting needs CIFAR-100"),
    ],
)
def test_a_mistake_is_one_line(done, monkeypatch, call, words):
    monkeypatch.delenv("DISTILLBENCH_DATA", raising=False)
    with pytest.raises(db.UserError, match=words) as error:
        call(done[0], done[1][0])
    assert "\n" not in str(error.value)


def test_code_that_changed_since_it_was_imported_is_refused(monkeypatch):
    """Else a record would name code that is on the disk while the kernel runs what it imported before."""
    db.plan(TRACK, "kd")
    file = sys.modules["distillbench.runs.plan"].__file__
    about = os.stat(file)
    monkeypatch.setitem(api._imported, file, (about.st_mtime_ns - 1, about.st_size))
    with pytest.raises(db.UserError, match=r"plan\.py: changed since this process imported it; start Python"):
        db.plan(TRACK, "kd")


def test_a_loose_method_is_read_anew_at_each_call(tmp_path, write_method):
    path = write_method("tried", "raise ValueError('first')")
    with pytest.warns(UserWarning, match="first"):
        first = db.run(TRACK, path, seeds=1, controls=False, out=tmp_path / "o", progress=False)
    write_method("tried", "raise ValueError('second')")
    with pytest.warns(UserWarning, match="second"):
        second = db.run(TRACK, path, seeds=1, controls=False, out=tmp_path / "o", progress=False)
    assert first[0].id != second[0].id
