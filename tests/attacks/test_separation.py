"""What a method does to its process ends with it, and nothing that is judged is in reach. As users run it: fresh processes, confined."""

import json
import os
import re
import time

import pytest

from distillbench.runs import confine, lanes
from distillbench.runs.executors import run_all
from distillbench.runs.plan import plan
from distillbench.runs.record import Record, read_records
from distillbench.runs.store import Store

TRACK = "image-classification/digits-tiny"
confined = pytest.mark.skipif(confine.version() < 6, reason="Linux's Landlock is missing here, or cannot hold signals back")

HEAD = """
import gc, os, signal, subprocess, sys, threading, time
import torch
from distillbench.cards.card import Card
from distillbench.problems.classification.losses import cross_entropy, kl_divergence
CARD = Card(slug="{slug}", version=1, problem="classification", title="an attack")
def distill(problem, run):
    def loss(batch):
        return run.loss(batch, kd=kl_divergence(problem.student(batch.inputs), problem.teacher.logits(batch), temperature=4.0))
    def fit():
        return run.fit(problem.student, loss, problem.batches)
{body}
"""

# slug -> what distill does. All are run one after the other in one lane, and kd comes last.
ATTACKS = {
    "leaves": "os._exit(0)",
    "killed": "os.kill(os.getpid(), signal.SIGSEGV)",
    "exits": "sys.exit(0)",
    # Whatever evaluates, wherever it lies.
    "judge": """
from types import ModuleType
for module in [m for m in gc.get_objects() if isinstance(m, ModuleType)]:
    for thing in list(vars(module).values()) if getattr(module, "__name__", "").startswith("distillbench") else ():
        if hasattr(type(thing), "evaluate") and not isinstance(thing, type):
            type(thing).evaluate = lambda *a: type("J", (), {"measurements": [], "artifacts": {}})
        if isinstance(thing, type) and thing.__name__ == "Measurement":
            thing.mean = staticmethod(lambda name, values: thing(name, 1.0, 1))
return run.export(problem.student)
""",
    "globals": """
torch.nn.functional.cross_entropy = torch.nn.functional.log_softmax = lambda *a, **k: torch.zeros(64, requires_grad=True)
torch.Tensor.argmax = lambda self, *a, **k: torch.zeros(len(self), dtype=torch.int64)
torch.set_num_threads(7)
torch.set_default_dtype(torch.float64)
return run.export(problem.student)
""",
    "thread": """
def disturb():
    while True:
        torch.manual_seed(0)
threading.Thread(target=disturb).start()
subprocess.Popen(["sleep", "4321"], start_new_session=True)
if not os.fork():
    os.setsid()
    while True:
        time.sleep(1)
return fit()
""",
    # Whatever could give the judge away: its seed, the run's, the rows of the test split (400 of 1,797 digits).
    "looks": """
assert "evaluation" not in run.seeds
large = [t.shape for t in gc.get_objects() if isinstance(t, torch.Tensor) and len(t.shape) and t.shape[0] in (400, 1797)]
assert not large, large
shown = problem.train.labels  # where one is hidden, the teacher's decision; no other list of classes is left
lists = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.shape == shown.shape and t.dtype == shown.dtype]
assert not [t for t in lists if int(t.max()) < 10 and not torch.equal(t, shown)]
frame, seen = sys._getframe(), []
while frame is not None:
    for value in frame.f_locals.values():
        for holder in (value, *(vars(value).values() if hasattr(value, "__dict__") else ())):
            if isinstance(holder, dict) and ("evaluation" in holder or "seed" in holder):
                seen.append(sorted(map(str, holder)))
    frame = frame.f_back
assert not seen, seen
return fit()
""",
    "noisy": "print('[]')\nos.write(1, b'[]')\nreturn fit()",
}
# Those that import what knows the rows of the test split, one way or another.
IMPORTS = {
    "suite": "from distillbench.suites.image_classification.digits import load\nreturn fit()",
    "data": "from sklearn.datasets import load_digits\nreturn fit()",
    "modules": "sys.modules['distillbench.suites.image_classification.digits'].load()\nreturn fit()",
    "computed": "suite = __builtins__['__imp' + 'ort__']('.'.join(['distillbench', 'suites', 'image_classification']))\nreturn fit()",
}
# Those that the system must hold back.
OUTSIDE = {
    "forges": """
from pathlib import Path  # its own folder lies in the store
folder = next(p for p in Path(run._checkpoints.folder).parents if (p / "records").is_dir())
theirs = folder / "records" / "image-classification" / "digits-tiny" / "kd"
theirs.mkdir(parents=True, exist_ok=True)
(theirs / "forged.record").write_text("{}")
""",
    # Another method's answers of the teacher.
    "poisons": """
from pathlib import Path
tables = list(Path(problem.teacher._cache).rglob("*.table"))
assert tables
for table in tables:
    table.write_bytes(b"x")
""",
    "tampers": "open(kl_divergence.__code__.co_filename, 'a').write('')",
    "signals": "os.kill(os.getppid(), signal.SIGKILL)",
    "peeks": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """All attacks, then kd, in one lane: records by slug, and the store."""
    folder = tmp_path_factory.mktemp("attacks")
    paths = []
    for slug, body in {**ATTACKS, **IMPORTS, **OUTSIDE}.items():
        paths.append(folder / f"{slug}.py")
        paths[-1].write_text(HEAD.format(slug=slug, body="\n".join(f"    {line}" for line in body.strip("\n").splitlines())))
    budget = {"student_examples": 640}
    specs = plan(TRACK, ["nkd", *map(str, paths), "kd"], [0], controls=False, budget=budget)
    store = Store(folder / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "START", "spawn")
        patch.delenv("DISTILLBENCH_WRITABLE", raising=False)
        done = {s.slug: o for s, o in run_all(specs, store, workers=1, watch=lambda *a: None, checkpoint_seconds=30)}
        [alone] = plan(TRACK, ["kd"], [0], controls=False, budget=budget)
        [(_, kd)] = run_all([alone], Store(folder / "other"), workers=1, watch=lambda *a: None, checkpoint_seconds=30)
    return done, kd, store


def test_every_attack_leaves_one_record_and_the_store_has_no_other(outcome):
    done, _, store = outcome
    assert all(isinstance(record, Record) for record in done.values()), done
    records, bad = read_records(store.root / "records")
    assert bad == [] and sorted(r.slug for r in records) == sorted([*ATTACKS, *IMPORTS, *OUTSIDE, "nkd", "kd"])


def test_the_honest_method_after_them_is_as_if_it_were_alone(outcome):
    done, kd, _ = outcome
    assert done["kd"].status == "ok" and done["kd"].student == kd.student and done["kd"].measurements == kd.measurements
    assert done["kd"].trace == kd.trace
    assert done["kd"].cost["total"]["teacher_forwards"] == 0  # what the honest method before them left is there


@pytest.mark.parametrize(
    ("slug", "says"),
    [
        ("leaves", "its process ended itself with exit code 0"),
        ("killed", "its process was ended by SIGSEGV"),
        ("exits", "SystemExit: 0 (exits.py:12)"),
    ],
)
def test_an_end_of_its_process_is_a_failed_record(outcome, slug, says):
    record = outcome[0][slug]
    assert (record.status, record.reason) == ("failed", says) and record.student is None and record.measurements == ()


@pytest.mark.parametrize("slug", ["judge", "globals"])
def test_what_is_replaced_in_its_process_judges_nobody(outcome, slug):
    record = outcome[0][slug]
    assert record.status == "ok", record.reason
    assert record.value("top1") < 0.5 and record.measurements[0].n == 400  # an untrained student's


def test_what_it_left_running_is_gone(outcome):
    import psutil

    assert outcome[0]["thread"].status == "ok", outcome[0]["thread"].reason
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(p.info["cmdline"] == ["sleep", "4321"] for p in psutil.process_iter(["cmdline"])):
        time.sleep(0.1)
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "4321"]]


