import dataclasses
import math
import os
import re
import signal
import subprocess
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from distillbench.cards import registry
from distillbench.cards.card import Budget
from distillbench.errors import UserError
from distillbench.runs.packing import pack
from distillbench.runs.plan import plan
from distillbench.runs.record import Measurement, Record, read_records
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.runs.suite import suite_of

TRACK = "image-classification/blobs"
FIT = "return run.fit(problem.student, loss, problem.batches)"
ROOT = Path(__file__).parents[3]


def spec_of(method, examples=640, **budget):
    [spec] = plan(TRACK, [str(method)], [0], controls=False, budget={"student_examples": examples, **budget})
    return spec


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def records(store):
    found, bad = read_records(store.root / "records")
    assert bad == []
    return found


def test_a_run_that_goes_well_leaves_a_whole_record(store):
    spec = spec_of("kd", 6400)
    record = execute(spec, store)
    assert record.status == "ok" and record.reason is None and record.finished
    assert record.id == spec.id and records(store) == [record]
    metrics = {m.metric: m for m in record.measurements}
    assert set(metrics) == {m.name for m in record.suite.metrics}
    assert metrics["top1"].n == len(metrics["top1"].per_example) == 4000
    assert metrics["top1"].value == pytest.approx(sum(metrics["top1"].per_example) / 4000)
    total = record.cost["total"]
    assert total["student_examples"] == 6400 and total["student_steps"] == 100 and total["teacher_examples"] == 6400
    assert total["training_flops"] > 0 and total["wall_seconds"] > 0
    assert total["parameters"] == (8 * 32 + 32) + (32 * 32 + 32) + (32 * 5 + 5)
    assert record.cost["phases"].keys() == {"fit"}
    assert (store.root / "students" / f"{record.student['sha256']}.safetensors").is_file()
    assert not store.folder(spec).exists()  # checkpoints go when the record is there
    assert list(record.trace) == ["fit/ce", "fit/kd"] and 40 <= len(record.trace["fit/kd"]) <= 51


def test_the_record_says_where_it_was_made(store):
    made = execute(spec_of("scratch"), store).environment
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        assert made["commit"] == head and made["dirty"] in (True, False)
    else:
        assert made["commit"] is None and made["dirty"] is None
    for package in ("torch", "numpy", "safetensors"):
        assert made["packages"][package] == version(package)
    assert made["device"] == ("cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name())
    assert made["processes"] == 1 and made["cores"] >= 1 and made["precision"] == "float32" and made["python"].count(".") == 2


def test_peak_memory_is_that_of_this_run(store, write_method):
    big = execute(spec_of(write_method("big", "waste = torch.ones(100_000_000)\ntotal = float(waste.sum())\ndel waste\n" + FIT)), store)
    small = execute(spec_of("scratch"), store)
    peaks = [r.cost["total"]["peak_memory_bytes"] for r in (small, big)]
    if None in peaks or torch.cuda.is_available():
        pytest.skip("the platform does not say")
    assert 50e6 < peaks[0] < 16e9
    assert peaks[1] - peaks[0] > 300e6  # 400 MB were held by the first run, and are not billed to the second


def trains_on(loss):
    return f"return run.fit(problem.student, lambda b: run.loss(b, x={loss}), problem.batches)"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("x = 1\nraise RuntimeError('went\\n  wrong')", r"RuntimeError: went wrong \(m\.py:{last}\)"),
        ("return problem.no_such_thing", r"AttributeError: .*no_such_thing.* \(m\.py:{last}\)"),
        ("return torch.zeros(2, 3) @ torch.zeros(2, 3)", r"RuntimeError: .*mat1 and mat2.* \(m\.py:{last}\)"),
        ("return None", r"UserError: .*m\.py: distill returned NoneType, not a Student; return run\.fit.*"),
        ("return run.export(torch.nn.Linear(2, 2))", r"UserError: only a network the problem built.* \(m\.py:{last}\)"),
        ("sys.exit('no more')", r"SystemExit: no more \(m\.py:{last}\)"),
        (trains_on("problem.student(b.inputs)"), r"UserError: loss term 'x' has shape \(64, 5\).*"),
        (trains_on("float('nan') * problem.student(b.inputs).sum(1)"), r"loss is not finite at step 0 of phase 'fit' \(x=nan\)"),
        (FIT.replace("return ", "") + "\n" + FIT, r"UserError: the budget of 640 student examples is used up.* \(m\.py:{last}\)"),
        (
            "problem.student.head.weight.data.fill_(float('inf'))\nreturn run.export(problem.student)",
            r"UserError: the student's weight .* is not finite.*",
        ),
    ],
)
def test_a_failure_is_a_record_that_says_what_and_where(store, write_method, body, says):
    path = write_method("m", body)
    last = len(path.read_text().splitlines())
    record = execute(spec_of(path), store)
    assert record.status == "failed" and record.measurements == () and not record.finished
    pattern = says.replace("{last}", str(last))
    assert re.fullmatch(pattern, record.reason), record.reason
    assert records(store) == [record]
    assert store.find(spec_of(path)) is None  # it may be tried again


