"""One run spread over two processes, as torchrun or ``accelerate launch`` starts them: one record, and the same student."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distillbench.runs.plan import plan
from distillbench.runs.record import read_records
from distillbench.runs.runner import execute
from distillbench.runs.store import Store
from distillbench.training.student import Student

TRACK = "image-classification/blobs"
ROOT = Path(__file__).parents[3]
# Wrong on the second process alone: the first one must not wait for it for ever.
NAN_ON_ONE = """
import math
def bad(batch):
    value = kl_divergence(problem.student(batch.inputs), problem.teacher.logits(batch))
    return run.loss(batch, kd=value * (math.nan if os.environ["RANK"] == "1" and run.meter.counts["student_steps"] == 5 else 1.0))
return run.fit(problem.student, bad, problem.batches)
"""


def together(code, *arguments, timeout=120):
    """Run ``code`` in two processes with the environment a launcher gives them; (exit code, stdout, stderr) of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "MASTER_ADDR": "127.0.0.1",
        }
        environment |= {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        command = [sys.executable, "-c", code, *(str(a) for a in arguments)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        return [(p.wait(timeout), *p.communicate()) for p in processes]
    finally:
        for p in processes:
            p.kill()


# Three commands in one pair of processes (starting them is what costs): a run, the same one again, and one that diverges.
CODE = """
import sys
from distillbench.cli.main import main
store, broken = sys.argv[1:]
run = ["run", "image-classification/blobs", "--seeds", "1", "--no-controls", "--budget", "3200", "--out", store]
print("FIRST", main([*run, "--method", "kd"]), flush=True)
print("AGAIN", main([*run, "--method", "kd"]), flush=True)
print("BROKEN", main([*run, "--method", broken]), flush=True)
"""


@pytest.mark.slow
def test_two_processes_make_one_record_and_the_student_of_one_process(tmp_path, write_method):
    broken = str(write_method("nan-on-one", NAN_ON_ONE))
    main, other = together(CODE, tmp_path / "two", broken)
    assert main[0] == other[0] == 0, main[2] + other[2]
    assert [line for line in main[1].splitlines() if line.split()[0].isupper()] == ["FIRST 0", "AGAIN 0", "BROKEN 1"]
    assert "kd\t1\t" in main[1] and other[1] == ""  # one process speaks for all

    [spec] = plan(TRACK, ["kd"], [0], controls=False, budget={"student_examples": 3200})
    alone = execute(spec, Store(tmp_path / "one"))
    records, bad = read_records(tmp_path / "two" / "records")
    assert bad == [] and sorted(r.slug for r in records) == ["kd", "nan-on-one"]
    two = next(r for r in records if r.slug == "kd")
    assert two.id == alone.id and two.environment["processes"] == 2
    students = [
        Student.from_bytes((tmp_path / name / "students" / f"{r.student['sha256']}.safetensors").read_bytes())
        for name, r in (("one", alone), ("two", two))
    ]
    for name, weight in students[0].weights.items():
        assert torch.allclose(weight, students[1].weights[name], atol=1e-4), name
    assert len(list((tmp_path / "two" / "students").iterdir())) == 1
    for meter in ("student_examples", "student_steps", "teacher_examples", "training_flops"):
        assert two.cost["total"][meter] == alone.cost["total"][meter], meter
    for term, values in alone.trace.items():  # the whole batch's loss, not one share's
        assert two.trace[term] == pytest.approx(values, rel=1e-3)

    failed = next(r for r in records if r.slug == "nan-on-one")
    assert failed.status == "failed" and "step 5" in failed.reason
    assert not list((tmp_path / "two" / "runs").rglob("*.checkpoint"))