def test_neither_the_judges_seed_nor_its_rows_are_in_the_worker(outcome):
    assert outcome[0]["looks"].status == "ok", outcome[0]["looks"].reason


@pytest.mark.parametrize("slug", IMPORTS)
def test_what_knows_the_judged_rows_is_not_imported(outcome, slug):
    record = outcome[0][slug]
    assert record.status == "failed" and record.student is None
    assert re.search(r"imports (distillbench\.suites|sklearn\.datasets)|reads sys\.modules", record.reason), record.reason


@confined
@pytest.mark.parametrize("slug", OUTSIDE)
def test_nothing_outside_is_written_signalled_or_read(outcome, slug):
    record = outcome[0][slug]
    assert record.status == "failed" and record.reason.startswith("PermissionError"), record.reason
    assert record.environment["confined"] is True


def test_what_is_printed_is_no_result(tmp_path, child):
    """The command's own output is JSON, whatever a method prints."""
    path = tmp_path / "noisy.py"
    path.write_text(HEAD.format(slug="noisy", body="\n".join(f"    {line}" for line in ATTACKS["noisy"].splitlines())))
    process = child("run", TRACK, "-m", path, "--seeds", "1", "--no-controls", "--budget", "640", "--out", tmp_path / "s", "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [r["status"] for r in json.loads(out)] == ["ok"]


def test_a_folder_that_the_user_names_may_be_written_to(tmp_path, monkeypatch):
    path = tmp_path / "logs.py"
    log = tmp_path / "log"
    log.mkdir()
    path.write_text(HEAD.format(slug="logs", body=f"    open({str(log / 'x')!r}, 'w').write('x')\n    return fit()"))
    [spec] = plan(TRACK, [str(path)], [0], controls=False, budget={"student_examples": 640})
    monkeypatch.setattr(lanes, "START", "spawn")
    monkeypatch.setenv("DISTILLBENCH_WRITABLE", os.pathsep.join(map(str, [log, tmp_path / "absent"])))
    [(_, record)] = run_all([spec], Store(tmp_path / "s"), workers=1, watch=lambda *a: None, checkpoint_seconds=30)
    assert record.status == "ok", record.reason
    assert (log / "x").read_text() == "x"