def test_divergence_names_its_step(store, write_method):
    body = (
        "def bad(batch):\n    scale = float('nan') if run.meter.counts['student_steps'] == 7 else 1.0\n"
        "    return run.loss(batch, kd=scale * problem.student(batch.inputs).sum(1))\nreturn run.fit(problem.student, bad, problem.batches)"
    )
    record = execute(spec_of(write_method("m", body)), store)
    assert record.status == "failed" and "not finite at step 7" in record.reason
    assert record.cost["total"]["student_steps"] == 7
    assert Record.from_bytes(record.to_json()) == record


@pytest.mark.parametrize(
    ("body", "budget", "says"),
    [
        ("return run.fit(problem.student, loss, problem.batches, steps=11)", {}, "student_examples 704 of 640"),
        (FIT, {"teacher_examples": 639}, "teacher_examples 640 of 639"),
        (FIT, {"training_flops": 1000.0}, "training_flops"),
        ("time.sleep(0.3)\n" + FIT, {"wall_seconds": 0.25}, "wall_seconds"),
    ],
)
def test_over_budget_is_scored_and_said(store, write_method, body, budget, says):
    record = execute(spec_of(write_method("m", body), **budget), store)
    assert record.status == "over_budget" and says in record.reason
    assert record.finished and record.value("top1") is not None


def test_a_hard_cap_ends_a_run_before_it_is_scored(store, write_method):
    path = write_method("m")
    record = execute(spec_of(path, teacher_examples=130, hard=("teacher_examples",)), store)
    assert (record.status, record.reason) == ("over_budget", "teacher_examples 192 of 130")
    assert record.cost["total"]["student_steps"] == 3 and record.measurements == () and record.student is None and not record.finished
    assert records(store) == [record]
    soft = execute(spec_of(path, teacher_examples=130), store)
    assert soft.id != record.id and soft.reason == "teacher_examples 640 of 130" and soft.finished


def test_a_run_is_paced_by_another_meter(store, write_method):
    record = execute(spec_of(write_method("m"), 10**6, teacher_examples=650, pace="teacher_examples"), store)
    # The step that passes it is the last.
    assert record.cost["total"]["teacher_examples"] == record.cost["total"]["student_examples"] == 704
    assert record.status == "ok" and record.finished


def test_a_method_that_does_not_fit_the_setting_is_skipped_with_its_reason(store, write_method):
    body = "from distillbench.errors import NotApplicable\nraise NotApplicable('this teacher has no stages')"
    record = execute(spec_of(write_method("m", body)), store)
    assert (record.status, record.reason) == ("skipped", "this teacher has no stages")
    assert record.measurements == () and record.student is None and not record.finished
    assert records(store) == [record] and Record.from_bytes(record.to_json()) == record


@pytest.fixture
def judge(monkeypatch):
    """``judge(change)`` makes the suite score as ``change(measurements)`` says."""
    kind = type(suite_of(registry.find("suite", "image-classification")))
    real = kind.evaluate

    def judged(change, *a):
        found = real(*a)
        return dataclasses.replace(found, measurements=change(found.measurements))

    def install(change):
        monkeypatch.setattr(kind, "evaluate", lambda *a: judged(change, *a))

    return install


def swap(metric, **changes):
    return lambda ms: [dataclasses.replace(m, **changes) if m.metric == metric else m for m in ms]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swap("top1", value=1.5), r"top1 = 1\.5 is outside"),
        (swap("top1", value=-0.1), r"top1 = -0\.1 is outside"),
        (swap("nll", value=math.inf), "nll = inf is not finite"),
        (swap("nll", value=math.nan), "nll = nan is not finite"),
        (swap("nll", examples=pack([1.0, math.inf])), "or one of its examples is not"),
        (swap("nll", value=-1.0), "nll = .* is outside"),
        (lambda ms: ms[1:], "the suite did not score top1"),
        (lambda ms: [], "the suite did not score"),
        (lambda ms: [*ms, Measurement("extra", math.nan, 1)], "extra = nan is not finite"),
    ],
)
def test_a_suite_that_scores_nonsense_fails_the_run(store, judge, change, says):
    judge(change)
    record = execute(spec_of("scratch"), store)
    assert record.status == "failed" and record.measurements == ()
    assert re.search(says, record.reason), record.reason
    assert records(store) == [record]


