"""kill -9 of real processes, at moments nobody chose: no record is lost or doubled, and the student is the same bit for bit."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time

import pytest

from distillbench.runs.plan import plan
from distillbench.runs.record import read_records
from distillbench.runs.runner import execute
from distillbench.runs.store import Store

pytestmark = pytest.mark.slow
TRACK = "image-classification/blobs"
BUDGET = 32000  # 500 steps, a checkpoint after every one

# An averaged student and a critic with an optimizer of its own, dropout-like noise from two generators, two phases.
TWO_PLAYERS = """
critic = torch.nn.Linear(problem.classes, problem.classes)
with run.phase("alone"):
    run.fit(problem.student, loss, problem.batches, share=0.3)
def play(batch):
    noise = batch.noise(batch.inputs.shape, "noise") + 0.1 * torch.rand(batch.inputs.shape)
    logits = problem.student(batch.inputs + 0.1 * noise)
    fool = -cross_entropy(critic(logits), batch.labels)
    return run.loss(batch, kd=kl_divergence(logits, problem.teacher.logits(batch)), fool=0.01 * fool)
def judge(batch):
    return run.loss(batch, judge=cross_entropy(critic(problem.student(batch.inputs)), batch.labels))
player = Learner(problem.student, play, ema=0.99)
with run.phase("together"):
    run.loop([Learner(critic, judge, counts=None, optimizer="sgd", learning_rate=0.1), player], problem.batches)
return run.export(player.average, averaged=True)
"""


def arguments(method, out):
    return ["run", TRACK, "--method", method, "--seeds", "1", "--no-controls", "--workers", "1", "--checkpoint-seconds", "0",
            "--budget", BUDGET, "--out", out, "--json"]  # fmt: skip


def kill_in_the_middle(child, method, out, rng, kills):
    """Kill the same command ``kills`` times, each some time after it has gone on from (or begun) a checkpoint."""
    progress = []
    for _ in range(kills):
        before = newest(out)
        process = child(*arguments(method, out))
        deadline = time.monotonic() + 120
        while newest(out) <= before:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.12))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not list(out.glob("records/**/*.record")), "it had finished before it was killed: nothing was tested"
        progress.append(newest(out))
    return progress


def newest(out):
    """When the newest checkpoint was written. A kill may come just after it was set aside for the next one."""
    times = [0]
    for path in [*out.glob("runs/*/*.checkpoint"), *out.glob("runs/*/*.previous")]:
        with contextlib.suppress(FileNotFoundError):  # renamed this moment
            times.append(path.stat().st_mtime_ns)
    return max(times)


def assert_the_same_in_the_end(child, method, out, tmp_path):
    process = child(*arguments(method, out))
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    [listed] = json.loads(stdout)
    [spec] = plan(TRACK, [method], [0], controls=False, budget={"student_examples": BUDGET})
    whole = execute(spec, Store(tmp_path / "whole"), checkpoint_seconds=3600)
    records, bad = read_records(out / "records")
    assert bad == [] and len(records) == 1
    [resumed] = records
    assert resumed.id == whole.id == listed["id"]
    assert resumed.student["sha256"] == whole.student["sha256"]
    assert resumed.measurements == whole.measurements
    assert resumed.trace == whole.trace
    for name, count in whole.cost["total"].items():
        if name not in ("wall_seconds", "peak_memory_bytes", "teacher_forwards"):
            assert resumed.cost["total"][name] == count, name
    weights = list((out / "students").iterdir())
    assert [p.stem for p in weights] == [whole.student["sha256"]]
    assert subprocess.run(["sha256sum", weights[0]], capture_output=True, text=True, check=True).stdout.startswith(weights[0].stem)
    assert not list(out.glob("runs/*/*"))
    return stderr


def test_kd_killed_three_times_is_the_same_student(child, tmp_path):
    seed = int.from_bytes(os.urandom(4), "big")
    print("delays from seed", seed)
    progress = kill_in_the_middle(child, "kd", tmp_path / "store", random.Random(seed), kills=3)
    assert progress == sorted(set(progress)) and len(progress) == 3
    assert_the_same_in_the_end(child, "kd", tmp_path / "store", tmp_path)


def test_an_average_and_two_optimizers_killed_three_times_and_once_damaged(child, tmp_path, write_method):
    method = str(write_method("two-players", TWO_PLAYERS))
    seed = int.from_bytes(os.urandom(4), "big")
    print("delays from seed", seed)
    out = tmp_path / "store"
    kill_in_the_middle(child, method, out, random.Random(seed), kills=3)
    latest = max(out.glob("runs/*/*.previous"), key=lambda p: p.name).with_suffix(".checkpoint")
    if not latest.exists():  # the third kill came between setting one aside and writing the next: the fall-back is tested already
        latest.write_bytes(latest.with_suffix(".previous").read_bytes())
    with latest.open("r+b") as stream:
        stream.truncate(latest.stat().st_size // 2)
    stderr = assert_the_same_in_the_end(child, method, out, tmp_path)
    assert f"{latest.name} is not usable, going back to the one before" in stderr


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="POSIX")
def test_workers_do_not_outlive_a_killed_main_process(child, tmp_path):
    """kill -9 of the main process alone: workers and manager must end by themselves, or they would hold the run's lock."""
    import psutil

    process = child("run", TRACK, "--method", "kd", "--seeds", "2", "--no-controls", "--workers", "2", "--budget", 10**9, "--out", tmp_path)
    deadline = time.monotonic() + 60
    below = []
    while len(below) < 4 and time.monotonic() < deadline:  # resource tracker, manager, two workers
        below = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.05)
    assert len(below) >= 4
    while len(list(tmp_path.glob("runs/*.lock"))) < 2 and time.monotonic() < deadline:  # both are at work
        time.sleep(0.05)
    process.kill()
    _, alive = psutil.wait_procs(below, timeout=15)
    assert not alive
