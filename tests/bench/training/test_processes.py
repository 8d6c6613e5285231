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
from distillbench.training.processes import Processes
from distillbench.training.student import Student
from tests.bench.conftest import METHOD

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


# A classifier, a loss that couples the batch, a generator with noise and a fake score, a method that samples its own text: track -> runs.
GRIDS = {
    "image-classification/blobs": (["kd", "dist"], 3200),
    "image-generation/gaussians": (["dmd2", "f_distill"], 5120),
    "language-modeling/markov": (["gkd", "minillm"], 640),
}
# Commands in one pair of processes (starting them is what costs): runs, one of them again, and one that diverges.
CODE = """
import sys
from distillbench.cli.main import main
store, broken, *grids = sys.argv[1:]
run = ["run", "image-classification/blobs", "--seeds", "1", "--no-controls", "--budget", "3200", "--out", store]
for grid in grids:
    track, budget, *methods = grid.split()
    options = ["--seeds", "1", "--no-controls", "--budget", budget, "--out", store]
    print("FIRST", main(["run", track, *options, "--method", *methods]), flush=True)
print("AGAIN", main([*run, "--method", "kd"]), flush=True)
print("BROKEN", main([*run, "--method", broken]), flush=True)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Records and students of two processes, by method, and what the commands said."""
    folder = tmp_path_factory.mktemp("two")
    broken = folder / "nan-on-one.py"
    body = "\n".join(f"    {line}" for line in NAN_ON_ONE.splitlines())
    broken.write_text(METHOD.format(slug="nan-on-one", body=body, card="", problem="classification"))
    grids = [f"{track} {budget} {' '.join(methods)}" for track, (methods, budget) in GRIDS.items()]
    said = together(CODE, folder, broken, *grids, timeout=300)
    records, bad = read_records(folder / "records")
    assert bad == []
    return folder, {r.slug: r for r in records}, said


def student(folder, record):
    return Student.from_bytes((folder / "students" / f"{record.student['sha256']}.safetensors").read_bytes())


@pytest.mark.slow
def test_two_processes_make_one_record_of_each_run(pair):
    folder, records, (main, other) = pair
    assert main[0] == other[0] == 0, main[2] + other[2]
    assert [line for line in main[1].splitlines() if line.split()[0].isupper()] == [*["FIRST 0"] * len(GRIDS), "AGAIN 0", "BROKEN 1"]
    assert "kd\t1\t" in main[1] and other[1] == ""  # one process speaks for all
    assert set(records) == {"nan-on-one", *(m for methods, _ in GRIDS.values() for m in methods)}
    assert len(list((folder / "students").iterdir())) == len(records) - 1
    failed = records["nan-on-one"]
    assert failed.status == "failed" and "step 5" in failed.reason
    assert not list((folder / "runs").rglob("*.checkpoint"))


@pytest.mark.slow
@pytest.mark.parametrize(("track", "method"), [(track, m) for track, (methods, _) in GRIDS.items() for m in methods])
def test_two_processes_make_the_student_of_one(tmp_path, pair, track, method):
    folder, records, _ = pair
    [spec] = plan(track, [method], [0], controls=False, budget={"student_examples": GRIDS[track][1]})
    alone, two = execute(spec, Store(tmp_path)), records[method]
    assert two.status == alone.status == "ok", two.reason
    assert two.id == alone.id and two.environment["processes"] == 2
    mine, theirs = student(tmp_path, alone).weights, student(folder, two).weights
    for name, weight in mine.items():
        assert torch.allclose(weight, theirs[name], atol=2e-4), name
    for meter in ("student_examples", "student_steps", "teacher_examples", "student_tokens", "teacher_tokens"):
        assert two.cost["total"][meter] == alone.cost["total"][meter], meter
    for term, values in alone.trace.items():  # the whole batch's loss, not one share's
        assert two.trace[term] == pytest.approx(values, rel=5e-3, abs=1e-5)


class Pretended:
    """What ``Processes`` asks of an accelerator, of two processes."""

    num_processes, process_index, is_main_process = 2, 0, True

    def __init__(self, device):
        self.device = torch.device(device)


def test_batch_normalisation_sees_all_rows_on_gpus_and_a_warning_says_where_it_does_not():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    names, weight = list(net.state_dict()), net[1][0].weight
    with pytest.warns(UserWarning, match=r"batch normalisation \(1 layers\) sees the rows of each process alone on CPUs"):
        Processes(Pretended("cpu")).synchronise(net)
    assert type(net[1][0]) is torch.nn.BatchNorm1d
    Processes(Pretended("cuda")).synchronise(net)
    assert type(net[1][0]) is torch.nn.SyncBatchNorm and net[1][0].weight is weight and list(net.state_dict()) == names
    Processes(Pretended("cuda")).synchronise(net)  # once is enough
    assert type(net[1][0]) is torch.nn.SyncBatchNorm