def test_what_is_done_is_not_done_again(store, write_method, tmp_path):
    path = write_method("m", f"open({str(tmp_path / 'count')!r}, 'a').write('x')\n" + FIT)
    first = execute(spec_of(path), store)
    assert execute(spec_of(path), store) == first
    assert (tmp_path / "count").read_text() == "x"
    assert execute(spec_of(path, 1280), store).id != first.id
    assert (tmp_path / "count").read_text() == "xx"


def test_a_damaged_record_is_run_again_with_the_same_result(store):
    spec = spec_of("kd")
    first = execute(spec, store)
    [path] = (store.root / "records").rglob("*.record")
    path.write_bytes(path.read_bytes()[:100])
    again = execute(spec, store)
    assert again.student == first.student and again.measurements == first.measurements
    assert records(store) == [again] and path.with_suffix(".damaged").exists()


def test_ctrl_c_leaves_no_record_and_keeps_the_checkpoint(store, write_method, tmp_path):
    flag = tmp_path / "stop"
    body = (
        "def watched(batch):\n    while run.meter.counts['student_steps'] == 6 and os.path.exists({flag!r}):\n"
        "        open({waits!r}, 'w').close()\n"
        "    open({steps!r}, 'a').write('x')\n    return loss(batch)\nreturn run.fit(problem.student, watched, problem.batches)"
    ).format(flag=str(flag), waits=str(tmp_path / "waits"), steps=str(tmp_path / "steps"))
    spec = spec_of(write_method("m", body))
    flag.touch()

    def interrupt():
        while not (tmp_path / "waits").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores Ctrl-C for what it runs in the background
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        execute(spec, store, checkpoint_seconds=0.0)
    signal.signal(signal.SIGINT, before)
    assert not list(store.root.glob("records/**/*.record"))
    assert list(store.folder(spec).glob("*.checkpoint"))
    flag.unlink()
    record = execute(spec, store, checkpoint_seconds=0.0)
    assert record.status == "ok" and (tmp_path / "steps").read_text() == 10 * "x"  # six before, four after
    assert record.student == execute(spec, Store(tmp_path / "other")).student


def test_code_that_changed_since_planning_is_refused(store, write_method):
    """Else the record would carry the digest of code that did not make it."""
    path = write_method("m")
    spec = spec_of(path)
    path.write_text(path.read_text().replace("temperature=2.0", "temperature=3.0"))
    with pytest.raises(UserError, match=r"m\.py: it, or what it imports, changed since its runs were planned; run the same command again"):
        execute(spec, store)
    assert not list(store.root.glob("records/**/*.record"))
    assert execute(spec_of(path), store).status == "ok"


def test_results_do_not_depend_on_what_the_process_did_before(tmp_path, write_method):
    """A network made before the first loop is seeded by the run, not by the process's history."""
    body = (
        "extra = torch.nn.Linear(5, 5)\ndef more(b):\n    return run.loss(b, x=cross_entropy(extra(problem.student(b.inputs)), b.labels))\n"
        "return run.fit(problem.student, more, problem.batches, extra=[extra])"
    )
    spec = spec_of(write_method("m", body))
    students = []
    for i in range(2):
        torch.manual_seed(1000 + i)
        students.append(execute(spec, Store(tmp_path / str(i))).student)
    assert students[0] == students[1]


def test_a_setting_that_needs_a_gpu_says_so(store, monkeypatch):
    spec = spec_of("scratch")
    spec.cards["suite"]["settings"]["blobs"]["device"] = "cuda"
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="needs a GPU and there is none here; 'distillbench doctor'"):
        execute(spec, store)


def test_a_full_disk_is_no_failed_record(store, monkeypatch):
    from distillbench.errors import SaveError

    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SaveError, match="disk is full"):
        execute(spec_of("kd"), store)
    monkeypatch.undo()
    assert not list(store.root.glob("records/**/*.record"))
    assert execute(spec_of("kd"), store).status == "ok"


def test_controls_run_on_the_tune_split_too(store):
    specs = plan(TRACK, ["kd"], [0], split="tune", budget={"student_examples": 640})
    done = [execute(s, store) for s in specs]
    assert [r.status for r in done] == ["ok"] * len(specs)
    assert {r.split for r in done} == {"tune"}
    assert all(r.measurements[0].n == 1000 for r in done)
    assert isinstance(done[0].setting.budget, Budget)
